-- What the ingress reads of a user. Reads only: every write goes through the shard that owns the user.
--
-- The stream is found by a scalar subquery (unique index on tenant and user), so that one round trip serves a
-- page, and the planner sees `stream_id = constant` and walks an index of every month's partition in order.
-- `%(row)s` is the column list of a NotificationRow (stores/postgres/feed.py).
-- Times are parameters in seconds since the epoch.

-- name: feed
-- One page, newest first. $1 tenant, $2 user, $3 below this position, $4 now, $5 limit, $6 type, $7 category,
-- $8 true: only read ones. `place` is where the stream stood in the same snapshot. Index: notifications_feed.
select %(row)s, (select s.rev || ' ' || s.epoch from streams s where s.tenant = $1 and s.user_id = $2) as place
from notifications n
where n.stream_id = (select s.stream_id from streams s where s.tenant = $1 and s.user_id = $2)
  and n.position < $3
  and n.archived_at is null and n.dismissed_at is null and n.retracted_at is null
  and (n.expires_at is null or n.expires_at > to_timestamp($4::float8))
  and ($6::text is null or n.type = $6)
  and ($7::text is null or n.category = $7)
  and (not $8::boolean or n.read_at is not null)
order by n.position desc
limit $5;

-- name: feed_unread
-- The same for unread ones; without $8's filter. Index: notifications_unread, which holds only these.
select %(row)s
from notifications n
where n.stream_id = (select s.stream_id from streams s where s.tenant = $1 and s.user_id = $2)
  and n.position < $3
  and n.read_at is null
  and n.archived_at is null and n.dismissed_at is null and n.retracted_at is null
  and (n.expires_at is null or n.expires_at > to_timestamp($4::float8))
  and ($6::text is null or n.type = $6)
  and ($7::text is null or n.category = $7)
  and not $8::boolean
order by n.position desc
limit $5;

-- name: feed_archived
-- What the user put away (archived or dismissed), newest first; withdrawn ones stay away for good.
select %(row)s
from notifications n
where n.stream_id = (select s.stream_id from streams s where s.tenant = $1 and s.user_id = $2)
  and n.position < $3
  and (n.archived_at is not null or n.dismissed_at is not null) and n.retracted_at is null
  and (n.expires_at is null or n.expires_at > to_timestamp($4::float8))
  and ($6::text is null or n.type = $6)
  and ($7::text is null or n.category = $7)
  and (not $8::boolean or n.read_at is not null)
order by n.position desc
limit $5;

-- name: head
-- Where a stream stands. The stored counter knows no time: unread rows that expired since are taken off
-- (index notifications_expiring holds just the unread ones that can). $1 tenant, $2 user, $3 now.
select s.stream_id, s.epoch, s.seq, s.rev, s.pruned_rev,
       greatest(0, s.unread - (
           select count(*) from notifications n
           where n.stream_id = s.stream_id and n.read_at is null and n.expires_at <= to_timestamp($3::float8)
             and n.archived_at is null and n.dismissed_at is null and n.retracted_at is null))::bigint as unread
from streams s
where s.tenant = $1 and s.user_id = $2;

-- name: counted
-- The same with what a cached count needs: unread rows that have expired, and when the next one will.
-- $1 tenant, $2 user, $3 now. Index: notifications_expiring.
select s.stream_id, s.epoch, s.seq, s.rev, s.pruned_rev, s.unread::bigint as unread,
       (select count(*) from notifications n
        where n.stream_id = s.stream_id and n.read_at is null and n.expires_at <= to_timestamp($3::float8)
          and n.archived_at is null and n.dismissed_at is null and n.retracted_at is null) as expired,
       (select (extract(epoch from n.expires_at) * 1000)::bigint from notifications n
        where n.stream_id = s.stream_id and n.read_at is null and n.expires_at > to_timestamp($3::float8)
          and n.archived_at is null and n.dismissed_at is null and n.retracted_at is null
        order by n.expires_at limit 1) as next_ms
from streams s
where s.tenant = $1 and s.user_id = $2;

-- name: standings
-- Is what is cached of users still true? $1 tenants, $2 users: where their streams stand. $3 notifications, $4
-- whose they are (1 is the first user): was one of them acknowledged? That moves no rev.
-- `limit` keeps the planner from joining whole tables: a look into an index for each.
with acknowledged as materialized (
    select t.at
    from unnest($3::uuid[], $4::bigint[]) as t (id, at)
    cross join lateral (select n.delivered_at from notifications n where n.id = t.id limit 1) n
    where n.delivered_at is not null
)
select s.epoch, s.rev, s.unread::bigint as unread, a.at = any (array(select k.at from acknowledged k)) as acknowledged
from unnest($1::text[], $2::text[]) with ordinality as a (tenant, user_id, at)
left join lateral (
    select t.epoch, t.rev, t.unread from streams t where t.tenant = a.tenant and t.user_id = a.user_id limit 1
) s on true
order by a.at;

