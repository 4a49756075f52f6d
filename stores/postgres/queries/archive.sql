-- The archive: what is due, how it leaves the tables, and how it comes back. Times are parameters in seconds since
-- the epoch. `%(line)s` is the archived form of notification `n` of stream `s` (stores/postgres/archive.py).

-- name: tenants
-- Every tenant with users, by a walk over the unique index, with the retention it asks for.
with recursive t as (
    (select tenant from streams order by tenant limit 1)
    union all
    select (select s.tenant from streams s where s.tenant > t.tenant order by s.tenant limit 1)
    from t where t.tenant is not null
)
select t.tenant, x.settings -> 'policy' ->> 'retentionDays' as days
from t left join tenants x using (tenant)
where t.tenant is not null;

-- name: next_id
-- The first notification from an id on. $1 id, $2 before this one.
select id from notifications where id >= $1 and id < $2 order by id limit 1;

-- name: passes
-- The months of tenants that are not to be looked at yet. $1 now.
select tenant, month from archive_passes where next_at > to_timestamp($1);

-- name: passed
-- $1 tenant, $2 month, $3 when it is looked at again.
insert into archive_passes (tenant, month, next_at) values ($1, $2, to_timestamp($3))
on conflict (tenant, month) do update set next_at = excluded.next_at;

-- name: users
-- Some users of a tenant. $1 tenant, $2 after this one (null: from the first), $3 how many.
select stream_id, user_id from streams
where tenant = $1 and ($2::text is null or user_id > $2)
order by user_id limit $3;

-- name: due
-- What may go of some streams. $1 streams, $2 least id, $3 id beyond, $4 created before, $5 how many.
select n.id, n.stream_id, n.seq, case when n.changed then n.rev else 0 end as changed_rev, s.user_id,
       %(line)s as line
from notifications n join streams s using (stream_id)
where n.stream_id = any ($1::bigint[]) and n.id >= $2 and n.id < $3 and n.created_at < to_timestamp($4)
  and %(settled)s
limit $5;

-- name: count_due
-- $1 tenant, $2 least id, $3 id beyond, $4 created before.
select count(*) from notifications n join streams s using (stream_id)
where s.tenant = $1 and n.id >= $2 and n.id < $3 and n.created_at < to_timestamp($4)
  and %(settled)s;

-- name: settled
-- What the user has dealt with, and nothing of which is still to be sent.
(n.read_at is not null or n.archived_at is not null or n.dismissed_at is not null or n.retracted_at is not null)
  and not exists (select from deliveries d where d.notification_id = n.id
                  and d.state || '' in ('planned', 'sending', 'unknown', 'failed'))

-- name: line
-- All that is kept of a notification.
json_build_object(
    'user', s.user_id,
    'notification', jsonb_strip_nulls(to_jsonb(n)),
    'deliveries', coalesce((
        select jsonb_agg(jsonb_strip_nulls(to_jsonb(d)) || jsonb_build_object('tries', coalesce((
            select jsonb_agg(jsonb_strip_nulls(to_jsonb(a)) order by a.attempt, a.device_id)
            from delivery_attempts a where a.delivery_id = d.id), '[]')) order by d.id)
        from deliveries d where d.notification_id = n.id), '[]'),
    'amendments', coalesce((
        select jsonb_agg(jsonb_strip_nulls(to_jsonb(m)) order by m.act_id)
        from amendments m where m.notification_id = n.id), '[]'),
    'exposure', (select to_jsonb(e) from template_exposures e where e.notification_id = n.id),
    'merged', coalesce((
        select jsonb_agg(jsonb_strip_nulls(to_jsonb(g)) order by g.event_id)
        from merged_events g where g.notification_id = n.id), '[]'))::text

-- name: pruned
-- Positions before which rows are missing; told before they are. What somebody holds is left out: shards lock the
-- same rows in orders of their own, and whoever waits while holding others could close a circle.
-- $1 streams, $2 seqs, $3 revs.
with free as (
    select s.stream_id
    from streams s join unnest($1::bigint[], $2::bigint[], $3::bigint[]) as t (stream_id, seq, rev) using (stream_id)
    where s.stream_id = any ($1::bigint[]) and (s.pruned_seq < t.seq or s.pruned_rev < t.rev)
    for no key update of s skip locked
)
update streams s set pruned_seq = greatest(s.pruned_seq, t.seq), pruned_rev = greatest(s.pruned_rev, t.rev)
from free f join unnest($1::bigint[], $2::bigint[], $3::bigint[]) as t (stream_id, seq, rev) using (stream_id)
where s.stream_id = f.stream_id;

-- name: pruned_left
-- Which of them were left out. As above.
select s.stream_id
from streams s join unnest($1::bigint[], $2::bigint[], $3::bigint[]) as t (stream_id, seq, rev) using (stream_id)
where s.stream_id = any ($1::bigint[]) and (s.pruned_seq < t.seq or s.pruned_rev < t.rev);

-- name: pruned_one
-- One alone, waited for. $1 stream, $2 seq, $3 rev.
update streams set pruned_seq = greatest(pruned_seq, $2), pruned_rev = greatest(pruned_rev, $3)
where stream_id = $1;

-- name: lock_notifications
-- $1 ids, $2 least id, $3 id beyond.
select n.id from notifications n where n.id = any ($1::uuid[]) and n.id >= $2 and n.id < $3 for update nowait;

-- name: lock_streams
-- Their users are not erased meanwhile: an erasure finds the part that is being written, or we find it. $1 to $3 as
-- above.
select s.stream_id from streams s
where s.stream_id in (select n.stream_id from notifications n where n.id = any ($1::uuid[]) and n.id >= $2 and n.id < $3)
for key share nowait;

