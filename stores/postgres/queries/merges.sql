-- Events that become part of a notification that is there already (carillon/merging.py). Read and written by the
-- writer of the owning shard on its one connection; times are parameters in seconds since the epoch.
-- As in shard.sql, `state || ''` keeps generic plans from reading all that is pending.

-- name: find_windows
-- Windows that have not ended, with their notifications: those that have rows, and those of which only the notification
-- tells, by the slots in which they would be (carillon/merge_begun.py). $1 streams, $2 keys, $3 now, $4,$5 slots.
with asked as materialized (
    select * from unnest($1::bigint[], $2::text[], $4::bigint[], $5::bigint[]) as t (stream_id, key, today, tomorrow)
)
select w.stream_id, w.key, (extract(epoch from w.ends_at) * 1000)::bigint as ends_ms, w.events, w.count,
       (extract(epoch from w.notified_at) * 1000)::bigint as notified_ms, n.priority,
       n.cancelled_at is not null as cancelled, null as merging, %(row)s
from asked t
join merge_windows w on w.stream_id = t.stream_id and w.key = t.key
join notifications n on n.id = w.notification_id and n.stream_id = w.stream_id
where w.ends_at > to_timestamp($3)
union all
select n.stream_id, t.key, null, 1, 1, null, n.priority, n.cancelled_at is not null, n.merging, %(row)s
from asked t
join notifications n on n.stream_id = t.stream_id and n.merge_slot = any (array[t.today, t.tomorrow])
union all
select n.stream_id, t.key, null, 1, 1, null, n.priority, n.cancelled_at is not null, n.merging, %(row)s
from asked t
join notifications n on n.stream_id = t.stream_id and n.merge_slot_2 = any (array[t.today, t.tomorrow]);

-- name: open_windows
-- Windows of streams that may not have ended, as above; of each stream at most $3 of each kind. $1 streams, $2 now,
-- $4,$5 least and greatest slot.
select t.stream_id, w.key, (extract(epoch from w.ends_at) * 1000)::bigint as ends_ms, null as merging
from unnest($1::bigint[]) as t (stream_id),
    lateral (select * from merge_windows w where w.stream_id = t.stream_id and w.ends_at > to_timestamp($2)
             limit $3) w
union all
select t.stream_id, null, null, n.merging
from unnest($1::bigint[]) as t (stream_id),
    lateral (select n.merging from notifications n
             where n.stream_id = t.stream_id and n.merge_slot between $4 and $5
             limit $3) n
union all
select t.stream_id, null, null, n.merging
from unnest($1::bigint[]) as t (stream_id),
    lateral (select n.merging from notifications n
             where n.stream_id = t.stream_id and n.merge_slot_2 between $4 and $5
             limit $3) n;

-- name: leave_windows
-- Windows without rows whose keys began anew with other notifications: they are found no more. $1 notifications,
-- $2 slots.
update notifications n
set merge_slot = nullif(n.merge_slot, t.slot), merge_slot_2 = nullif(n.merge_slot_2, t.slot)
from unnest($1::uuid[], $2::bigint[]) as t (id, slot)
where n.id = t.id;

-- name: find_actors
-- Which actors are counted in which notifications. $1 notifications, $2 actors.
select distinct e.notification_id, e.actor
from unnest($1::uuid[], $2::text[]) as t (notification_id, actor)
join merged_events e on e.notification_id = t.notification_id and e.actor = t.actor;

-- name: find_locales
-- The language of users: that of the device registered last that names one, else of the profile. $1 streams.
select s.stream_id, coalesce(
           (select d.locale from devices d
            where d.tenant = s.tenant and d.user_id = s.user_id and d.locale is not null
            order by d.registered_at desc limit 1),
           (select p.locale from profiles p where p.tenant = s.tenant and p.user_id = s.user_id)) as locale
from streams s
where s.stream_id = any ($1::bigint[]);

-- name: find_merged
-- What became of events that are no notifications of their own. $1 ids of events.
select e.event_id, e.notification_id, e.stream_id, e.status, n.seq
from unnest($1::uuid[]) as t (id)
join merged_events e on e.event_id = t.id
join notifications n on n.id = e.notification_id
where e.status <> 'opened';

