-- What is kept of users as such: profiles, erasure, export. Times are parameters in seconds since the epoch.

-- name: profile
-- A user who is known, with or without a profile. $1 tenant, $2 user.
select p.email, p.phone, p.locale, p.timezone, p.attributes::text as attributes,
       (extract(epoch from least(s.created_at, p.created_at)) * 1000)::bigint as created_ms,
       (extract(epoch from p.updated_at) * 1000)::bigint as updated_ms,
       (extract(epoch from s.last_seen_at) * 1000)::bigint as last_seen_ms
from (select 1) as one
left join streams s on s.tenant = $1 and s.user_id = $2
left join profiles p on p.tenant = $1 and p.user_id = $2
where s.user_id is not null or p.user_id is not null;

-- name: put_profile
-- Answers the fence. $1 shard, $2 term, $3 tenant, $4 user, $5 slot, $6 email, $7 phone, $8 locale, $9 timezone,
-- $10 attributes, $11 now.
with fence as materialized (select term from shards where shard = $1 and term = $2 for share),
put as (
    insert into profiles
        (tenant, user_id, slot, email, phone, locale, timezone, attributes, created_at, updated_at)
    select $3, $4, $5::smallint, $6, $7, $8, $9, $10::jsonb, to_timestamp($11), to_timestamp($11) from fence
    on conflict (tenant, user_id) do update
        set email = excluded.email, phone = excluded.phone, locale = excluded.locale, timezone = excluded.timezone,
            attributes = excluded.attributes, updated_at = excluded.updated_at
)
select count(*) from fence;

-- name: fence
-- $1 shard, $2 term.
select term from shards where shard = $1 and term = $2 for share;

-- name: lock_lists
-- Broadcasts and schedules that name the user, locked in an order before the stream is: a chunk of a broadcast locks its
-- broadcast and then streams, and two that wait for one another would end one of them. $1 tenant, $2 user.
with of_schedules as materialized (
    select schedule_id from schedules
    where tenant = $1 and user_id is null and event like '%"userIds"%' and (event::jsonb -> 'userIds') ? $2::text
    order by schedule_id for no key update
),
of_broadcasts as materialized (
    select broadcast_id from broadcasts
    where tenant = $1 and audience like '%"userIds"%' and (audience::jsonb -> 'userIds') ? $2::text
    order by broadcast_id for no key update
)
select array(select schedule_id from of_schedules) as schedules,
       array(select broadcast_id from of_broadcasts) as broadcasts;

-- name: missed_lists
-- Whether more of them name the user by now. $1 tenant, $2 user, $3 schedules, $4 broadcasts that are locked.
select exists (select from schedules
               where tenant = $1 and user_id is null and event like '%"userIds"%'
                 and (event::jsonb -> 'userIds') ? $2::text and schedule_id <> all ($3::uuid[]))
    or exists (select from broadcasts
               where tenant = $1 and audience like '%"userIds"%' and (audience::jsonb -> 'userIds') ? $2::text
                 and broadcast_id <> all ($4::uuid[]));

-- name: lock_stream
-- Whoever appends waits until the erasure is through, and then finds no stream. $1 tenant, $2 user.
select stream_id from streams where tenant = $1 and user_id = $2 for update;