-- name: lock_deliveries
-- $1 notifications.
select d.id from deliveries d where d.notification_id = any ($1::uuid[]) for update nowait;

-- name: lines
-- What they are now. $1 ids, $2 least id, $3 id beyond.
select n.id, %(line)s as line
from notifications n join streams s using (stream_id)
where n.id = any ($1::uuid[]) and n.id >= $2 and n.id < $3;

-- name: remove
-- $1 ids, $2 least id, $3 id beyond. Answers how many went.
with gone as (
    delete from notifications n where n.id = any ($1::uuid[]) and n.id >= $2 and n.id < $3
    returning n.tableoid::regclass::text as partition
),
sent as (delete from deliveries where notification_id = any ($1::uuid[]) returning id),
tried as (delete from delivery_attempts a using sent where a.delivery_id = sent.id),
amended as (delete from amendments where notification_id = any ($1::uuid[])),
exposed as (delete from template_exposures where notification_id = any ($1::uuid[])),
merged as (delete from merged_events where notification_id = any ($1::uuid[])),
counted as (
    insert into archive_partitions as p (partition, removed)
    select g.partition, count(*) from gone g group by 1
    on conflict (partition) do update set removed = p.removed + excluded.removed
)
select count(*) from gone;

-- name: intend
-- A part that is about to be written. $1 part, $2 tenant, $3 month, $4 now.
insert into archive_parts (part, tenant, month, state, created_at) values ($1, $2, $3, 'writing', to_timestamp($4));

-- name: complete
-- Its file is whole. Answers nothing if somebody has given it up meanwhile.
update archive_parts
set state = 'complete', rows = $2, file_bytes = $3, raw_bytes = $4, sha256 = $5, first_id = $6, last_id = $7,
    first_user = $8, last_user = $9
where part = $1 and state = 'writing'
returning part;

-- name: supersede
-- Parts that others hold now, or Postgres. $1 parts. Answers those that were complete.
update archive_parts set state = 'dead' where part = any ($1::uuid[]) and state = 'complete' returning part;

-- name: unfinished
-- What a run before this one began or left to be removed.
select part, tenant, month from archive_parts where state <> 'complete' order by part;

-- name: forget
-- $1 part.
delete from archive_parts where part = $1 and state <> 'complete';

-- name: parts
-- Complete parts. $1 tenant, $2 month, $3 user, $4 id; null: all.
select part, tenant, month, rows, file_bytes, raw_bytes, sha256, first_id, last_id, first_user, last_user,
       (extract(epoch from created_at) * 1000)::bigint as created_ms
from archive_parts
where state = 'complete' and ($1::text is null or tenant = $1) and ($2::text is null or month = $2)
  and ($3::text is null or (first_user <= $3 and last_user >= $3))
  and ($4::uuid is null or (first_id <= $4 and last_id >= $4))
order by tenant, month, first_user, part;

-- name: stored
-- Which of them Postgres has. $1 ids.
select n.id from notifications n where n.id = any ($1::uuid[]);

-- name: streams_of
-- $1 tenant, $2 users.
select user_id, stream_id from streams where tenant = $1 and user_id = any ($2::text[]);

-- name: columns
-- The columns of a table in order, each with the default that stands in for one an older archive does not know.
-- $1 table.
select a.attname as name, case when a.attnotnull then pg_get_expr(f.adbin, f.adrelid) end as instead
from pg_attribute a
left join pg_attrdef f on f.adrelid = a.attrelid and f.adnum = a.attnum
where a.attrelid = $1::text::regclass and a.attnum > 0 and not a.attisdropped
order by a.attnum;

-- name: restore
-- Rows of a table from JSON objects, those that are there already left alone. $1 the objects.
insert into %(table)s (%(columns)s)
select %(values)s
from unnest($1::text[]) as t (row), jsonb_populate_record(null::%(table)s, t.row::jsonb) as r
on conflict do nothing;

-- name: ask_erasure
-- $1 tenant, $2 user.
insert into archive_erasures (tenant, user_id) values ($1, $2)
on conflict (tenant, user_id) do update set asked_at = now();

-- name: erasures
select tenant, user_id, asked_at from archive_erasures order by asked_at;

-- name: erased
-- Carried out, unless it was asked for again meanwhile. $1 tenant, $2 user, $3 when it was asked for.
delete from archive_erasures where tenant = $1 and user_id = $2 and asked_at = $3;

-- name: prune_exposures
-- Who got which variant, of notifications before an id. $1 id, $2 how many. Answers how many went.
with gone as (
    delete from template_exposures where notification_id = any (array(
        select notification_id from template_exposures where notification_id < $1 order by notification_id limit $2))
    returning 1
)
select count(*) from gone;

-- name: prune_audit
-- $1 before (seconds), $2 how many. Answers how many went.
with gone as (
    delete from audit where id = any (array(
        select id from (select id, at from audit order by id limit $2) a where a.at < to_timestamp($1)))
    returning 1
)
select count(*) from gone;

-- name: last_run
select value::text from cluster_state where key = 'archive';

-- name: ran
-- $1 what is known of it, JSON.
insert into cluster_state (key, value) values ('archive', $1::jsonb)
on conflict (key) do update set value = excluded.value;

-- name: partitions
-- The partitions of `notifications`, but the default one, with their bounds in words, an estimate of their rows, and
-- what was taken out of them.
select c.relname as name, pg_get_expr(c.relpartbound, c.oid) as bound, greatest(c.reltuples, 0)::bigint as estimate,
       coalesce(p.removed, 0) as removed
from pg_inherits i
join pg_class c on c.oid = i.inhrelid
left join archive_partitions p on p.partition = c.relname
where i.inhparent = 'notifications'::regclass and pg_get_expr(c.relpartbound, c.oid) <> 'DEFAULT'
order by c.relname;
