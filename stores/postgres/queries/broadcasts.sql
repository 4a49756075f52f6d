-- Broadcasts. Times are parameters in seconds since the epoch.

-- name: turn
-- Broadcasts of a tenant are made one after the other: each counts those before. $1 tenant.
select pg_advisory_xact_lock(hashtextextended('broadcasts:' || $1, 0));

-- name: add
-- A row comes back unless the key is known, or the tenant has $10 of the kind: that wait for their time, or that run or
-- are paused. $1 id, $2 tenant, $3 audience, $4 event, $5 state, $6 start, $7 key, $8 hash, $9 now. What is not scheduled
-- has begun.
insert into broadcasts
    (broadcast_id, tenant, audience, event, state, start_at, started_at, resumed_at, idempotency_key, body_hash,
     created_at, updated_at)
select $1, $2, $3, $4, $5, to_timestamp($6), case when $5 = 'running' then to_timestamp($6) end,
       case when $5 = 'running' then to_timestamp($6) end, $7, $8, to_timestamp($9), to_timestamp($9)
where (select count(*) from broadcasts
       where tenant = $2 and ended_at is null and (started_at is null) = ($5 = 'scheduled')) < $10
on conflict (tenant, idempotency_key) where idempotency_key is not null do nothing
returning broadcast_id;

-- name: known
-- What a key stands for. $1 tenant, $2 key.
select broadcast_id, body_hash from broadcasts where tenant = $1 and idempotency_key = $2;

-- name: open
-- How many of the kind a tenant has: that wait for their time ($2 scheduled), or that run or are paused. $1 tenant.
select count(*) from broadcasts
where tenant = $1 and ended_at is null and (started_at is null) = ($2 = 'scheduled');

-- name: broadcast
-- $1 tenant, $2 id.
select %(row)s from broadcasts b left join lateral (%(sums)s) s on true
where b.tenant = $1 and b.broadcast_id = $2;

-- name: broadcasts
-- By id, newest first. $1 tenant, $2 state (null: all), $3 before this id, $4 limit.
select %(row)s from broadcasts b left join lateral (%(sums)s) s on true
where b.tenant = $1 and ($2::text is null or b.state = $2) and ($3::uuid is null or b.broadcast_id < $3)
order by b.broadcast_id desc limit $4;

-- name: sums
-- A part of the two above.
select sum(t.stored)::bigint as stored, sum(t.delivered)::bigint as delivered, sum(t.queued)::bigint as queued,
       sum(t.deferred)::bigint as deferred, sum(t.suppressed)::bigint as suppressed, sum(t.failed)::bigint as failed
from broadcast_slots t where t.broadcast_id = b.broadcast_id;

-- name: begun_at
-- Broadcasts of a tenant that began at a moment. $1 tenant, $2 the moment.
select broadcast_id from broadcasts where tenant = $1 and started_at = to_timestamp($2);

-- name: failures
-- $1 broadcast, $2 after this user, $3 limit.
select user_id, code, detail, (extract(epoch from failed_at) * 1000)::bigint as failed_ms
from broadcast_failures where broadcast_id = $1 and user_id > $2 order by user_id limit $3;

-- name: act
-- Pause, resume, cancel: waits for the chunks in flight, and none is written after it. A row comes back if it was in
-- one of the states. $1 tenant, $2 id, $3 new state, $4 from states, $5 now.
update broadcasts
set state = case when $3 = 'running' and started_at is null then 'scheduled' else $3 end,
    ran_ms = ran_ms + coalesce((extract(epoch from to_timestamp($5) - resumed_at) * 1000)::bigint, 0),
    resumed_at = case when $3 = 'running' and started_at is not null then to_timestamp($5) end,
    ended_at = case when $3 = 'cancelled' then to_timestamp($5) end,
    updated_at = to_timestamp($5)
where tenant = $1 and broadcast_id = $2 and state = any ($4::text[])
returning state;

-- name: active
-- What runs or is to begin. $1 now.
select broadcast_id, tenant, audience, event, state, total,
       (extract(epoch from started_at) * 1000)::bigint as started_ms
from broadcasts where state in ('scheduled', 'running') and start_at <= to_timestamp($1)
order by start_at, broadcast_id;

-- name: begin
-- $1 id, $2 now.
update broadcasts
set state = 'running', started_at = to_timestamp($2), resumed_at = to_timestamp($2), updated_at = to_timestamp($2)
where broadcast_id = $1 and state = 'scheduled';

-- name: estimate
-- $1 id, $2 total.
update broadcasts set total = $2 where broadcast_id = $1 and total is null;

-- name: fail
-- It cannot go on. $1 id, $2 why, $3 now.
update broadcasts
set state = 'failed', reason = $2, ended_at = to_timestamp($3), resumed_at = null, updated_at = to_timestamp($3),
    ran_ms = ran_ms + coalesce((extract(epoch from to_timestamp($3) - resumed_at) * 1000)::bigint, 0)
where broadcast_id = $1 and state = 'running';

