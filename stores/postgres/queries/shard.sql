-- What a shard asks of PostgreSQL. Every write begins with the fence: the shard's own row, locked FOR SHARE
-- and compared with its term. Whoever takes slots away bumps the term, which waits for transactions in flight
-- and makes every later one find no row here. Times are parameters in seconds since the epoch.
-- `state || ''` stands where a statement knows its outbox rows by id or notification: a plain `state` would let
-- generic plans read all that is pending through the partial index of due rows.

-- name: load_users
-- The streams of users, made where missing. $1 shard, $2 term, $3 tenants, $4 users, $5 slots, $6 epochs.
with fence as materialized (select term from shards where shard = $1 and term = $2 for share),
asked as (select * from unnest($3::text[], $4::text[], $5::smallint[], $6::text[]) as t (tenant, user_id, slot, epoch)),
known as (select s.* from asked a join streams s using (tenant, user_id)),
made as (
    insert into streams (tenant, user_id, slot, epoch, tokens_valid_from)  -- tokens of before an erasure are over
    select a.tenant, a.user_id, a.slot, a.epoch,
           (select max(e.erased_at) from erasures e
            where e.tenant = a.tenant and e.user_hash = sha256(convert_to(a.user_id, 'UTF8')))
    from asked a, fence
    where not exists (select from known k where k.tenant = a.tenant and k.user_id = a.user_id)
    order by a.tenant, a.user_id
    on conflict (tenant, user_id) do nothing
    returning *
),
both_of as (select * from known union all select * from made)
select b.tenant, b.user_id, b.stream_id, b.epoch, b.seq, b.rev,
       b.unread, e.expired,
       (extract(epoch from b.last_seen_at) * 1000)::bigint as last_seen_ms,
       (extract(epoch from b.tokens_valid_from) * 1000)::bigint as valid_from_ms,
       array(select r.token_id from revoked_tokens r where r.stream_id = b.stream_id and r.expires_at > now()),
       (select p.document::text from preferences p where p.tenant = b.tenant and p.user_id = b.user_id),
       (extract(epoch from b.invisible_since) * 1000)::bigint as invisible_since_ms,
       (select p.timezone from profiles p where p.tenant = b.tenant and p.user_id = b.user_id), e.next_ms,
       b.pruned_seq, b.pruned_rev
from both_of b, fence,
    lateral (select count(*) filter (where n.expires_at <= now())::int as expired,
                    (extract(epoch from min(n.expires_at) filter (where n.expires_at > now())) * 1000)::bigint as next_ms
             from notifications n
             where n.stream_id = b.stream_id and n.read_at is null and n.expires_at is not null
               and n.archived_at is null and n.dismissed_at is null and n.retracted_at is null) e;

-- name: stranger
-- What is kept of a user who has no stream; no row: there is one. $1 tenant, $2 user.
select (select p.document::text from preferences p where p.tenant = a.tenant and p.user_id = a.user_id),
       (select p.timezone from profiles p where p.tenant = a.tenant and p.user_id = a.user_id)
from (values ($1::text, $2::text)) as a (tenant, user_id)
where not exists (select from streams s where s.tenant = a.tenant and s.user_id = a.user_id);

-- name: expired
-- How many unread rows of streams have expired, and when the next one will. $1 streams, $2 now.
select t.stream_id, e.*
from unnest($1::bigint[]) as t (stream_id),
    lateral (select count(*) filter (where n.expires_at <= to_timestamp($2))::int as expired,
                    (extract(epoch from min(n.expires_at) filter (where n.expires_at > to_timestamp($2))) * 1000)::bigint
                        as next_ms
             from notifications n
             where n.stream_id = t.stream_id and n.read_at is null and n.expires_at is not null
               and n.archived_at is null and n.dismissed_at is null and n.retracted_at is null) e;

-- name: load_targets
-- Push targets of users. $1 tenants, $2 users.
select d.tenant, d.user_id, d.device_id, d.provider, d.token_kind, d.token, d.app_id, d.environment,
       (extract(epoch from d.registered_at) * 1000)::bigint as registered_ms, d.platform
from unnest($1::text[], $2::text[]) as a (tenant, user_id)
join devices d using (tenant, user_id)
where d.disabled_at is null
order by d.tenant, d.user_id, d.device_id;

