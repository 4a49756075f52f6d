-- Notifications that are edited, retracted and cancelled (stores/postgres/amendments.py). Fence, times and
-- `state || ''` as in shard.sql.

-- name: noted
-- The part of `change` that keeps who retracted what: $8 acts and $9 actors, by the id.
noted as (
    insert into amendments (notification_id, act_id, stream_id, act, at, actor)
    select t.id, a.act_id, t.stream_id, 'retract', to_timestamp($5), a.actor
    from target t join unnest($3::uuid[], $8::uuid[], $9::text[]) as a (id, act_id, actor) on a.id = t.id
    on conflict do nothing
),

-- name: cancel
-- What is still pending of notifications is stopped; a push on its way is not tried again, and taken back if it
-- turns out to have been sent (gate withdrawn). Neither seq nor rev moves. $3 ids, $4 streams, $5 now, $6 acts,
-- $7 actors.
with fence as materialized (select term from shards where shard = $1 and term = $2 for share),
target as materialized (
    select n.id, n.stream_id, t.act_id, t.actor
    from fence, unnest($3::uuid[], $4::bigint[], $6::uuid[], $7::text[]) as t (id, stream_id, act_id, actor)
    join notifications n on n.id = t.id and n.stream_id = t.stream_id
    where n.cancelled_at is null and n.retracted_at is null
),
done as (
    update notifications n set cancelled_at = to_timestamp($5) from target t where n.id = t.id
    returning n.id
),
noted as (
    insert into amendments (notification_id, act_id, stream_id, act, at, actor)
    select t.id, t.act_id, t.stream_id, 'cancel', to_timestamp($5), t.actor from target t
    on conflict do nothing
),
stopped as (
    update deliveries d
    set state = case when d.state = 'sending' then d.state else 'cancelled' end,
        reason = case when d.state = 'sending' then d.reason else 'cancelled' end,
        gate = case when d.state = 'sending' then 'withdrawn' else d.gate end,
        updated_at = to_timestamp($5)
    from target t
    where d.notification_id = t.id and d.channel <> 'withdraw'
      and d.state || '' in ('planned', 'failed', 'unknown', 'sending')
    returning d.id, d.carrier, d.state
),
%(taken_over)s
select (select count(*) from fence) as fenced, (select count(*) from done) as cancelled;

-- name: standing
-- Where notifications stand, and whether acts were done already. $1 ids, $2 streams, $3 acts.
select n.id, n.content, coalesce(n.version, 1) as version,
       (extract(epoch from n.expires_at) * 1000)::bigint as expires_ms,
       (extract(epoch from n.updated_at) * 1000)::bigint as updated_ms,
       (extract(epoch from n.retracted_at) * 1000)::bigint as retracted_ms,
       (extract(epoch from n.cancelled_at) * 1000)::bigint as cancelled_ms,
       (select count(*) from deliveries d where d.notification_id = n.id and d.reason = 'cancelled') as stopped,
       exists (select from amendments a where a.notification_id = t.id and a.act_id = t.act_id) as done
from unnest($1::uuid[], $2::bigint[], $3::uuid[]) as t (id, stream_id, act_id)
join notifications n on n.id = t.id and n.stream_id = t.stream_id;

-- name: edit
-- New content, if its version is still the one that was read. $3 ids, $4 streams, $5 now, $6 contents, $7 expiries,
-- $8 versions before, $9 acts, $10 actors, $11 true: pushes show something else now, $12 former contents kept.
-- Waiting pushes read the content when they are claimed. One on its way is marked (`settle` sees to it); what
-- phones show is replaced, unless the user is through with it.
with fence as materialized (select term from shards where shard = $1 and term = $2 for share),
target as materialized (
    select t.*, n.content as former,
           t.shown and n.read_at is null and n.archived_at is null and n.dismissed_at is null
               and (t.expires_s is null or t.expires_s > $5) as replaced
    from fence, unnest($3::uuid[], $4::bigint[], $6::text[], $7::float8[], $8::int[], $9::uuid[], $10::text[],
                       $11::boolean[])
         as t (id, stream_id, content, expires_s, version, act_id, actor, shown)
    join notifications n on n.id = t.id and n.stream_id = t.stream_id
    where n.retracted_at is null and coalesce(n.version, 1) = t.version
),
moved as (
    update streams s set rev = s.rev + 1 from target t where s.stream_id = t.stream_id
    returning s.stream_id, s.rev, s.unread
),
done as (
    update notifications n
    set content = t.content, expires_at = to_timestamp(t.expires_s), version = t.version + 1,
        updated_at = to_timestamp($5), rev = m.rev, changed = true
    from target t join moved m using (stream_id)
    where n.id = t.id
    returning %(row)s, n.stream_id
),
noted as (
    insert into amendments (notification_id, act_id, stream_id, act, at, actor, version, former)
    select t.id, t.act_id, t.stream_id, 'edit', to_timestamp($5), t.actor, t.version + 1, t.former from target t
),
forgotten as (
    delete from amendments a using target t
    where a.notification_id = t.id and a.act = 'edit' and a.version <= t.version + 1 - $12
),
former as (
    update deliveries d
    set stale = case when d.state = 'sending' then true else d.stale end,
        state = case when d.state = 'sending' then d.state else 'cancelled' end,
        reason = case when d.state = 'sending' then d.reason else 'edited again' end
    from target t
    where t.shown and d.notification_id = t.id
      and (d.state || '' = 'sending' and d.channel <> 'withdraw'
           or d.channel = 'replace' and d.state || '' in ('planned', 'failed', 'unknown'))
),
replaced as (
    insert into deliveries
        (notification_id, stream_id, slot, channel, state, due_at, created_at, updated_at, gate, merged)
    select distinct on (d.notification_id) d.notification_id, d.stream_id, d.slot, 'replace', 'planned',
           to_timestamp($5), to_timestamp($5), to_timestamp($5), 'always', d.merged
    from target t join deliveries d on d.notification_id = t.id
    where t.replaced and d.channel <> 'withdraw' and d.gate is distinct from 'withdrawn'
      and exists (select from delivery_attempts a where a.delivery_id = d.id and a.outcome in ('sent', 'unknown'))
    order by d.notification_id, d.id desc
    returning stream_id
)
select f.term, x.*
from fence f
left join (select d.*, m.unread, (select count(*) from replaced r where r.stream_id = m.stream_id) as replaced
           from moved m join done d using (stream_id)) x on true;
