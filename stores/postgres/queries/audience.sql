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