-- name: append
-- The group commit: positions, notifications and outbox in one statement, hence one transaction.
-- $3,$4 stream ids and how many each gets; $5..$13 the notifications, `back` counting from the stream's last;
-- a batch with outbox rows has `append_planned` behind `stored`: $14..$16 the rows, $17 now, $18..$25 shapes.
-- Behind them come the receipts. A batch in which rules fired has three parameters more (shard_store.py fills in the
-- names below): how many of each stream count as unread, what was decided, and since when those are filed away that
-- users do not want. One whose notifications begin windows of merging has three more behind all others: what they say
-- of these, and where they are found.
with fence as materialized (select term from shards where shard = $1 and term = $2 for share),
moved as (
    update streams s set seq = s.seq + u.n, rev = s.rev + u.n, unread = s.unread + u.%(shown)s
    from fence, unnest($3::bigint[], $4::int[]%(shown_array)s) as u (stream_id, n%(shown_name)s)
    where s.stream_id = u.stream_id
    returning s.stream_id, s.seq, s.rev, s.unread%(slot)s
),
stored as (
    insert into notifications
        (id, stream_id, seq, rev, position, priority, type, category, content, created_at, expires_at,
         receipt%(ruled)s%(begun)s%(kept)s)
    select e.id, e.stream_id, m.seq - e.back, m.rev - e.back, m.rev - e.back, e.priority, e.type, e.category,
           e.content, to_timestamp(e.created_s), to_timestamp(e.expires_s), e.receipt%(ruled_values)s%(begun_values)s%(kept_value)s
    from unnest($5::uuid[], $6::bigint[], $7::int[], $8::smallint[], $9::text[], $10::text[], $11::text[],
                $12::float8[], $13::float8[], %(receipt)s::smallint[]%(ruled_arrays)s%(begun_arrays)s%(kept_array)s)
         as e (id, stream_id, back, priority, type, category, content, created_s, expires_s, receipt%(ruled_names)s
               %(begun_names)s%(kept)s)
    join moved m on m.stream_id = e.stream_id
)%(planned)s
select stream_id, seq, rev, unread from moved
union all
select 0, term, 0, 0 from fence;

-- name: append_planned
-- The part of `append` that writes outbox rows: each is of one of the batch's notifications ($15, from 1) and has
-- one of few shapes ($16, from 1), which rows share: an array has its price per element. A batch with rows that
-- wait in digests has their ids as its last parameter.
planned as (
    insert into deliveries
        (id, notification_id, stream_id, slot, channel, state, due_at, attempts, created_at, updated_at, gate,
         hold_until, reason, chain, step%(digest)s)
    select d.id, ($5::uuid[])[d.nth], m.stream_id, m.slot, h.channel, h.state, to_timestamp(h.due_s),
           (h.state = 'sending')::int, to_timestamp($17), to_timestamp($17), h.gate, to_timestamp(h.hold_s),
           h.reason, h.chain, h.step%(digest_value)s
    from unnest($14::bigint[], $15::int[], $16::int[]%(digest_array)s) as d (id, nth, shape%(digest)s)
    join unnest($18::text[], $19::float8[], $20::text[], $21::float8[], $22::text[], $23::text[], $24::text[],
                $25::smallint[]) with ordinality
         as h (state, due_s, gate, hold_s, reason, channel, chain, step, shape) on h.shape = d.shape
    join moved m on m.stream_id = ($6::bigint[])[d.nth]
)

-- name: take_keys
-- Idempotency keys come first, sorted, so that two batches never wait for each other in a circle; a key
-- older than its life is taken over. Returns the keys that are ours now.
-- $1 tenants, $2 keys, $3 hashes, $4 ids, $5 now, $6 oldest living creation time.
insert into idempotency_keys as k (tenant, key, body_hash, notification_id, created_at)
select t.tenant, t.key, t.body_hash, t.id, to_timestamp($5)
from unnest($1::text[], $2::text[], $3::bytea[], $4::uuid[]) as t (tenant, key, body_hash, id)
order by t.tenant, t.key
on conflict (tenant, key) do update
    set body_hash = excluded.body_hash, notification_id = excluded.notification_id, created_at = excluded.created_at
    where k.created_at < to_timestamp($6)
returning k.tenant, k.key;

-- name: find_keys
-- What living keys stand for. $1 tenants, $2 keys, $3 oldest living creation time.
select k.tenant, k.key, k.body_hash, k.notification_id, n.seq
from unnest($1::text[], $2::text[]) as t (tenant, key)
join idempotency_keys k using (tenant, key)
left join notifications n on n.id = k.notification_id
where k.created_at >= to_timestamp($3);

-- name: prune_keys
-- Keys past their life, some at a time. $1 oldest living creation time.
delete from idempotency_keys where ctid = any (
    array(select ctid from idempotency_keys where created_at < to_timestamp($1) limit 5000));

-- name: fence
-- The fence alone, for transactions of several statements.
select term from shards where shard = $1 and term = $2 for share;

-- name: find_ids
-- Which ids are stored already (retries after an ambiguous failure). $1 ids.
select n.id, n.seq, n.stream_id from unnest($1::uuid[]) as t (id) join notifications n using (id);

-- name: draw_delivery_ids
-- A block of ids of outbox rows. $1 how many.
select nextval(pg_get_serial_sequence('deliveries', 'id')) as id from generate_series(1, $1);

-- name: change
-- One durable state change per stream; %(set)s and %(where)s come from the operation (shard_store.py).
-- $3,$4 the ids and their streams, $5 now, $6 by the id: the device that made the change, $7 whether what was
-- sent is taken back. A push that is on its way is marked (gate withdrawn): `settle` sees to it. Answers a row per stream that really changed.
with fence as materialized (select term from shards where shard = $1 and term = $2 for share),
target as materialized (
    select n.id, n.stream_id,
           (n.read_at is null and n.archived_at is null and n.dismissed_at is null and n.retracted_at is null)
               as counted
    from fence, unnest($3::uuid[], $4::bigint[]) as t (id, stream_id)
    join notifications n on n.id = t.id and n.stream_id = t.stream_id
    where n.retracted_at is null and %(where)s
),
moved as (
    update streams s set rev = s.rev + 1, unread = s.unread - %(gone)s
    from (select stream_id, count(*) filter (where counted)::int as gone from target group by 1) a
    where s.stream_id = a.stream_id
    returning s.stream_id, s.rev, s.unread
),
done as (
    update notifications n set %(set)s, rev = m.rev, changed = true
    from target t join moved m using (stream_id)
    where n.id = t.id
    returning n.id, n.stream_id
),
%(take_back)s
select m.stream_id, m.rev, m.unread, array(select d.id from done d where d.stream_id = m.stream_id) as ids,
       (select count(*) from retired r where r.stream_id = m.stream_id)
       + (select count(*) from taken_over o where o.stream_id = m.stream_id) as retired
