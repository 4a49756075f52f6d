-- The slot map and the fencing of shards (stores/postgres/cluster.py). Written by the coordinator only.

-- name: take_epoch
-- A new coordinator begins. Waits for transactions of the one before that hold the row FOR SHARE.
insert into cluster_state (key, value) values ('coordinator_epoch', '1'::jsonb)
on conflict (key) do update set value = to_jsonb((cluster_state.value #>> '{}')::bigint + 1)
returning (value #>> '{}')::bigint as epoch;

-- name: check_epoch
-- First statement of every transaction: a newer coordinator cannot begin until this one ends.
select (value #>> '{}')::bigint as epoch from cluster_state where key = 'coordinator_epoch' for share;

-- name: load_slots
select slot, shard from slots order by slot;

-- name: load_shards
select shard, term, node, incarnation from shards order by shard;

-- name: load_members
select value from cluster_state where key = 'members';

-- name: save_members
-- The members of the last map, so that a restarted coordinator has the same one at once.
insert into cluster_state (key, value) values ('members', $1::jsonb)
on conflict (key) do update set value = excluded.value;

-- name: load_draining
select value from cluster_state where key = 'draining';

-- name: save_draining
-- Nodes that are to be left, so that a restarted coordinator does not move back in.
insert into cluster_state (key, value) values ('draining', $1::jsonb)
on conflict (key) do update set value = excluded.value;

-- name: register_shard
-- A new process of a shard begins a new term, which fences the process before it. The same incarnation again
-- (its answer was lost) keeps its term.
insert into shards (shard, term, node, incarnation) values ($1, 1, $2, $3)
on conflict (shard) do update set
    term = shards.term + case when shards.incarnation = excluded.incarnation then 0 else 1 end,
    node = excluded.node,
    incarnation = excluded.incarnation,
    updated_at = now()
returning term;

-- name: slots_to_move
-- The slots of a move that really change, with the owners that lose them.
select m.slot, s.shard as loser
from unnest($1::smallint[], $2::text[]) as m (slot, shard)
left join slots s on s.slot = m.slot
where s.shard is distinct from m.shard;

-- name: bump_terms
-- The fence: waits for every transaction that holds one of the rows FOR SHARE, makes all later ones fail.
update shards set term = term + 1, updated_at = now()
where shard = any($1::text[])
returning shard, term;

-- name: set_owners
-- The new owner looks for pushes that the old one kept (docs/adr/0016-kept-pushes.md), and that this one had to look for.
insert into slots as s (slot, shard)
select m.slot, m.shard from unnest($1::smallint[], $2::text[]) as m (slot, shard)
on conflict (slot) do update set
    shard = excluded.shard,
    kept_from = least(s.kept_from, (select k.from_id from kept_marks k where k.shard = s.shard and s.shard is distinct from excluded.shard));

-- name: forget_old_marks
-- Marks of shards that are forgotten: their slots have them.
delete from kept_marks where not exists (select from shards where shards.shard = kept_marks.shard);

-- name: forget_old_shards
-- Rows of shards that own nothing and have not been heard of for a week. Not earlier: a process that was
-- stopped and wakes up must still find a term that is not its own.
delete from shards
where updated_at < now() - interval '7 days'
and not exists (select from slots where slots.shard = shards.shard)
and not (shard = any($1::text[]));

-- name: backend
select pg_backend_pid();

-- name: end_blockers
-- Ends the sessions that the backend $1 waits for. In a move these are transactions of the losing shards only.
select count(pg_terminate_backend(pid)) from unnest(pg_blocking_pids($1)) as pid;