-- name: progress
-- How far slots are. $1 id, $2 slots.
select slot, last_user, done from broadcast_slots where broadcast_id = $1 and slot = any ($2::smallint[]);

-- name: streams_of
-- A part of `contexts`: streams of users. $2 slots of the users, $3 users.
select s.user_id, s.stream_id from streams s
where s.tenant = $1 and s.slot = any ($2::smallint[]) and s.user_id = any ($3::text[])

-- name: streams_between
-- The same where nearly everybody between the first and the last user of a page is on it: to walk the index from one to
-- the other costs a third of comparing each with the page. $2 slots, $4 first and $5 last user in each, $6 so many at most.
select s.user_id, s.stream_id from unnest($2::smallint[], $4::text[], $5::text[]) as p (slot, first, last)
cross join lateral (
    select s.user_id, s.stream_id from streams s
    where s.tenant = $1 and s.slot = p.slot and s.user_id >= p.first and s.user_id <= p.last
) s limit $6

-- name: take_turn
-- Until the end of the transaction, which ends with its connection if nothing is asked on it for long: whoever has the
-- turn may have lost its node. $1 lock, $2 how long, in ms.
select set_config('idle_in_transaction_session_timeout', $2, true), pg_advisory_xact_lock($1);

-- name: contexts
-- What decides about users, a row for each thing that there is. $1 tenant, $3 users. By slot, as the page was read: all of
-- its streams lie side by side in that index.
select s.user_id, s.stream_id, null as provider, null as preferences, null as zone from (%(streams)s) s
union all
select d.user_id, null, d.provider, null, null from devices d
where d.tenant = $1 and d.user_id = any ($3::text[]) and d.disabled_at is null
union all
select p.user_id, null, null, p.document::text, null from preferences p
where p.tenant = $1 and p.user_id = any ($3::text[])
union all
select p.user_id, null, null, null, p.timezone from profiles p
where p.tenant = $1 and p.user_id = any ($3::text[]) and p.timezone is not null;

-- name: make_streams
-- Streams of users who have none. $1 shard, $2 term, $3 tenant, $4 users, $5 slots, $6 epochs.
with fence as materialized (select term from shards where shard = $1 and term = $2 for share)
insert into streams (tenant, user_id, slot, epoch, tokens_valid_from)  -- tokens of before an erasure are over
select $3, t.user_id, t.slot, t.epoch,
       (select max(e.erased_at) from erasures e
        where e.tenant = $3 and e.user_hash = sha256(convert_to(t.user_id, 'UTF8')))
from fence, unnest($4::text[], $5::smallint[], $6::text[]) as t (user_id, slot, epoch)
on conflict (tenant, user_id) do nothing
returning user_id, stream_id;

-- name: enter
-- The beginning of every transaction that writes for a broadcast: the fence, whether it runs (it stays so until the
-- end of the transaction), and which of the notifications are stored. $1 shard, $2 term, $3 broadcast, $4 ids,
-- $5 and $6 the least and the greatest id of the broadcast: they choose the month.
with fence as materialized (select term from shards where shard = $1 and term = $2 for share),
going as materialized (select state from broadcasts where broadcast_id = $3 for share)
select (select term from fence) as term, (select state from going) as state,
       array(select n.id from notifications n where n.id >= $5 and n.id <= $6 and n.id = any ($4::uuid[])) as stored;

-- name: append
-- A chunk: the positions, notifications and outbox rows of users who are not in memory, each of whom has one. What is
-- the same for all stands alone; what some of them share has a place there, counted from 1.
-- $3 streams, $4 ids, $5 the places, $6 type, $7 category, $8 created, $9 expires, $16 how many they are; by place: $10 what
-- they count as unread, $11 to $15 what is stored. Answers the streams if some are gone.
with %(fence)s,
moved as (
    update streams s set seq = s.seq + 1, rev = s.rev + 1, unread = s.unread + ($10::int[])[u.shape]
    from fence, unnest($3::bigint[], $4::uuid[], $5::int[]) as u (stream_id, id, shape)
    where s.stream_id = u.stream_id
    returning s.stream_id, s.slot, s.seq, s.rev, u.id, u.shape
),
stored as (
    insert into notifications
        (id, stream_id, seq, rev, position, priority, type, category, content, created_at, expires_at, decision,
         archived_at, receipt)
    select m.id, m.stream_id, m.seq, m.rev, m.rev, h.priority, $6::text, $7::text, h.content, to_timestamp($8::float8),
           to_timestamp($9::float8), h.decision, to_timestamp(h.archived_s), h.receipt
    from moved m
    join unnest($11::text[], $12::smallint[], $13::text[], $14::float8[], $15::smallint[]) with ordinality
         as h (content, priority, decision, archived_s, receipt, shape) on h.shape = m.shape
)%(planned)s%(marked)s
select case when (select count(*) from moved) < $16::bigint then array(select stream_id from moved) end, term from fence;