from moved m
union all
select 0, term, 0, '{}', 0 from fence;

-- name: read_all
-- Everything visible and unread up to a seq, one per stream. $3 streams, $4 seqs, $5 now,
-- $6 devices by stream, $7 as in `change`.
with fence as materialized (select term from shards where shard = $1 and term = $2 for share),
target as materialized (
    select n.id, n.stream_id
    from fence, unnest($3::bigint[], $4::bigint[]) as t (stream_id, upto)
    join notifications n on n.stream_id = t.stream_id and n.seq <= t.upto
    where n.read_at is null and n.archived_at is null and n.dismissed_at is null and n.retracted_at is null
),
moved as (
    update streams s set rev = s.rev + 1, unread = s.unread - a.gone
    from (select stream_id, count(*)::int as gone from target group by 1) a
    where s.stream_id = a.stream_id
    returning s.stream_id, s.rev, s.unread
),
done as (
    update notifications n set %(set)s, rev = m.rev, changed = true
    from target t join moved m using (stream_id)
    where n.id = t.id
    returning n.id, n.stream_id
),
%(take_back)s
select m.stream_id, m.rev, m.unread, (select count(*) from done d where d.stream_id = m.stream_id) as changed,
       (select count(*) from retired r where r.stream_id = m.stream_id)
       + (select count(*) from taken_over o where o.stream_id = m.stream_id) as retired
from moved m
union all
select 0, term, 0, 0, 0 from fence;

-- name: take_back
-- The part of `change` and `read_all` that ends what waits outside of the app: `target` and $5 to $7 are theirs,
-- %(streams)s is the parameter beside the devices of $6.
withdrawn as (
    update deliveries d
    set state = case when d.state in ('planned', 'failed', 'unknown') then 'cancelled' else d.state end,
        reason = case when d.state in ('planned', 'failed', 'unknown') then %(reason)s else d.reason end,
        -- One that was withdrawn on its way and came back ends here, as any other that waits.
        gate = case when d.state in ('planned', 'failed', 'unknown') then nullif(d.gate, 'withdrawn') else 'withdrawn' end,
        updated_at = case when d.state in ('cancelled', 'dead') then d.updated_at else to_timestamp($5) end
    from target t
    where d.notification_id = t.id and d.channel <> 'withdraw'
      and (d.state || '' in ('planned', 'failed', 'unknown')
           or ($7 and %(retire)s and d.state || '' in ('sending', 'sent') and d.gate is distinct from 'withdrawn')
           -- It ended without success, and some device has it all the same.
           or ($7 and %(retire)s and d.state || '' in ('cancelled', 'dead') and d.attempts > 0
               and d.gate is distinct from 'withdrawn'
               and exists (select from delivery_attempts a where a.delivery_id = d.id and a.outcome in ('sent', 'unknown'))
               and not exists (select from deliveries b where b.notification_id = d.notification_id and b.channel = 'withdraw')))
    returning d.id, d.notification_id, d.stream_id, d.slot, d.state, d.gate, d.attempts, d.carrier
),
%(taken_over)s,
-- What phones show already is taken back: not from the device that made the change.
retired as (
    insert into deliveries
        (notification_id, stream_id, slot, channel, state, due_at, created_at, updated_at, shown_on)
    select distinct on (w.notification_id) w.notification_id, w.stream_id, w.slot, 'withdraw', 'planned',
           to_timestamp($5), to_timestamp($5), to_timestamp($5), array[nullif(b.device, '')]
    from withdrawn w
    join (select distinct on (stream_id) b.stream_id, b.device
          from unnest(%(streams)s::bigint[], $6::text[]) as b (stream_id, device)) b using (stream_id)
    where $7 and %(retire)s and (w.state = 'sent' or (w.state in ('cancelled', 'dead') and w.attempts > 0))
    returning stream_id
)

-- name: last_seen
-- When users were last seen, and since when they are invisible. $1 tenant, $2 users.
select user_id, (extract(epoch from last_seen_at) * 1000)::bigint,
       (extract(epoch from invisible_since) * 1000)::bigint
from streams
where tenant = $1 and user_id = any ($2::text[]);

-- name: exists
-- Which of the ids belong to the streams beside them. $1 ids, $2 streams.
select n.id from unnest($1::uuid[], $2::bigint[]) as t (id, stream_id)
join notifications n on n.id = t.id and n.stream_id = t.stream_id;