-- name: notifications_after
-- Catching up: $1 stream, $2 after seq, $3 limit. All rows, so that a gap shows. Index: notifications_seq.
select %(row)s
from notifications n
where n.stream_id = $1 and n.seq > $2
order by n.seq
limit $3;

-- name: changes_after
-- Catching up on changes of rows the client has: $1 stream, $2 after rev, $3 up to this seq, $4 limit.
-- Index: notifications_changed.
select %(row)s
from notifications n
where n.stream_id = $1 and n.changed and n.rev > $2 and n.seq <= $3
order by n.rev, n.seq
limit $4;

-- name: notification
-- One notification of a tenant by id: the partition is pruned by the id. $1 id, $2 tenant.
select %(row)s, s.user_id, n.decision, n.receipt, n.priority, coalesce(n.version, 1) as version,
       (extract(epoch from n.cancelled_at) * 1000)::bigint as cancelled_ms, n.merging, n.merge_slot, n.merge_slot_2,
       n.kept, (extract(epoch from n.created_at) * 1000)::bigint as created_ms
from notifications n
join streams s on s.stream_id = n.stream_id
where n.id = $1 and s.tenant = $2;

-- name: owner
-- Whose a notification of a tenant is. $1 id, $2 tenant.
select s.user_id from notifications n join streams s on s.stream_id = n.stream_id
where n.id = $1 and s.tenant = $2;

-- name: acts
-- What its service did to a notification, in order. $1 notification.
select a.act, (extract(epoch from a.at) * 1000)::bigint as at_ms, a.actor, a.version, a.former
from amendments a
where a.notification_id = $1
order by a.at, a.version nulls last, a.act_id;

-- name: archived
-- Whether a notification that is not here may be in the archive, and in which month. $1 tenant, $2 id.
select month from archive_parts
where state = 'complete' and tenant = $1 and first_id <= $2 and last_id >= $2 limit 1;

-- name: merged
-- The events of a notification, the newest first, and how many there are. $1 notification, $2 limit.
select e.event_id, (extract(epoch from e.at) * 1000)::bigint as at_ms, e.status, e.how, e.source, e.actor, e.notice,
       count(*) filter (where e.status = 'merged') over () as merged,
       count(*) filter (where e.status = 'duplicate') over () as duplicates
from merged_events e
where e.notification_id = $1
order by e.at desc, e.event_id desc
limit $2;

-- name: merge_windows
-- The windows of a notification, with their first event as far as it is still known. $1 notification.
select w.key, split_part(w.key, ':', 1) as how, o.began_ms, (extract(epoch from w.ends_at) * 1000)::bigint as ends_ms,
       o.source, w.events, w.count, (extract(epoch from w.notified_at) * 1000)::bigint as notified_ms
from notifications n
join merge_windows w on w.stream_id = n.stream_id and w.notification_id = n.id
left join lateral (
    select (extract(epoch from e.at) * 1000)::bigint as began_ms, e.source from merged_events e
    where e.notification_id = n.id and e.status = 'opened'
    limit 1
) o on true
where n.id = $1
order by w.ends_at, w.key;

-- name: deliveries
-- The external deliveries of a notification with their tries, as rows. $1 notification.
select d.id, d.channel, d.state, d.attempts, d.reason, d.chain, d.step, d.digest, d.carrier,
       (extract(epoch from d.due_at) * 1000)::bigint as due_ms,
       (extract(epoch from d.created_at) * 1000)::bigint as created_ms,
       (extract(epoch from d.updated_at) * 1000)::bigint as updated_ms,
       a.attempt, a.device_id, a.provider, a.outcome, a.provider_id, a.status, a.error, a.duration_ms,
       (extract(epoch from a.started_at) * 1000)::bigint as started_ms
from deliveries d
left join delivery_attempts a on a.delivery_id = d.id
where d.notification_id = $1
order by d.created_at, d.step, d.id, a.attempt, a.device_id;

-- name: device
-- One push target. $1 tenant, $2 user, $3 device.
select d.device_id, d.platform, d.provider, d.token_kind, d.token, d.app_id, d.environment, d.locale,
       (extract(epoch from d.registered_at) * 1000)::bigint as registered_ms,
       (extract(epoch from d.disabled_at) * 1000)::bigint as disabled_ms, d.disabled_reason
from devices d
where d.tenant = $1 and d.user_id = $2 and d.device_id = $3;

-- name: targets
-- Where pushes of a user may go, with the platforms. $1 tenant, $2 user.
select d.device_id, d.platform, d.provider
from devices d
where d.tenant = $1 and d.user_id = $2 and d.disabled_at is null
order by d.device_id;

-- name: preferences
-- The stored document and its version. $1 tenant, $2 user.
select p.document::text as document, p.version from preferences p where p.tenant = $1 and p.user_id = $2;

-- name: ping
-- Does Postgres answer, and is the schema there?
select count(*) from (select 1 from tenants limit 1) as t;