-- name: planned
-- The part of `append` that writes outbox rows: each is of one of the users (%(o2)s) and has one of few shapes (%(o3)s).
-- %(o1)s ids, %(o4)s the digests they wait in, %(o5)s now.
planned as (
    insert into deliveries
        (id, notification_id, stream_id, slot, channel, state, due_at, attempts, created_at, updated_at, gate,
         hold_until, reason, chain, step, digest)
    select d.id, m.id, m.stream_id, m.slot, h.channel, 'planned', to_timestamp(h.due_s), 0, to_timestamp(%(o5)s),
           to_timestamp(%(o5)s), h.gate, to_timestamp(h.hold_s), h.reason, h.chain, h.step, d.digest
    from unnest(%(o1)s::bigint[], %(o2)s::int[], %(o3)s::int[], %(o4)s::uuid[]) as d (id, nth, shape, digest)
    join unnest(%(o6)s::float8[], %(o7)s::text[], %(o8)s::float8[], %(o9)s::text[], %(o10)s::text[], %(o11)s::text[],
                %(o12)s::smallint[]) with ordinality
         as h (due_s, gate, hold_s, reason, channel, chain, step, shape) on h.shape = d.shape
    join moved m on m.stream_id = ($3::bigint[])[d.nth]
)

-- name: fence_alone
-- What `append` begins with in a transaction that has entered.
fence as materialized (select term from shards where shard = $1 and term = $2 for share)

-- name: fence
-- What it begins with as a transaction of its own: first its turn among the chunks of all shards, then that the
-- broadcast runs, and stays so until it is committed. $11 whose turn: null for no waiting.
turn as materialized (select pg_advisory_xact_lock(%(p11)s::bigint)),
fence as materialized (
    select s.term from (select count(*) from turn) t, shards s, broadcasts b
    where s.shard = $1 and s.term = $2 and b.broadcast_id = %(p1)s and b.state = 'running' for share of s, b
)

-- name: mark
-- How far slots are, and what is counted. $1 broadcast, $2 slots, $3 last users (null: unchanged), $4 done, $5 to $10
-- counts. In a chunk that is one statement the parameters have other numbers and %(from)s names the fence.
insert into broadcast_slots as s
    (broadcast_id, slot, last_user, done, stored, delivered, queued, deferred, suppressed, failed)
select %(p1)s::uuid, t.slot, coalesce(t.last_user, ''), t.done, t.stored, t.delivered, t.queued, t.deferred,
       t.suppressed, t.failed
from %(from)s unnest(%(p2)s::smallint[], %(p3)s::text[], %(p4)s::boolean[], %(p5)s::bigint[], %(p6)s::bigint[],
                     %(p7)s::bigint[], %(p8)s::bigint[], %(p9)s::bigint[], %(p10)s::bigint[])
     as t (slot, last_user, done, stored, delivered, queued, deferred, suppressed, failed)
on conflict (broadcast_id, slot) do update
set last_user = case when excluded.last_user = '' then s.last_user else excluded.last_user end,
    done = s.done or excluded.done, stored = s.stored + excluded.stored, delivered = s.delivered + excluded.delivered,
    queued = s.queued + excluded.queued, deferred = s.deferred + excluded.deferred,
    suppressed = s.suppressed + excluded.suppressed, failed = s.failed + excluded.failed;

-- name: note_failures
-- The first $5 of a broadcast are kept. $1 broadcast, $2 users, $3 codes, $4 details, $6 now.
insert into broadcast_failures (broadcast_id, user_id, code, detail, failed_at)
select $1, t.user_id, t.code, t.detail, to_timestamp($6)
from unnest($2::text[], $3::text[], $4::text[]) as t (user_id, code, detail)
where (select count(*) from broadcast_failures f where f.broadcast_id = $1) < $5
on conflict do nothing;

-- name: finish
-- Done when all $2 slots are. $1 broadcast, $3 now.
with sums as (
    select count(*) filter (where t.done) as done, sum(t.stored) as stored, sum(t.delivered) as delivered,
           sum(t.queued) as queued, sum(t.deferred) as deferred, sum(t.suppressed) as suppressed,
           sum(t.failed) as failed
    from broadcast_slots t where t.broadcast_id = $1
)
update broadcasts b
set state = 'done', stored = s.stored, delivered = s.delivered, queued = s.queued, deferred = s.deferred,
    suppressed = s.suppressed, failed = s.failed, total = s.stored + s.failed, resumed_at = null,
    ended_at = to_timestamp($3), updated_at = to_timestamp($3),
    ran_ms = ran_ms + coalesce((extract(epoch from to_timestamp($3) - resumed_at) * 1000)::bigint, 0)
from sums s
where b.broadcast_id = $1 and b.state = 'running' and s.done = $2
returning b.broadcast_id;

-- name: tidy
-- The slots of a broadcast that is done. $1 broadcast.
delete from broadcast_slots where broadcast_id = $1;

-- name: prune
-- Broadcasts that ended before $1, some at a time; one that an erasure works on is left for the next time.
delete from broadcasts where broadcast_id in (
    select broadcast_id from broadcasts where ended_at < to_timestamp($1) limit 20 for update skip locked);
