-- Digests: outbox rows that wait together (carillon/digest.py). Writes begin with the fence, as in shard.sql;
-- `state || ''` keeps plans away from the partial index of due rows, as there.

-- name: gather
-- What else of digests is due: rows that one claim had no room for, and such as were claimed by a process that died
-- before it told them ("sending" past due). $3 streams, $4 digests, $5 now, $6 end of the lease, $7 how many of each, the newest.
with fence as materialized (select term from shards where shard = $1 and term = $2 for share),
due as materialized (
    select x.id from unnest($3::bigint[], $4::uuid[]) as t (stream_id, digest)
    cross join lateral (
        select d.id from deliveries d
        where d.stream_id = t.stream_id and d.digest = t.digest
          and d.state || '' in ('planned', 'sending') and d.carrier is null and d.due_at <= to_timestamp($5)
        order by d.id desc
        limit $7
        for update skip locked
    ) x
)
update deliveries d
set state = 'sending', due_at = to_timestamp($6), attempts = d.attempts + 1, updated_at = to_timestamp($5),
    stale = false
from fence
where d.id = any (array(select id from due))
returning d.id;

-- name: lock
-- Claimed rows that are told now, and whether they were dealt with since. $1 ids, $2 attempts.
select d.id,
       d.gate is not distinct from 'withdrawn' or n.seen_at is not null or n.read_at is not null
       or n.dismissed_at is not null or n.retracted_at is not null
       or coalesce(n.archived_at > n.created_at, false) as dealt_with
from deliveries d
join unnest($1::bigint[], $2::smallint[]) as t (id, attempt) on d.id = t.id
join notifications n on n.id = d.notification_id
where d.id = any ($1::bigint[]) and d.attempts = t.attempt and d.state || '' = 'sending' and d.carrier is null
order by d.id
for update of d;

-- name: tell
-- What was locked is told by its carrier; without one (null) it is not needed. $1 ids, $2 carriers, $3 how many each
-- carrier speaks for, $4 now.
update deliveries d
set state = case when d.id = t.carrier then d.state else 'cancelled' end,
    reason = case when t.carrier is null then 'read' when d.id = t.carrier then d.reason else 'told in a digest' end,
    merged = case when d.id = t.carrier then least(t.n, 32767) else d.merged end,
    carrier = t.carrier, updated_at = to_timestamp($4)
from unnest($1::bigint[], $2::bigint[], $3::int[]) as t (id, carrier, n)
where d.id = any ($1::bigint[]) and d.id = t.id;

-- name: tell_rest
-- Due items of digests beyond those that were looked at: told by the same carriers, unless they are over. $1 carriers,
-- $2 now, $3 how many at most. Answers how many each tells, and how many were found.
with rest as materialized (
    select d.id, c.id as carrier,
           case when d.gate is not distinct from 'withdrawn' or n.seen_at is not null or n.read_at is not null
                     or n.dismissed_at is not null or n.retracted_at is not null
                     or coalesce(n.archived_at > n.created_at, false) then 'read'
                when n.expires_at <= to_timestamp($2) then 'expired' end as over
    from unnest($1::bigint[]) as t (id)
    join deliveries c on c.id = t.id
    join deliveries d on d.stream_id = c.stream_id and d.digest = c.digest and d.channel = c.channel
    join notifications n on n.id = d.notification_id
    where d.state || '' in ('planned', 'sending') and d.carrier is null and d.due_at <= to_timestamp($2)
    limit $3
    for update of d
),
done as (
    update deliveries d
    set state = 'cancelled', reason = coalesce(r.over, 'told in a digest'),
        carrier = case when r.over is null then r.carrier end, updated_at = to_timestamp($2)
    from rest r
    where d.id = any (array(select id from rest)) and d.id = r.id
)
select carrier, count(*) filter (where over is null) as told, count(*) as found from rest group by carrier;

-- name: tell_for_more
-- How many more a carrier speaks for. $1 carriers, $2 how many.
update deliveries d set merged = least(coalesce(d.merged, 1)::bigint + t.n, 32767)
from unnest($1::bigint[], $2::bigint[]) as t (id, n)
where d.id = any ($1::bigint[]) and d.id = t.id;

-- name: told
-- The newest items that carriers speak for, newest first. $1 carriers, $2 how many of each, $3 of how many of them with
-- their content.
select c.id as carrier, n.id, n.type, case when i.place <= $3 then n.content else '' end as content,
       (extract(epoch from n.expires_at) * 1000)::bigint as expires_ms, coalesce(i.shown_on, '{}') as shown_on
from unnest($1::bigint[]) as c (id)
cross join lateral (
    select n.id, n.seq, d.shown_on, row_number() over (order by n.seq desc, n.id) as place
    from deliveries d join notifications n on n.id = d.notification_id
    where d.carrier = c.id
    order by n.seq desc, n.id
    limit $2
) i
join notifications n on n.id = i.id
order by c.id, i.seq desc, n.id;

-- name: next_moment
-- When the next row that rules hold is due. $1 slots, $2 after.
select (extract(epoch from min(x.due_at)) * 1000)::bigint
from unnest($1::smallint[]) as s (slot)
cross join lateral (
    select d.due_at from deliveries d
    where d.slot = s.slot and d.state = 'planned' and d.gate = 'deferred' and d.due_at > to_timestamp($2)
    order by d.due_at limit 1
) x;

