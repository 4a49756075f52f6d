-- Waiting pushes follow the user's attention (carillon/attention.py).

alter table deliveries
    add column gate text,                 -- what an acknowledgement does to a waiting push; null: ends or holds it
    add column hold_until timestamptz,    -- until when it may be held for an active user; null: not at all
    add column shown_on text[];           -- devices that have shown the socket copy: no push for them

-- What a signal does to a push, `on_signal` of carillon/attention.py; a test compares the two.
create function delivery_signal(signal text, state text, gate text, holdable boolean) returns text
language sql immutable parallel safe as $$
    select case
        when state in ('planned', 'failed', 'unknown') and (
                (signal = 'silent' and (gate is null or gate in ('any', 'held')))
                or (signal = 'received' and gate = 'any')
                or (signal = 'active' and (gate is null or gate = 'any') and not (state = 'planned' and holdable))
                or (signal = 'done' and state = 'planned' and gate in ('held', 'seen')))
            then 'cancel'
        when state = 'planned' and (
                (signal = 'active' and (gate is null or gate = 'any'))
                or (signal = 'keep' and gate = 'seen'))
            then 'hold'
        when state = 'planned' and signal = 'away' and (gate is null or gate in ('any', 'held')) then 'due'
        when signal = 'active' and state in ('planned', 'failed', 'unknown', 'sending') then 'show'
        else 'none'
    end
$$;
