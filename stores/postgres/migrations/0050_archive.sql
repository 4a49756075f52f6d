-- Retention and archive (docs/adr/0014-archives-as-compressed-json-lines.md).

-- Notifications up to here may be missing rows, as pruned_rev says it of changes: who has seen both misses nothing.
alter table streams add column pruned_seq bigint not null default 0;

-- The parts of the archive, of which only complete ones hold anything. A row is written before its file, and
-- becomes complete in the transaction that takes the notifications out of the tables.
create table archive_parts (
    part       uuid primary key,
    tenant     text not null,
    month      text not null,                          -- of the ids, YYYY-MM
    state      text not null,                          -- writing | complete | dead (its file is to be removed)
    rows       integer not null default 0,
    file_bytes bigint not null default 0,
    raw_bytes  bigint not null default 0,              -- without compression
    sha256     text not null default '',               -- of the file
    first_id   uuid,
    last_id    uuid,
    first_user text collate "C" not null default '',   -- compared as Python compares
    last_user  text collate "C" not null default '',
    created_at timestamptz not null
);
create index archive_parts_month on archive_parts (tenant, month) where state = 'complete';
create index archive_parts_unfinished on archive_parts (part) where state <> 'complete';

-- When a tenant's month is looked at again: kept rows may have been read since, restored ones stay for a while.
create table archive_passes (
    tenant  text not null,
    month   text not null,
    next_at timestamptz not null,
    primary key (tenant, month)
);

-- Users whose archived notifications are to be erased: written with their erasure, carried out by the archive's job.
create table archive_erasures (
    tenant   text not null,
    user_id  text not null,
    asked_at timestamptz not null default now(),
    primary key (tenant, user_id)
);

-- Rows taken out of partitions of `notifications` since these were written anew.
create table archive_partitions (
    partition text primary key,
    removed   bigint not null
);

-- While a partition is written anew: ids of rows that changed after they may have been copied. Not logged: after a
-- crash the copy begins anew.
create unlogged table archive_changes (id uuid not null);
create function archive_note_change() returns trigger
language plpgsql as $$
begin
    insert into archive_changes (id) values (case when tg_op = 'DELETE' then old.id else new.id end);
    return null;
end
$$;