-- name: acknowledge
-- What devices tell of notifications: deliveredAt for what they have, and what becomes of the pushes that wait
-- (delivery_signal). Neither seq nor rev moves. $3 ids, $4 streams, $5 now, $6 signals, $7 the devices that have
-- shown them, separated by line feeds, $8 and $9 the least and the greatest id: partitions between them. $10 the revs
-- they show, null: not told. The push of an update after that waits on. Its commit waits for no disk (kept.sql).
with fence as materialized (
    select term from shards
    where shard = $1 and term = $2 and set_config('synchronous_commit', 'off', true) = 'off' for share
),
told as (
    select t.id, t.stream_id, t.signal, string_to_array(nullif(t.shown, ''), e'\n') as shown, t.rev
    from fence, unnest($3::uuid[], $4::bigint[], $6::text[], $7::text[], $10::bigint[])
         as t (id, stream_id, signal, shown, rev)
),
marked as (
    update notifications n
    set delivered_at = to_timestamp($5),
        kept = case when t.signal = 'silent' and left(n.kept, 1) = '[' then '-' || n.kept else n.kept end  -- nobody's now
    from told t
    where n.id >= $8 and n.id <= $9 and n.id = t.id and n.stream_id = t.stream_id and n.delivered_at is null
      and t.signal in ('silent', 'active', 'received', 'stale')
    returning n.id
),
followed as (
    update deliveries d
    set state = case delivery_signal(t.signal, d.state, d.gate, coalesce(d.hold_until > to_timestamp($5), false))
            when 'cancel' then 'cancelled' else d.state end,
        due_at = case delivery_signal(t.signal, d.state, d.gate, coalesce(d.hold_until > to_timestamp($5), false))
            when 'hold' then d.hold_until when 'due' then to_timestamp($5) else d.due_at end,
        gate = case delivery_signal(t.signal, d.state, d.gate, coalesce(d.hold_until > to_timestamp($5), false))
            when 'hold' then 'held' when 'due' then 'always' else d.gate end,
        reason = case delivery_signal(t.signal, d.state, d.gate, coalesce(d.hold_until > to_timestamp($5), false))
            when 'cancel' then case t.signal when 'done' then coalesce(d.reason, 'active') else 'acknowledged' end
            else d.reason end,
        shown_on = case when t.shown <@ d.shown_on then d.shown_on else coalesce(d.shown_on || t.shown, t.shown) end,
        updated_at = to_timestamp($5)
    from told t
    -- The array says by which index: a plan made when the table was empty would read all of it else. It is sorted
    -- anew for each row, hence batches are bounded. Rows that have ended follow no signal (delivery_signal).
    where d.notification_id = any ($3::uuid[]) and d.notification_id = t.id and d.stream_id = t.stream_id
      and d.channel <> 'withdraw'
      and delivery_signal(t.signal, d.state, d.gate, coalesce(d.hold_until > to_timestamp($5), false))
          = any (case when t.shown is null or t.shown <@ d.shown_on then array['cancel', 'hold', 'due']
                      else array['cancel', 'hold', 'due', 'show'] end)
      -- Dear, hence looked at last: only for rows that would follow; by the key, whatever is planned.
      and case when t.rev is null then true else t.rev >= coalesce((
              select case when n.updated_at is null then 0 else n.rev end from notifications n
              where n.id >= $8 and n.id <= $9 and n.id = d.notification_id), 0) end
)
select (select count(*) from marked) as marked, (select count(*) from fence) as fenced;

-- name: ids_between
-- What of ranges of streams a device may still have to acknowledge, and the rev of its latest update (0: none).
-- $1 streams, $2 after, $3 up to, $4 false: of seqs, true: updates between revs.
select n.id, n.stream_id, n.seq, case when n.updated_at is null then 0 else n.rev end
from unnest($1::bigint[], $2::bigint[], $3::bigint[], $4::boolean[]) as t (stream_id, after, upto, by_rev)
join notifications n on n.stream_id = t.stream_id and n.seq > t.after and n.seq <= t.upto
where not t.by_rev
  and (n.delivered_at is null or left(n.kept, 1) = '['
       or exists (select from deliveries d
                  where d.notification_id = n.id and d.state || '' in ('planned', 'failed', 'unknown')))
union all
select n.id, n.stream_id, n.seq, n.rev
from unnest($1::bigint[], $2::bigint[], $3::bigint[], $4::boolean[]) as t (stream_id, after, upto, by_rev)
join notifications n on n.stream_id = t.stream_id and n.changed and n.rev > t.after and n.rev <= t.upto
where t.by_rev and n.updated_at is not null
  and exists (select from deliveries d
              where d.notification_id = n.id and d.state || '' in ('planned', 'failed', 'unknown'));

-- name: policies
-- The policy documents of tenants, null for one that stored none. $1 tenants.
select t.tenant, t.settings -> 'policy' as policy from tenants t where t.tenant = any ($1::text[]);

-- name: client_secret
-- What signs requests to a tenant's own URLs. $1 tenant.
select client_secret from tenants where tenant = $1;

-- name: save_last_seen
-- $3 streams, $4 seconds. Its commit waits for no disk.
with fence as materialized (
    select term from shards
    where shard = $1 and term = $2 and set_config('synchronous_commit', 'off', true) = 'off' for share
)
update streams s set last_seen_at = to_timestamp(t.at_s)
from fence, unnest($3::bigint[], $4::float8[]) as t (stream_id, at_s)
where s.stream_id = t.stream_id;

