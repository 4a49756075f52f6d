-- Events that become part of a notification that is there already (carillon/merging.py).

-- The window of each key of a user: the latest, written anew when the next one begins. Found by its key alone.
create table merge_windows (
    stream_id       bigint not null,
    key             text not null,
    notification_id uuid not null,
    ends_at         timestamptz not null,
    events          integer not null,                   -- in the notification, the first included
    count           integer not null,                   -- as the notification says
    notified_at     timestamptz not null,               -- when its user was last disturbed by it, or will be
    primary key (stream_id, key)
) with (fillfactor = 80);
create index merge_windows_age on merge_windows using brin (ends_at);

-- Which events are in which notification, written in the transaction that merges them: a repeated try of one finds
-- what became of it, an actor is counted once, `explain` can tell. Kept for `merge.keep_s`.
create table merged_events (
    event_id        uuid primary key,                   -- the id the event was minted with
    notification_id uuid not null,
    stream_id       bigint not null,
    at              timestamptz not null,
    status          text not null,                      -- opened|merged|duplicate
    how             text not null,                      -- drop|count|replace|accumulate|aggregate
    source          text not null,                      -- event|tenant: who asked for it
    actor           text,
    notice          text                                -- loud|later|quiet: whether it disturbed the user
);
create index merged_events_notification on merged_events (notification_id, actor);
create index merged_events_age on merged_events using brin (at);
