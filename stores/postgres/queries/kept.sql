-- Pushes kept in their notification (docs/adr/0016-kept-pushes.md). Every write begins with the fence (shard.sql).

-- name: acknowledge_kept
-- What signals make of kept pushes, and deliveredAt. $3 ids, $4 streams, $5 now, $6 texts after that, $7 and $8 the
-- least and the greatest id: partitions between them; $9 whether a device has it. Its commit waits for no disk: what a
-- power failure takes of it costs a push that need not have come (guarantee G6).
with fence as materialized (
    select term from shards
    where shard = $1 and term = $2 and set_config('synchronous_commit', 'off', true) = 'off' for share
),
marked as (
    update notifications n
    set delivered_at = coalesce(n.delivered_at, case when t.has then to_timestamp($5) end), kept = t.kept
    from fence, unnest($3::uuid[], $4::bigint[], $6::text[], $9::boolean[]) as t (id, stream_id, kept, has)
    where n.id >= $7 and n.id <= $8 and n.id = t.id and n.stream_id = t.stream_id
    returning n.id
)
select (select count(*) from marked) as marked, (select count(*) from fence) as fenced;

-- name: write_kept
-- Kept pushes become rows of the outbox, at most once by notification and channel. What was erased, or dealt with,
-- does not.
-- $3 ids, $4 slots, $5 channels, $6 due, $7 gates, $8 holds, $9 reasons, $10 chains, $11 steps, $12 devices
-- separated by line feeds, $13 now.
with fence as materialized (select term from shards where shard = $1 and term = $2 for share),
made as (
    insert into deliveries
        (notification_id, stream_id, slot, channel, state, due_at, created_at, updated_at, gate, hold_until, reason,
         chain, step, shown_on)
    select n.id, n.stream_id, k.slot, k.channel, 'planned', to_timestamp(k.due_s), n.created_at, to_timestamp($13),
           k.gate, to_timestamp(k.hold_s), k.reason, k.chain, k.step, string_to_array(nullif(k.shown, ''), e'\n')
    from fence,
        unnest($3::uuid[], $4::smallint[], $5::text[], $6::float8[], $7::text[], $8::float8[], $9::text[], $10::text[],
               $11::smallint[], $12::text[]) with ordinality
             as k (id, slot, channel, due_s, gate, hold_s, reason, chain, step, shown, nth)
        join notifications n on n.id = k.id
    where n.id = any ($3::uuid[]) and %(open)s
      and not exists (select from deliveries d where d.notification_id = n.id and d.channel = k.channel)
    order by k.nth
    returning id
)
select (select count(*) from made) as made, (select count(*) from fence) as fenced;

-- name: kept_since
-- From which id on notifications of slots may keep pushes that nobody remembers. $3 slots. No row: the term is over.
with fence as materialized (select term from shards where shard = $1 and term = $2 for share)
select (select coalesce(s.kept_from, m.from_id) as since
        from unnest($3::smallint[]) as a (slot)
        left join slots s on s.slot = a.slot
        left join kept_marks m on m.shard = $1
        order by since limit 1)
from fence;

-- name: adopt_kept
-- A page of them, by id: what waits becomes rows of the outbox. $3 slots, $4 after this id, $5 streams, null: all of
-- the slots, $6 now. Answers how many rows were looked at, the last of them, and how many were made.
with fence as materialized (select term from shards where shard = $1 and term = $2 for share),
page as materialized (
    select n.id, n.stream_id, n.created_at, n.kept, %(open)s as open
    from notifications n where n.id > $4 order by n.id limit %(page)s
),
made as (
    insert into deliveries
        (notification_id, stream_id, slot, channel, state, due_at, created_at, updated_at, gate, hold_until, reason,
         chain, step, shown_on)
    select p.id, p.stream_id, s.slot, c.channel, 'planned', to_timestamp((k ->> 1)::float8 / 1000), p.created_at,
           to_timestamp($6), k ->> 3, to_timestamp((k ->> 2)::float8 / 1000), k ->> 4, k ->> 5, (k ->> 6)::smallint,
           nullif(array(select jsonb_array_elements_text(k -> 7)), '{}')
    from fence, page p
        join streams s using (stream_id)
        cross join lateral (select p.kept::jsonb as k) as fields
        cross join lateral jsonb_array_elements_text(k -> 0) as c (channel)
    where p.open and left(p.kept, 1) = '[' and s.slot = any ($3::smallint[])
      and ($5::bigint[] is null or p.stream_id = any ($5::bigint[]))
      and not exists (select from deliveries d where d.notification_id = p.id)
    order by p.id
    returning id
)
select (select count(*) from page) as looked, (select p.id from page p order by p.id desc limit 1) as last,
       (select count(*) from made) as made, (select count(*) from fence) as fenced;

-- name: settled_streams
-- Waits for writes of these streams that are under way. $3 streams.
with fence as materialized (select term from shards where shard = $1 and term = $2 for share),
theirs as (select s.stream_id from streams s where s.stream_id = any ($3::bigint[]) order by s.stream_id for update)
select (select count(*) from theirs) as streams, (select count(*) from fence) as fenced;

-- name: adopted
-- All of these slots was looked at. $3 slots.
with fence as materialized (select term from shards where shard = $1 and term = $2 for share),
done as (
    update slots set kept_from = null
    from fence
    where slot = any ($3::smallint[]) and kept_from is not null
    returning slot
)
select (select count(*) from done) as slots, (select count(*) from fence) as fenced;

-- name: open
-- Part of statements: nobody has dealt with notification n.
(n.seen_at is null and n.read_at is null and n.archived_at is null and n.dismissed_at is null
 and n.retracted_at is null and n.cancelled_at is null)

-- name: mark_kept
-- Older notifications keep no push of this shard's. $3 id.
with fence as materialized (select term from shards where shard = $1 and term = $2 for share),
marked as (
    insert into kept_marks as m (shard, from_id) select $1, $3 from fence
    on conflict (shard) do update set from_id = excluded.from_id
    returning m.shard
)
select count(*) from marked;