-- name: claim_due
-- What is due in the slots of this shard, claimed under a lease; a lapsed lease ("sending" past due) is due
-- again. $3 slots, $4 now, $5 limit, $6 end of the lease. The ids come as an array: joined, the planner reads
-- the whole table for a hash join.
with fence as materialized (select term from shards where shard = $1 and term = $2 for share),
due as materialized (
    select d.id from deliveries d
    where d.slot = any ($3::smallint[]) and d.state in ('planned', 'sending', 'unknown', 'failed')
      and d.due_at <= to_timestamp($4)
    order by d.due_at, d.stream_id  -- what was held for one user until one moment is told together
    limit $5
    for update skip locked
)
update deliveries d
set state = 'sending', due_at = to_timestamp($6), attempts = least(d.attempts + 1, 32767),
    updated_at = to_timestamp($4),
    stale = false  -- its text is read from now on
from fence
where d.id = any (array(select id from due))
returning d.id;

-- name: claimed
-- What a push needs to know of claimed rows. $1 ids of outbox rows.
select d.id, d.attempts, d.slot, s.tenant, s.user_id, s.unread, n.id as notification_id, n.seq, n.type, n.priority,
       n.content, (extract(epoch from n.expires_at) * 1000)::bigint as expires_ms, d.gate,
       d.channel, d.chain, d.step,
       d.base_attempt, (extract(epoch from coalesce(d.replayed_at, d.created_at)) * 1000)::bigint as since_ms,
       -- As it is told now: not before the row was planned, or took over what was merged since.
       coalesce(n.delivered_at >= d.created_at or d.shown_on <> '{}', false) as acknowledged,
       (extract(epoch from d.hold_until) * 1000)::bigint as hold_until_ms,
       coalesce(d.shown_on, '{}') as shown_on,
       array(select a.device_id from delivery_attempts a where a.delivery_id = d.id and a.outcome = 'sent') as sent_to,
       -- A withdrawal, and what replaces a text, is for the devices that got the push, or may have.
       array(select distinct a.device_id from deliveries p join delivery_attempts a on a.delivery_id = p.id
             where d.channel in ('withdraw', 'replace') and p.notification_id = d.notification_id
               and p.channel <> 'withdraw'
               and a.outcome in ('sent', 'unknown')) as reached,
       n.category, coalesce(d.merged, 1) as merged, d.stream_id, d.reason,
       coalesce(d.carrier, told.id) as carrier, coalesce(d.digest, told.digest) as digest,
       (select p.document::text from preferences p where p.tenant = s.tenant and p.user_id = s.user_id) as preferences,
       case when n.retracted_at is not null then 'retracted' when n.cancelled_at is not null then 'cancelled'
            else 'seen' end as ended,
       (select p.timezone from profiles p where p.tenant = s.tenant and p.user_id = s.user_id) as zone
from unnest($1::bigint[]) as t (id)
join deliveries d using (id)
join streams s using (stream_id)
join notifications n on n.id = d.notification_id
-- What a digest told is taken back, or replaced, as a whole.
left join lateral (
    select p.id, p.digest from deliveries p
    where d.channel in ('withdraw', 'replace') and p.notification_id = d.notification_id and p.carrier = p.id
    limit 1
) told on true;

-- name: drop_lost
-- Claimed rows of which `claimed` knows nothing: their user was erased, or the notification is gone. $1 ids.
with gone as (
    delete from deliveries d
    where d.id = any ($1::bigint[])
      and (not exists (select from streams s where s.stream_id = d.stream_id)
           or not exists (select from notifications n where n.id = d.notification_id))
    returning d.id
)
delete from delivery_attempts where delivery_id = any (array(select id from gone));

-- name: release
-- Claimed rows that nobody tried: planned again, the claim does not count as a try. A row claimed again since,
-- or settled, is left alone. $3 ids, $4 attempts, $5 due, $6 reasons, $7 now, $8 true: rules hold it until then.
with fence as materialized (select term from shards where shard = $1 and term = $2 for share),
back as (
    update deliveries d
    set state = 'planned', due_at = to_timestamp(t.due_s), attempts = d.attempts - 1, reason = t.reason,
        gate = case when t.held and d.gate is distinct from 'withdrawn' then 'deferred' else d.gate end,
        hold_until = case when t.held then to_timestamp(t.due_s) else d.hold_until end,
        updated_at = to_timestamp($7)
    from fence, unnest($3::bigint[], $4::smallint[], $5::float8[], $6::text[], $8::boolean[])
         as t (id, attempt, due_s, reason, held)
    where d.id = any ($3::bigint[]) and d.id = t.id and d.attempts = t.attempt and d.state || '' = 'sending'
    returning d.id
)
select (select count(*) from back) as released, (select count(*) from fence) as fenced;

-- name: tries_before
-- Of rows whose outcome comes for a process before this one: tries that no longer count, expiry, and whether a try
-- reached a target. $1 ids.
select d.id, d.base_attempt, (extract(epoch from n.expires_at) * 1000)::bigint as expires_ms,
       exists (select from delivery_attempts a where a.delivery_id = d.id and a.outcome = 'sent') as sent
from deliveries d join notifications n on n.id = d.notification_id
where d.id = any ($1::bigint[]);

