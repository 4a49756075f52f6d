-- Audiences, slot by slot. Every page walks an index in its order and ends after $4 rows.
-- $1 tenant, $2 slot, $3 after this user ("" from the start), $4 limit, $5 platforms (null: any or none).

-- name: all
-- Every user that is known: who has a stream or a profile.
(select s.user_id from streams s
 where s.tenant = $1 and s.slot = $2::smallint and s.user_id > $3 and %(reachable)s
 order by s.user_id limit $4)
union
(select s.user_id from profiles s
 where s.tenant = $1 and s.slot = $2::smallint and s.user_id > $3 and %(reachable)s
 order by s.user_id limit $4)
order by user_id limit $4;

-- name: topic
-- $6 topic.
select s.user_id from topic_subscribers s
where s.tenant = $1 and s.topic = $6 and s.slot = $2::smallint and s.user_id > $3 and %(reachable)s
order by s.user_id limit $4;

-- name: reachable
-- A condition of the others: the user has a push target on one of the platforms. As a subquery for each user that is
-- read: `exists` may be turned into reading every device there is.
($5::text[] is null or (
    select true from devices d
    where d.tenant = $1 and d.user_id = s.user_id and d.platform = any ($5::text[]) and d.disabled_at is null
    limit 1));

-- name: segment
-- $6 segment. Of every user of the slot it is looked whether it fits, until the page is full.
select s.user_id
from segments g
cross join lateral (
    select a.user_id from streams a where a.tenant = $1 and a.slot = $2::smallint and a.user_id > $3
    union
    select a.user_id from profiles a where a.tenant = $1 and a.slot = $2::smallint and a.user_id > $3
) s
where g.tenant = $1 and g.segment_id = $6 and %(reachable)s
  and jsonb_path_match(%(document)s, g.path, g.vars, true)
order by s.user_id limit $4;

-- name: segment_count
-- Of so many users of some slots how many fit. $1 tenant, $2 slots, $3 path, $4 variables, $5 whether it asks for
-- platforms.
select count(*) as users,
       count(*) filter (where jsonb_path_match(%(document)s, g.path, g.vars, true)) as fitting
from (select $3::text::jsonpath as path, $4::jsonb as vars, $5::boolean as platform) g
cross join lateral (
    select a.user_id from streams a where a.tenant = $1 and a.slot = any ($2::smallint[])
    union
    select a.user_id from profiles a where a.tenant = $1 and a.slot = any ($2::smallint[])
) s;

-- name: document
-- A user as filters see it. Members that nobody knows are left out.
(select jsonb_strip_nulls(jsonb_build_object(
            'locale', p.locale, 'timezone', p.timezone,
            'lastSeenAgoS', extract(epoch from now() - t.last_seen_at),
            'platform', case when g.platform then (
                select jsonb_agg(distinct d.platform) from devices d
                where d.tenant = $1 and d.user_id = s.user_id and d.disabled_at is null) end))
        || jsonb_build_object('attributes', coalesce(p.attributes, '{}'))
 from (select 1) one
 left join profiles p on p.tenant = $1 and p.user_id = s.user_id
 left join streams t on t.tenant = $1 and t.user_id = s.user_id);