-- name: merge_events
-- The part of a group commit that changes rows: they get the stream's next revs, in the order given. $3,$4 streams
-- and how many of their rows change; $5..$13 those rows, `back` counting from the stream's last; $14..$20 windows;
-- $21..$28 events; $29..$39 pushes, one per notification and channel: one that waits already, untried, takes over
-- what is new, else it is planned, and ends one that would be tried again after it. $40 now, $41 the digests they wait
-- in: one that was to come earlier stays where it waits; $42 since when events that began notifications are in them:
-- these are written late, if they are not there. Of streams that are gone nothing is written or answered.
with fence as materialized (select term from shards where shard = $1 and term = $2 for share),
living as materialized (  -- an erasure waits for us, or has taken the stream
    select s.stream_id from fence, streams s
    where s.stream_id = any ($3::bigint[] || $14::bigint[] || $23::bigint[] || $31::bigint[])
    for key share of s
),
moved as (
    update streams s set rev = s.rev + u.n
    from living l join unnest($3::bigint[], $4::int[]) as u (stream_id, n) using (stream_id)
    where s.stream_id = l.stream_id
    returning s.stream_id, s.seq, s.rev, s.unread
),
updated as (
    update notifications n
    set rev = m.rev - t.back, position = case when t.top then m.rev - t.back else n.position end, changed = true,
        content = t.content, priority = t.priority, type = t.type, category = t.category,
        expires_at = to_timestamp(t.expires_s), version = coalesce(n.version, 1) + 1, updated_at = to_timestamp($40)
    from unnest($5::uuid[], $6::bigint[], $7::int[], $8::text[], $9::smallint[], $10::text[], $11::text[],
                $12::float8[], $13::boolean[])
         as t (id, stream_id, back, content, priority, type, category, expires_s, top)
    join moved m on m.stream_id = t.stream_id
    where n.id = t.id and n.stream_id = t.stream_id
),
windows as (
    insert into merge_windows as w (stream_id, key, notification_id, ends_at, events, count, notified_at)
    select t.stream_id, t.key, t.notification_id, to_timestamp(t.ends_s), t.events, t.count,
           to_timestamp(t.notified_s)
    from unnest($14::bigint[], $15::text[], $16::uuid[], $17::float8[], $18::int[], $19::int[], $20::float8[])
         as t (stream_id, key, notification_id, ends_s, events, count, notified_s)
    join living l using (stream_id)
    order by t.stream_id, t.key
    on conflict (stream_id, key) do update
        set notification_id = excluded.notification_id, ends_at = excluded.ends_at, events = excluded.events,
            count = excluded.count, notified_at = excluded.notified_at
),
noted as (
    insert into merged_events (event_id, notification_id, stream_id, at, status, how, source, actor, notice)
    select t.event_id, t.notification_id, t.stream_id, to_timestamp(coalesce(t.at_s, $40)), t.status, t.how, t.source,
           t.actor, t.notice
    from unnest($21::uuid[], $22::uuid[], $23::bigint[], $24::text[], $25::text[], $26::text[], $27::text[],
                $28::text[], $42::float8[])
         as t (event_id, notification_id, stream_id, status, how, source, actor, notice, at_s)
    join living l using (stream_id)
    where t.at_s is null or not exists (select from merged_events m where m.event_id = t.event_id)
),
pushes as materialized (
    select t.*
    from unnest($29::bigint[], $30::uuid[], $31::bigint[], $32::smallint[], $33::float8[], $34::text[],
                $35::float8[], $36::text[], $37::text[], $38::text[], $39::smallint[], $41::uuid[])
         as t (id, notification_id, stream_id, slot, due_s, gate, hold_s, reason, channel, chain, step, digest)
    join living l using (stream_id)
),
taken_over as (
    update deliveries d
    set due_at = least(d.due_at, to_timestamp(p.due_s)), gate = p.gate, hold_until = to_timestamp(p.hold_s),
        digest = case when to_timestamp(p.due_s) <= d.due_at then p.digest else d.digest end,
        reason = case when to_timestamp(p.due_s) <= d.due_at and (d.digest is not null or p.digest is not null)
                 then p.reason else d.reason end,
        shown_on = null, created_at = to_timestamp($40), updated_at = to_timestamp($40)
    from pushes p
    where d.notification_id = any ($30::uuid[]) and d.notification_id = p.notification_id
      and d.channel = p.channel and d.state || '' = 'planned' and d.attempts = 0
    returning d.notification_id, d.channel
),
superseded as (  -- some device may have got it, and is to get what is new
    update deliveries d set state = 'cancelled', reason = 'superseded', updated_at = to_timestamp($40)
    from pushes p
    where d.notification_id = any ($30::uuid[]) and d.notification_id = p.notification_id
      and d.channel = p.channel and d.due_at >= to_timestamp(p.due_s) and d.carrier is null
      and (d.state || '' in ('failed', 'unknown') or (d.state || '' = 'planned' and d.attempts > 0))
),
planned as (
    insert into deliveries
        (id, notification_id, stream_id, slot, channel, state, due_at, attempts, created_at, updated_at, gate,
         hold_until, reason, chain, step, digest)
    select p.id, p.notification_id, p.stream_id, p.slot, p.channel, 'planned', to_timestamp(p.due_s), 0,
           to_timestamp($40), to_timestamp($40), p.gate, to_timestamp(p.hold_s), p.reason, p.chain, p.step, p.digest
    from pushes p
    where not exists (select from taken_over t
                      where t.notification_id = p.notification_id and t.channel = p.channel)
)
select l.stream_id, m.seq, m.rev, m.unread from living l left join moved m using (stream_id)
union all
select 0, term, 0, 0 from fence;

-- name: prune_windows
-- Windows that ended before $1, some at a time.
delete from merge_windows where ctid = any (
    array(select ctid from merge_windows where ends_at < to_timestamp($1) limit 5000));

-- name: prune_merged
-- What is known of events merged before $1, some at a time.
delete from merged_events where ctid = any (
    array(select ctid from merged_events where at < to_timestamp($1) limit 5000));