-- name: replay
-- Dead letters are tried again: planned, due now, with all their tries before them. What has expired stays dead
-- and says so, at its place in the list. $3 ids, $4 tenants, $5 slots, $6 when it was asked for, $7 now.
-- Answers (id, replayed); rows that an earlier run of the same request has replayed count too.
with fence as materialized (select term from shards where shard = $1 and term = $2 for share),
asked as materialized (
    select t.id, to_timestamp(t.asked_s) as asked_at, d.state, d.replayed_at,
           coalesce(n.expires_at <= to_timestamp($7), false) or n.retracted_at is not null
               or n.cancelled_at is not null as expired
    from fence, unnest($3::bigint[], $4::text[], $5::smallint[], $6::float8[]) as t (id, tenant, slot, asked_s)
    join deliveries d on d.id = t.id and d.tenant = t.tenant and d.slot = t.slot
    join notifications n on n.id = d.notification_id
    where d.id = any ($3::bigint[])
),
again as (
    update deliveries d
    set state = case when a.expired then 'dead' else 'planned' end,
        reason = case when a.expired then 'expired' end,
        due_at = to_timestamp($7),
        base_attempt = case when a.expired then d.base_attempt else d.attempts end,
        replayed_at = case when a.expired then d.replayed_at else a.asked_at end,
        gate = 'always',
        updated_at = case when a.expired then d.updated_at else to_timestamp($7) end
    from asked a
    where d.id = a.id and d.id = any ($3::bigint[]) and a.state = 'dead' and d.state || '' = 'dead'
    returning d.id, not a.expired as replayed
)
select id, replayed from again
union all
select id, true from asked where state <> 'dead' and replayed_at = asked_at
union all
select 0, true from fence;

-- name: merge
-- Of one user what was held is told by one push, the carrier; those it speaks for are cancelled, with those that
-- are due as well and not claimed yet, and those that these spoke for. $3 others, $4 their attempts, $5 their
-- carriers; $6 carriers, $7 their attempts, $8 streams, $9 slots, $10 channels, $11 now. Answers for how many each
-- carrier speaks. All of them say who the carrier is: should it end untold, the next one takes over (`taken_over`).
with fence as materialized (select term from shards where shard = $1 and term = $2 for share),
carrier as materialized (
    select t.id, t.attempt, t.stream_id, t.slot, t.channel, 'merged into ' || d.notification_id as reason
    from fence, unnest($6::bigint[], $7::smallint[], $8::bigint[], $9::smallint[], $10::text[])
         as t (id, attempt, stream_id, slot, channel)
    join deliveries d on d.id = t.id
    where d.id = any ($6::bigint[]) and d.state || '' = 'sending' and d.attempts = t.attempt
),
claimed as (
    update deliveries d set state = 'cancelled', reason = c.reason, carrier = c.id, updated_at = to_timestamp($11)
    from unnest($3::bigint[], $4::smallint[], $5::bigint[]) as t (id, attempt, carrier)
    join carrier c on c.id = t.carrier
    where d.id = any ($3::bigint[]) and d.id = t.id and d.attempts = t.attempt and d.state || '' = 'sending'
    returning c.id, d.id as was
),
due as (
    update deliveries d set state = 'cancelled', reason = c.reason, carrier = c.id, updated_at = to_timestamp($11)
    from carrier c
    where d.slot = any ($9::smallint[]) and d.state = 'planned' and d.due_at <= to_timestamp($11)
      and d.gate = 'deferred' and d.slot = c.slot and d.stream_id = c.stream_id and d.channel = c.channel
      and d.digest is null
      and not exists (select from notifications n
                      where n.id = d.notification_id and n.expires_at <= to_timestamp($11))  -- told to nobody
    returning c.id, d.id as was
),
theirs as (
    update deliveries d set reason = c.reason, carrier = c.id
    from (select id, was from claimed union all select id, was from due) o join carrier c using (id)
    where d.carrier = o.was and d.id <> o.was
    returning c.id
),
counted as (
    select c.id, (select count(*) from claimed o where o.id = c.id) + (select count(*) from due o where o.id = c.id)
                 + (select count(*) from theirs o where o.id = c.id) as n
    from carrier c
),
told as (
    update deliveries d set merged = least(coalesce(d.merged, 1) + c.n, 32767), carrier = d.id
    from counted c
    where d.id = any ($6::bigint[]) and d.id = c.id and c.n > 0
    returning d.id, d.merged
)
select id, merged::int from told
union all
select 0, 0 from fence;

-- name: taken_over
-- Part of statements that end carriers: what these spoke for is decided again, now, unless the user is through with it.
-- What has expired ends as that: nobody told it. The statement says which carriers ended, which of their others end
-- with them, and the time.
taken_over as (
    update deliveries f
    set state = case when n.expires_at <= to_timestamp(%(now)s) then 'cancelled' else 'planned' end,
        gate = 'deferred', due_at = to_timestamp(%(now)s), hold_until = to_timestamp(%(now)s),
        carrier = null, merged = null, updated_at = to_timestamp(%(now)s),
        reason = case when n.expires_at <= to_timestamp(%(now)s) then 'expired'
                 when f.digest is null then 'takes over' else 'digest' end,
        attempts = case when exists (select from delivery_attempts a where a.delivery_id = f.id) then f.attempts
                   else 0 end
    from (%(ended)s) e, notifications n
    where f.carrier = e.id and f.id <> e.id and f.state || '' = 'cancelled'
      and n.id = f.notification_id and n.seen_at is null and n.read_at is null and n.dismissed_at is null
      and n.retracted_at is null and n.cancelled_at is null
      and (n.archived_at is null or n.archived_at = n.created_at)%(but)s
    returning f.stream_id
)

