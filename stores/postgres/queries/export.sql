-- Everything kept of a user, piece by piece. Each query answers one JSON document per row. $1 tenant, $2 user, but
-- where it says otherwise.

-- name: stream
select s.stream_id, json_build_object(
    'epoch', s.epoch, 'seq', s.seq, 'rev', s.rev, 'unread', s.unread, 'createdAt', rfc3339(s.created_at),
    'lastSeenAt', rfc3339(s.last_seen_at), 'tokensValidFrom', rfc3339(s.tokens_valid_from), 'invisibleSince', rfc3339(s.invisible_since))::text
from streams s where s.tenant = $1 and s.user_id = $2;

-- name: profile
select json_build_object(
    'email', email, 'phone', phone, 'locale', locale, 'timezone', timezone, 'attributes', attributes,
    'createdAt', rfc3339(created_at), 'updatedAt', rfc3339(updated_at))::text
from profiles where tenant = $1 and user_id = $2;

-- name: preferences
select json_build_object('version', version, 'document', document, 'updatedAt', rfc3339(updated_at))::text
from preferences where tenant = $1 and user_id = $2;

-- name: device
select json_build_object(
    'deviceId', device_id, 'platform', platform, 'provider', provider, token_kind, token, 'appId', app_id,
    'environment', environment, 'locale', locale, 'registeredAt', rfc3339(registered_at), 'disabledAt', rfc3339(disabled_at),
    'disabledReason', disabled_reason)::text
from devices where tenant = $1 and user_id = $2 order by device_id;

-- name: topic
select json_build_object('topic', topic, 'since', rfc3339(created_at))::text
from topic_subscribers where tenant = $1 and user_id = $2 order by topic;

-- name: schedule
-- Those of several users are told with this one alone.
select json_build_object(
    'scheduleId', schedule_id, 'state', state, 'rule', rule::json,
    'event', case when user_id is null then jsonb_set(event::jsonb, '{userIds}', jsonb_build_array($2::text))
                  else event::jsonb end,
    'nextAt', rfc3339(next_at), 'fired', fired, 'firedAt', rfc3339(fired_at), 'createdAt', rfc3339(created_at))::text
from schedules
where tenant = $1
  and (user_id = $2 or user_id is null and event like '%"userIds"%' and (event::jsonb -> 'userIds') ? $2::text)
order by schedule_id;

-- name: broadcastFailure
select json_build_object(
    'broadcastId', f.broadcast_id, 'code', f.code, 'detail', f.detail, 'failedAt', rfc3339(f.failed_at))::text
from broadcasts b join broadcast_failures f using (broadcast_id)
where b.tenant = $1 and f.user_id = $2 order by f.failed_at;

-- name: ticket
select json_build_object('expiresAt', rfc3339(expires_at))::text
from tickets where tenant = $1 and user_id = $2 order by expires_at;

-- name: revokedToken
-- $1 stream.
select json_build_object('tokenId', encode(token_id, 'hex'), 'expiresAt', rfc3339(expires_at))::text
from revoked_tokens where stream_id = $1 order by token_id;

-- name: amendment
-- What services did to notifications, with what was there before. $1 stream.
select json_build_object(
    'notificationId', notification_id, 'act', act, 'at', rfc3339(at), 'actor', actor, 'version', version,
    'former', case when former is not null then ('{' || former || '}')::json end)::text
from amendments where stream_id = $1 order by at, act_id;

-- name: mergedEvent
-- Events that are in notifications with others, and what was dropped because of one. $1 stream.
select json_build_object(
    'eventId', e.event_id, 'notificationId', e.notification_id, 'at', rfc3339(e.at), 'status', e.status, 'how', e.how,
    'source', e.source, 'actorId', e.actor, 'notice', e.notice)::text
from notifications n join merged_events e on e.notification_id = n.id
where n.stream_id = $1
union all
select json_build_object(
    'eventId', n.id, 'notificationId', n.id, 'at', rfc3339(to_timestamp((m.said ->> 1)::float8 / 1000)),
    'status', 'opened', 'how', split_part(m.said ->> -2, ':', 1), 'source', m.said ->> 0, 'actorId', m.said ->> 3,
    'notice', null)::text
from notifications n, lateral (select n.merging::json as said) m
where n.stream_id = $1 and n.merging is not null
  and not exists (select from merged_events e where e.event_id = n.id);

-- name: mergeWindow
-- Until when events are merged, or dropped. $1 stream.
select json_build_object(
    'notificationId', notification_id, 'key', key, 'endsAt', rfc3339(ends_at), 'events', events, 'count', count,
    'notifiedAt', rfc3339(notified_at))::text
from merge_windows where stream_id = $1
union all
select json_build_object(
    'notificationId', n.id, 'key', m.said ->> k.nth,
    'endsAt', rfc3339(to_timestamp((m.at_ms + (m.said ->> k.nth + 1)::float8) / 1000)), 'events', 1, 'count', 1,
    'notifiedAt', rfc3339(to_timestamp((m.at_ms + (m.said ->> 2)::float8) / 1000)))::text
from notifications n,
    lateral (select n.merging::json as said, (n.merging::json ->> 1)::float8 as at_ms) m,
    lateral (select 4 as nth where n.merge_slot is not null union all select 6 where n.merge_slot_2 is not null) k
where n.stream_id = $1 and n.merging is not null
  and not exists (select from merge_windows w
                  where w.stream_id = n.stream_id and w.key = m.said ->> k.nth and w.notification_id = n.id);

-- name: idempotencyKey
-- $1 stream, $2 oldest living creation time (seconds).
select json_build_object('key', k.key, 'notificationId', k.notification_id, 'createdAt', rfc3339(k.created_at))::text
from notifications n join idempotency_keys k on k.notification_id = n.id
where n.stream_id = $1 and k.created_at >= to_timestamp($2)
union all
select json_build_object('key', k.key, 'notificationId', n.id, 'createdAt', rfc3339(k.created_at))::text
from notifications n join merged_events e on e.notification_id = n.id
join idempotency_keys k on k.notification_id = e.event_id
where n.stream_id = $1 and e.event_id <> n.id and k.created_at >= to_timestamp($2);

-- name: notifications
-- A page with all that hangs on it. $1 stream, $2 after seq, $3 limit.
with page as materialized (
    select * from notifications where stream_id = $1 and seq > $2 order by seq limit $3)
select %(row)s, n.decision, n.receipt, n.kept, (extract(epoch from n.created_at) * 1000)::bigint as created_ms,
       (select json_build_object('template', e.template_id, 'version', e.version, 'variant', e.variant)::text
        from template_exposures e where e.notification_id = n.id) as exposure,
       array(select json_build_object(
                 'channel', d.channel, 'state', d.state, 'attempts', d.attempts, 'reason', d.reason, 'dueAt', rfc3339(d.due_at),
                 'createdAt', rfc3339(d.created_at), 'updatedAt', rfc3339(d.updated_at),
                 'tries', (select coalesce(json_agg(json_build_object(
                               'attempt', a.attempt, 'deviceId', a.device_id, 'provider', a.provider,
                               'outcome', a.outcome, 'providerId', a.provider_id, 'status', a.status,
                               'error', a.error, 'startedAt', rfc3339(a.started_at), 'durationMs', a.duration_ms)
                               order by a.attempt, a.device_id), '[]')
                           from delivery_attempts a where a.delivery_id = d.id))::text
             from deliveries d where d.notification_id = n.id order by d.created_at, d.id) as deliveries
from page n
order by n.seq;