-- name: erase
-- Everything that has the user's name on it, in one statement; what hangs on the stream has no owner any more and
-- goes in pieces (`purge`). $1 tenant, $2 user, $3 slot, $4 stream (null: none), $5 now, $6 schedules and $7 broadcasts
-- that are locked: what came to name the user after that came after the erasure.
with gone_stream as (delete from streams where tenant = $1 and user_id = $2 returning 1),
gone_devices as (delete from devices where tenant = $1 and user_id = $2 returning 1),
gone_preferences as (delete from preferences where tenant = $1 and user_id = $2 returning 1),
gone_profile as (delete from profiles where tenant = $1 and user_id = $2 returning 1),
gone_topics as (delete from topic_subscribers where tenant = $1 and user_id = $2 returning 1),
gone_tickets as (delete from tickets where tenant = $1 and user_id = $2 returning 1),
gone_schedules as (delete from schedules where tenant = $1 and user_id = $2 returning 1),
left_schedules as (  -- those for several go on without this one
    update schedules s
    set event = jsonb_set(s.event::jsonb, '{userIds}', (s.event::jsonb -> 'userIds') - $2::text)::text,
        state = case when s.state = 'active' and jsonb_array_length((s.event::jsonb -> 'userIds') - $2::text) = 0
                     then 'cancelled' else s.state end,
        updated_at = to_timestamp($5)
    where s.tenant = $1 and s.schedule_id = any ($6::uuid[])
    returning 1
),
gone_failures as (
    delete from broadcast_failures f using broadcasts b
    where b.tenant = $1 and f.broadcast_id = b.broadcast_id and f.user_id = $2 returning 1
),
left_broadcasts as (
    update broadcasts b
    set audience = jsonb_set(b.audience::jsonb, '{userIds}', (b.audience::jsonb -> 'userIds') - $2::text)::text,
        state = case when o.over then 'cancelled' else b.state end,
        ended_at = case when o.over then to_timestamp($5) else b.ended_at end,
        resumed_at = case when o.over then null else b.resumed_at end,
        ran_ms = b.ran_ms + case when o.over
            then coalesce((extract(epoch from to_timestamp($5) - b.resumed_at) * 1000)::bigint, 0) else 0 end
    from (select broadcast_id,
                 state in ('scheduled', 'running', 'paused')
                     and jsonb_array_length((audience::jsonb -> 'userIds') - $2::text) = 0 as over
          from broadcasts
          where tenant = $1 and broadcast_id = any ($7::uuid[])) as o
    where b.broadcast_id = o.broadcast_id
    returning 1
),
asked_archive as (  -- files are written anew without the user soon after (actors/archive_job.py)
    insert into archive_erasures (tenant, user_id)
    select $1, $2::text where exists (select from archive_parts p where p.tenant = $1)
    on conflict (tenant, user_id) do update set asked_at = now()
),
found as (
    select (select count(*) from gone_stream) + (select count(*) from gone_devices)
         + (select count(*) from gone_preferences) + (select count(*) from gone_profile)
         + (select count(*) from gone_topics) + (select count(*) from gone_tickets)
         + (select count(*) from gone_schedules) + (select count(*) from left_schedules)
         + (select count(*) from gone_failures) + (select count(*) from left_broadcasts) as n
)
insert into erasures (tenant, user_hash, slot, stream_id, erased_at)
select $1, sha256(convert_to($2::text, 'UTF8')), $3::smallint, $4, to_timestamp($5) from found where n > 0
returning erasure_id;

-- name: erasures_of
-- Those of a user that are under way, or were done since $3. $1 tenant, $2 user.
select erasure_id, stream_id, done_at is null as open from erasures
where tenant = $1 and user_hash = sha256(convert_to($2::text, 'UTF8'))
  and (done_at is null or erased_at >= to_timestamp($3))
order by erasure_id;

-- name: open_erasures
-- $1 slots, $2 limit.
select erasure_id, stream_id from erasures where done_at is null and slot = any ($1::smallint[])
order by erasure_id limit $2;

-- name: purge_keys
-- Idempotency keys that stand for notifications of a stream. $1 stream, $2 oldest living creation time.
with of_events as (  -- that were merged into notifications of the stream
    delete from idempotency_keys k using notifications n join merged_events e on e.notification_id = n.id
    where n.stream_id = $1 and k.notification_id = e.event_id and e.event_id <> n.id
      and k.created_at >= to_timestamp($2)
)
delete from idempotency_keys k using notifications n
where n.stream_id = $1 and k.notification_id = n.id and k.created_at >= to_timestamp($2);

-- name: purge
-- Some notifications of a stream without owner, with all that hangs on them; answers how many. $1 stream, $2 limit.
with page as materialized (select id from notifications where stream_id = $1 order by seq limit $2),
gone_deliveries as (
    delete from deliveries where notification_id = any (array(select id from page)) returning id),
gone_attempts as (delete from delivery_attempts where delivery_id = any (array(select id from gone_deliveries))),
gone_exposures as (delete from template_exposures where notification_id = any (array(select id from page))),
gone_merged as (delete from merged_events where notification_id = any (array(select id from page))),
gone as (delete from notifications where id = any (array(select id from page)) returning 1)
select count(*) from gone;

-- name: finish
-- The rest of an erasure. $1 erasure, $2 stream, $3 now.
with gone_tokens as (delete from revoked_tokens where stream_id = $2),
gone_amendments as (delete from amendments where stream_id = $2),
gone_windows as (delete from merge_windows where stream_id = $2),
gone_progress as (delete from search_progress where stream_id = $2)
update erasures set done_at = to_timestamp($3), stream_id = null where erasure_id = $1;

-- name: prune_erasures
-- Erasures done before $1: tokens from before have ended by themselves.
delete from erasures where erasure_id = any (
    array(select erasure_id from erasures where done_at < to_timestamp($1) limit 1000));