-- name: flush
-- An open digest is due now. $3 stream, $4 digest, $5 now, $6 reason. Answers how many notifications it has, and whether
-- there is, or was, such a digest.
with fence as materialized (select term from shards where shard = $1 and term = $2 for share),
done as (
    update deliveries d
    set due_at = to_timestamp($5), hold_until = to_timestamp($5), reason = $6, updated_at = to_timestamp($5)
    from fence
    where d.stream_id = $3 and d.digest = $4 and d.state || '' = 'planned' and d.carrier is null
    returning d.notification_id
)
select (select count(distinct notification_id) from done) as items, (select count(*) from fence) as fenced,
       exists (select from deliveries d where d.stream_id = $3 and d.digest = $4) as known;

-- name: remove
-- One item of an open digest is not told. $3 stream, $4 digest, $5 notification, $6 now. Answers how many rows that
-- was, and whether the notification is, or was, in the digest and not told.
with fence as materialized (select term from shards where shard = $1 and term = $2 for share),
done as (
    update deliveries d
    set state = 'cancelled', reason = 'removed', updated_at = to_timestamp($6)
    from fence
    where d.notification_id = $5 and d.stream_id = $3 and d.digest = $4 and d.state || '' = 'planned'
      and d.carrier is null
    returning d.id
)
select (select count(*) from done) as items, (select count(*) from fence) as fenced,
       exists (select from deliveries d
               where d.notification_id = $5 and d.stream_id = $3 and d.digest = $4 and d.carrier is null) as known;

-- name: waiting
-- What waits in digests of a user that the user's preferences decide about. $1 stream.
select d.id, d.digest, n.type, n.category, n.priority, (extract(epoch from d.due_at) * 1000)::bigint as due_ms
from deliveries d join notifications n on n.id = d.notification_id
where d.stream_id = $1 and d.digest is not null and d.carrier is null and d.state in ('planned', 'sending')
  and d.reason = 'digest' and d.state || '' = 'planned';

-- name: waiting_of
-- The same of all users of a tenant, with what they want and where they are: by slot, user and row. Streams are walked by
-- their key, and one without anything that waits is a row without it: so each page costs its own rows. $1 tenant,
-- $2 slots, $3 slot, $4 user and $5 row after which, $6 how many.
select d.id, d.digest, n.type, n.category, n.priority, (extract(epoch from d.due_at) * 1000)::bigint as due_ms,
       d.stream_id, s.slot, s.user_id,
       case when d.id is not null then
           (select p.document::text from preferences p where p.tenant = $1 and p.user_id = s.user_id)
       end as preferences,
       case when d.id is not null then
           (select p.timezone from profiles p where p.tenant = $1 and p.user_id = s.user_id)
       end as zone
from (
    select s.stream_id, s.slot, s.user_id
    from (select slot from unnest($2::smallint[]) as o (slot) where slot >= $3::smallint order by slot) o
    cross join lateral (
        select s.stream_id, s.slot, s.user_id from streams s
        where s.tenant = $1 and s.slot = o.slot
          and s.user_id >= case when o.slot = $3::smallint then $4::text else '' end
        order by s.user_id
        limit $6
    ) s
    limit $6
) s
left join lateral (
    select d.id, d.digest, d.due_at, d.stream_id, d.notification_id from deliveries d
    where d.stream_id = s.stream_id and d.digest is not null and d.carrier is null
      and d.state in ('planned', 'sending') and d.reason = 'digest' and d.state || '' = 'planned'
      and (d.id > $5 or (s.slot, s.user_id) <> ($3::smallint, $4::text))
    order by d.id
    limit $6
) d on true
left join notifications n on n.id = d.notification_id
order by s.slot, s.user_id, d.id
limit $6;

-- name: move
-- Rows that wait in another digest, or until another time, now. $3 ids, $4 digests, $5 due, $6 now.
with fence as materialized (select term from shards where shard = $1 and term = $2 for share),
done as (
    update deliveries d
    set digest = t.digest, due_at = to_timestamp(t.due_s), hold_until = to_timestamp(t.due_s),
        updated_at = to_timestamp($6)
    from fence, unnest($3::bigint[], $4::uuid[], $5::float8[]) as t (id, digest, due_s)
    where d.id = any ($3::bigint[]) and d.id = t.id and d.state || '' = 'planned' and d.carrier is null
    returning d.id
)
select (select count(*) from done) as moved, (select count(*) from fence) as fenced;

-- name: open_digests
-- Open digests of a user by due time, of each the newest items, oldest first. $1 tenant, $2 user, $3 items of
-- each, $4 digests.
with waiting as (
    select d.digest, d.notification_id, min(d.due_at) as due_at, array_agg(d.channel order by d.id) as channels,
           min(d.reason) as reason
    from streams s join deliveries d on d.stream_id = s.stream_id
    where s.tenant = $1 and s.user_id = $2 and d.digest is not null and d.carrier is null
      and d.state in ('planned', 'sending')
    group by d.digest, d.notification_id
),
placed as (
    select w.*, n.seq, n.type, n.category, n.content, n.decision, n.created_at,
           row_number() over (partition by w.digest order by n.seq desc) as place,
           count(*) over (partition by w.digest) as items,
           min(w.due_at) over (partition by w.digest) as digest_due_at
    from waiting w join notifications n on n.id = w.notification_id
    where n.expires_at is null or n.expires_at > now()
),
ranked as (select p.*, dense_rank() over (order by p.digest_due_at, p.digest) as rank from placed p)
select digest, notification_id, seq, type, category, content, decision, channels, reason, items,
       (extract(epoch from digest_due_at) * 1000)::bigint as due_ms,
       (extract(epoch from created_at) * 1000)::bigint as created_ms
from ranked where place <= $3 and rank <= $4
order by rank, seq;