-- name: record_attempts
-- $1 delivery, $2 attempt, $3 device, $4 provider, $5 outcome, $6 provider id, $7 status, $8 error, $9 started,
-- $10 duration. What comes in after its user was erased is not kept; asked by the key, whatever is planned.
insert into delivery_attempts
    (delivery_id, attempt, device_id, provider, outcome, provider_id, status, error, started_at, duration_ms)
select t.delivery_id, t.attempt, t.device_id, t.provider, t.outcome, t.provider_id, t.status, t.error,
       to_timestamp(t.started_s), t.duration_ms
from unnest($1::bigint[], $2::smallint[], $3::text[], $4::text[], $5::text[], $6::text[], $7::smallint[], $8::text[],
            $9::float8[], $10::real[])
     as t (delivery_id, attempt, device_id, provider, outcome, provider_id, status, error, started_s, duration_ms)
where (select d.id from deliveries d where d.id = t.delivery_id) is not null
on conflict do nothing;

-- name: settle
-- The state of claimed rows after a try. A row claimed again since (another attempt) is left alone.
-- $1 ids, $2 attempts, $3 states, $4 due, $5 reasons, $6 now, $7 true: the next channel may follow.
-- Answers the rows that ended without success and have a next channel: `fall_back` is for them. These are
-- cancelled, never dead: only the end of a chain is a dead letter.
-- A withdrawal, and what replaces a text, gives up after $8 tries and is never a dead letter. A push that was sent
-- while its notification was dealt with is withdrawn; one that was not is not tried again. One that was sent while
-- its text changed is replaced. $9 true: what it speaks for, if it does, is decided again.
with done as (
    update deliveries d
    set state = case
            when d.channel in ('withdraw', 'replace')
                 and (t.state = 'dead' or (t.state in ('failed', 'unknown') and t.attempt >= $8)) then 'cancelled'
            when d.gate = 'withdrawn' and t.state <> 'sent' then 'cancelled'
            when t.state = 'dead' and t.onward and d.chain <> '' then 'cancelled'
            else t.state end,
        due_at = to_timestamp(t.due_s), reason = t.reason, updated_at = to_timestamp($6),
        tenant = case when t.state = 'dead' then (select s.tenant from streams s where s.stream_id = d.stream_id)
                 else d.tenant end
    from unnest($1::bigint[], $2::smallint[], $3::text[], $4::float8[], $5::text[], $7::boolean[], $9::boolean[])
         as t (id, attempt, state, due_s, reason, onward, next)
    where d.id = t.id and d.attempts = t.attempt and d.state || '' = 'sending'
    returning d.id, t.state in ('dead', 'cancelled') and t.onward and d.chain <> '' as falls, d.gate,
              d.notification_id, d.stream_id, d.slot, d.merged, d.stale, d.state,
              d.carrier = d.id and (t.next or d.gate is not distinct from 'withdrawn') as spoke
),
%(taken_over)s,
retired as (
    insert into deliveries (notification_id, stream_id, slot, channel, state, due_at, created_at, updated_at)
    select distinct on (notification_id) notification_id, stream_id, slot, 'withdraw', 'planned', to_timestamp($6),
           to_timestamp($6), to_timestamp($6)
    from done d
    where gate = 'withdrawn'
      and exists (select from delivery_attempts a where a.delivery_id = d.id and a.outcome in ('sent', 'unknown'))
    returning id
),
replaced as (
    insert into deliveries
        (notification_id, stream_id, slot, channel, state, due_at, created_at, updated_at, gate, merged)
    select distinct on (d.notification_id) d.notification_id, d.stream_id, d.slot, 'replace', 'planned',
           to_timestamp($6), to_timestamp($6), to_timestamp($6), 'always', d.merged
    from done d
    where d.stale and d.gate is distinct from 'withdrawn'
      and exists (select from notifications n
                  where n.id = d.notification_id and n.read_at is null and n.archived_at is null
                    and n.dismissed_at is null and n.retracted_at is null)
      and exists (select from delivery_attempts a where a.delivery_id = d.id and a.outcome in ('sent', 'unknown'))
    order by d.notification_id
    returning id
)
select id, falls, false as retired from done where falls
union all
select id, false, true from retired
union all
select id, false, true from replaced
union all
select 0, false, true from taken_over;

