-- Who subscribes to what.

-- name: subscribe
-- Answers how many did not yet. $1 tenant, $2 topic, $3 users, $4 slots, $5 now (seconds).
with added as (
    insert into topic_subscribers (tenant, topic, slot, user_id, created_at)
    select $1, $2, t.slot, t.user_id, to_timestamp($5)
    from unnest($3::text[], $4::smallint[]) as t (user_id, slot)
    order by t.slot, t.user_id
    on conflict do nothing
    returning 1
)
select count(*) from added;

-- name: subscribe_oneself
-- The same for one user of whom at most $6 subscriptions are kept: -1 if that is too many.
with mine as (select count(*) as n, coalesce(bool_or(topic = $2), false) as has
              from topic_subscribers where tenant = $1 and user_id = $3),
added as (
    insert into topic_subscribers (tenant, topic, slot, user_id, created_at)
    select $1, $2, $4::smallint, $3, to_timestamp($5) from mine where mine.n < $6 and not mine.has
    on conflict do nothing
    returning 1
)
select case when mine.n >= $6 and not mine.has then -1 else (select count(*) from added) end from mine;

-- name: unsubscribe
-- $1 tenant, $2 topic, $3 slot, $4 user.
delete from topic_subscribers where tenant = $1 and topic = $2 and slot = $3::smallint and user_id = $4
returning user_id;

-- name: subscriber
-- Since when. $1 tenant, $2 topic, $3 slot, $4 user.
select (extract(epoch from created_at) * 1000)::bigint
from topic_subscribers where tenant = $1 and topic = $2 and slot = $3::smallint and user_id = $4;

-- name: subscribers
-- A page, in the order of the key. $1 tenant, $2 topic, $3 slot and $4 user of the last before, $5 limit.
select slot, user_id, (extract(epoch from created_at) * 1000)::bigint as since_ms
from topic_subscribers
where tenant = $1 and topic = $2 and (slot, user_id) > ($3::smallint, $4)
order by slot, user_id limit $5;

-- name: topics_of
-- $1 tenant, $2 user, $3 the last topic before, $4 limit.
select topic, (extract(epoch from created_at) * 1000)::bigint as since_ms
from topic_subscribers where tenant = $1 and user_id = $2 and topic > $3
order by topic limit $4;
