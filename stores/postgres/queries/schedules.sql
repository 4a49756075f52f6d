-- What is to be sent later. Times are parameters in seconds since the epoch.

-- name: add
-- Schedules; those whose key is known already are left out, `known` says which they are.
-- $1 tenant, $2 ids, $3 slots, $4 users, $5 rules, $6 events, $7 single, $8 next, $9 due, $10 keys, $11 hashes, $12 zones.
insert into schedules
    (tenant, schedule_id, slot, user_id, rule, event, single, next_at, due_at, idempotency_key, body_hash, zone)
select $1, t.id, t.slot, t.user_id, t.rule, t.event, t.single, to_timestamp(t.next_s), to_timestamp(t.due_s), t.key,
       t.hash, t.zone
from unnest($2::uuid[], $3::smallint[], $4::text[], $5::text[], $6::text[], $7::boolean[], $8::float8[], $9::float8[],
            $10::text[], $11::bytea[], $12::text[])
     as t (id, slot, user_id, rule, event, single, next_s, due_s, key, hash, zone)
order by t.key
on conflict (tenant, idempotency_key) where idempotency_key is not null do nothing
returning schedule_id;

-- name: known
-- What keys stand for. $1 tenant, $2 keys.
select idempotency_key, schedule_id, body_hash from schedules
where tenant = $1 and idempotency_key = any ($2::text[]);

-- name: schedule
-- $1 tenant, $2 id.
select %(row)s from schedules where tenant = $1 and schedule_id = $2;

-- name: schedules
-- By id, newest first. $1 tenant, $2 user (null: all), $3 state (null: all), $4 before this id, $5 limit.
select %(row)s from schedules
where tenant = $1 and ($2::text is null or user_id = $2) and ($3::text is null or state = $3)
  and ($4::uuid is null or schedule_id < $4)
order by schedule_id desc limit $5;

-- name: cancel
-- A row comes back if it was active. $1 tenant, $2 id, $3 now.
update schedules set state = 'cancelled', updated_at = to_timestamp($3)
where tenant = $1 and schedule_id = $2 and state = 'active'
returning schedule_id;

-- name: zone
-- The time zone of a user: own preferences, the profile, the tenant's default, null. $1 tenant, $2 user.
select coalesce((select p.document ->> 'timezone' from preferences p where p.tenant = t.tenant and p.user_id = $2),
                (select p.timezone from profiles p where p.tenant = t.tenant and p.user_id = $2),
                t.settings #>> '{policy,defaults,timezone}') as zone
from tenants t where t.tenant = $1;

-- name: any_due
-- Whether a claim finds something. $1 slots, $2 now.
select exists (
    select from schedules where state = 'active' and due_at <= to_timestamp($2) and slot = any ($1::smallint[]));

-- name: claim
-- What is due in the slots of this shard, claimed until $6 (a lapsed claim is due again). $1 shard, $2 term, $3 slots,
-- $4 now, $5 limit.
with fence as materialized (select term from shards where shard = $1 and term = $2 for share),
due as materialized (
    select tenant, schedule_id from schedules
    where state = 'active' and due_at <= to_timestamp($4) and slot = any ($3::smallint[])
    order by due_at
    limit $5
    for update skip locked
)
update schedules s set claim = s.claim + 1, due_at = to_timestamp($6)
from fence, due d
where s.tenant = d.tenant and s.schedule_id = d.schedule_id
returning s.tenant, s.schedule_id, s.user_id, s.rule, s.event, s.single, s.claim, s.zone,
          (extract(epoch from s.next_at) * 1000)::bigint as next_ms;

-- name: settle
-- What became of a claim; one made again since, or cancelled, is left alone. Answers the fence.
-- $3 tenant, $4 id, $5 claim, $6 state, $7 next, $8 due, $9 fired, $10 missed, $11 result, $12 now, $13 zone.
with fence as materialized (select term from shards where shard = $1 and term = $2 for share),
done as (
    update schedules s
    set state = $6, next_at = to_timestamp($7), due_at = to_timestamp($8), fired = s.fired + $9, missed = s.missed + $10,
        fired_at = case when $9 > 0 then to_timestamp($12) else s.fired_at end, result = coalesce($11, s.result),
        updated_at = to_timestamp($12), zone = $13
    from fence
    where s.tenant = $3 and s.schedule_id = $4 and s.claim = $5 and s.state = 'active'
    returning s.claim
)
select (select count(*) from fence) as fenced, (select count(*) from done) as done;

-- name: prune
-- Schedules that ended before $1, some at a time.
delete from schedules where (tenant, schedule_id) in (
    select tenant, schedule_id from schedules where state <> 'active' and updated_at < to_timestamp($1) limit 1000
    for update skip locked);