-- name: fall_back
-- The next channel of the chain, due now, once per notification: if no other channel of the same step may
-- still succeed and none follows already, and unless a device has it by now or nobody wants it any more. Of several
-- that end together the one that was planned last says what is next: it tells what was merged since.
-- $1 rows that ended without success, $2 now.
with ready as materialized (
    select distinct on (d.notification_id)
           d.notification_id, d.stream_id, d.slot, d.step, d.shown_on,
           -- Not only received but to be seen, or urgent: an acknowledgement does not stop the next one either.
           case when d.gate in ('seen', 'always') then 'always' end as gate, split_part(d.chain, ',', 1) as next,
           substr(d.chain, length(split_part(d.chain, ',', 1)) + 2) as chain
    from deliveries d
    join notifications n on n.id = d.notification_id
    where d.id = any ($1::bigint[])
      -- What was merged since is told anew: who had it, and what was sent, before the row was planned counts no more.
      and (n.delivered_at is null or n.delivered_at < d.created_at or d.gate in ('seen', 'always'))
      and (n.seen_at is null or n.seen_at < d.created_at)
      and (n.archived_at is null or n.archived_at = n.created_at)  -- filed away from the first: only not in the app
      and n.dismissed_at is null and n.retracted_at is null and n.cancelled_at is null
      and not exists (select from deliveries o
                      where o.notification_id = d.notification_id
                        and (o.state in ('planned', 'sending', 'failed', 'unknown')
                             or (o.created_at >= d.created_at and (o.step > d.step or o.state = 'sent'))))
    order by d.notification_id, d.created_at desc, d.step desc, d.id desc
),
told as (
    update deliveries d set reason = concat_ws('; ', d.reason, 'falls back to ' || r.next)
    from ready r
    where d.id = any ($1::bigint[]) and d.notification_id = r.notification_id
)
insert into deliveries
    (notification_id, stream_id, slot, channel, state, due_at, created_at, updated_at, chain, step, gate, shown_on)
select r.notification_id, r.stream_id, r.slot, r.next, 'planned', to_timestamp($2), to_timestamp($2), to_timestamp($2),
       r.chain, r.step + 1, r.gate, r.shown_on
from ready r
returning id;

-- name: drop_targets
-- Targets the provider calls gone, unless registered again since. $1 tenants, $2 users, $3 devices, $4 tokens.
delete from devices d
using unnest($1::text[], $2::text[], $3::text[], $4::text[]) as t (tenant, user_id, device_id, token)
where d.tenant = t.tenant and d.user_id = t.user_id and d.device_id = t.device_id and d.token = t.token;

-- name: disable_targets
-- Targets that belong to another sender. $1 tenants, $2 users, $3 devices, $4 tokens, $5 now, $6 reason.
update devices d set disabled_at = to_timestamp($5), disabled_reason = $6
from unnest($1::text[], $2::text[], $3::text[], $4::text[]) as t (tenant, user_id, device_id, token)
where d.tenant = t.tenant and d.user_id = t.user_id and d.device_id = t.device_id and d.token = t.token;

-- name: evict_target
-- A target that another user registers now. $1 tenant, $2 provider, $3 app, $4 token, $5 user, $6 device.
delete from devices
where tenant = $1 and provider = $2 and app_id = $3 and token = $4 and (user_id, device_id) <> ($5, $6)
returning user_id;

-- name: put_target
insert into devices
    (tenant, user_id, device_id, platform, provider, token_kind, token, app_id, environment, locale, registered_at)
values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, to_timestamp($11))
on conflict (tenant, user_id, device_id) do update
    set platform = excluded.platform, provider = excluded.provider, token_kind = excluded.token_kind,
        token = excluded.token, app_id = excluded.app_id, environment = excluded.environment,
        locale = excluded.locale, registered_at = excluded.registered_at, disabled_at = null, disabled_reason = null;

-- name: delete_target
delete from devices where tenant = $1 and user_id = $2 and device_id = $3 returning device_id;

-- name: lock_preferences
-- $1 tenant, $2 user.
select document::text from preferences where tenant = $1 and user_id = $2 for update;

-- name: put_preferences
-- $1 tenant, $2 user, $3 document, $4 now, $5 the version to replace, 0 for none, null for any. No row: another
-- version is there.
insert into preferences as p (tenant, user_id, document, updated_at)
select $1, $2, $3::jsonb, to_timestamp($4)
where coalesce($5::bigint, 0) = 0
   or exists (select from preferences k where k.tenant = $1 and k.user_id = $2)
on conflict (tenant, user_id) do update
    set document = excluded.document, version = p.version + 1, updated_at = excluded.updated_at
    where $5::bigint is null or p.version = $5
returning version;

-- name: log_out
-- A token is refused until it ends by itself; those that have ended go. $1 stream, $2 token, $3 its end (seconds).
with stale as (
    delete from revoked_tokens where (stream_id, token_id) = any (
        array(select (stream_id, token_id) from revoked_tokens where expires_at < now() limit 100))
)
insert into revoked_tokens (stream_id, token_id, expires_at) values ($1, $2, to_timestamp($3))
on conflict do nothing;

-- name: revoke_tokens
update streams set tokens_valid_from = to_timestamp($2) where stream_id = $1;

-- name: set_invisible
-- $1 stream, $2 since, null for visible.
update streams set invisible_since = case when $2::float8 is null then null
                                          else coalesce(invisible_since, to_timestamp($2)) end
where stream_id = $1
returning (extract(epoch from invisible_since) * 1000)::bigint;

-- name: notifications_after
-- Replay: $1 stream, $2 after seq, $3 limit.
select %(row)s from notifications n where n.stream_id = $1 and n.seq > $2 order by n.seq limit $3;

-- name: changes_after
-- Catching up on changes: $1 stream, $2 after rev, $3 up to seq, $4 or after rev, $5 limit. One row at least says
-- whether changes after $2 were pruned.
select c.*, s.pruned_rev > $2 as pruned
from streams s
left join lateral (
    select %(row)s from notifications n
    where n.stream_id = $1 and n.changed and n.rev > $2 and (n.seq <= $3 or n.rev > $4)
    order by n.rev, n.seq limit $5
) c on true
where s.stream_id = $1
order by c.rev, c.seq;
