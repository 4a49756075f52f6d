-- Deliveries that were given up (stores/postgres/dead_letters.py). Reads of the ingress only: a replay is a
-- write of the shard that owns the user. Newest first; both indexes hold dead rows alone.

-- name: page
-- $1 tenant, $2 user, $3 at or after (s), $4 and $5 below this (us, id), $6 limit, $7 type, $8 channel, $9 text of
-- the reason in lower case. What it is of comes from `of_tenant` or `of_user`.
select %(row)s
from deliveries d
join streams s on s.stream_id = d.stream_id
join notifications n on n.id = d.notification_id
where d.state = 'dead' and %(of)s
  and d.updated_at >= to_timestamp($3::float8)
  and (d.updated_at, d.id) < (timestamptz 'epoch' + $4::bigint * interval '1 microsecond', $5::bigint)
  and ($7::text is null or n.type = $7)
  and ($8::text is null or d.channel = $8)
  and ($9::text is null or strpos(lower(d.reason), $9) > 0)
order by d.updated_at desc, d.id desc
limit $6;

-- name: of_tenant
-- All users. Index: deliveries_dead.
d.tenant = $1 and $2::text is null

-- name: of_user
-- One user. Index: deliveries_dead_stream.
d.stream_id = (select u.stream_id from streams u where u.tenant = $1 and u.user_id = $2)

-- name: some
-- Those of a tenant among these ids. $1 tenant, $2 ids.
select %(row)s
from deliveries d
join streams s on s.stream_id = d.stream_id
join notifications n on n.id = d.notification_id
where d.id = any ($2::bigint[]) and d.state = 'dead' and d.tenant = $1;

-- name: attempts
-- Every try of a delivery. $1 delivery.
select a.attempt, a.device_id, a.provider, a.outcome, a.provider_id, a.status, a.error, a.duration_ms,
       (extract(epoch from a.started_at) * 1000)::bigint as started_ms
from delivery_attempts a
where a.delivery_id = $1
order by a.attempt, a.device_id;
