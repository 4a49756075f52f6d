-- Broadcasts: one event to many users (carillon/broadcasts.py). Their notifications are in `notifications` as all
-- others are; which of them are a broadcast's follows from their ids.
create table broadcasts (
    broadcast_id uuid primary key,
    tenant      text not null references tenants on delete cascade,
    audience    text not null,                          -- JSON, as POST /v1/broadcasts takes it
    event       text not null,                          -- JSON, as POST /v1/events takes it, without recipient
    state       text not null,                          -- scheduled|running|paused|done|cancelled|failed
    reason      text,                                   -- why failed
    start_at    timestamptz not null,
    started_at  timestamptz,                            -- its milliseconds begin the ids of the notifications
    resumed_at  timestamptz,                            -- running since; null: it is not
    ran_ms      bigint not null default 0,              -- before that
    ended_at    timestamptz,
    total       bigint,                                 -- users, about; null: not counted yet
    stored      bigint not null default 0,              -- these six when it is done: before, broadcast_slots has them
    delivered   bigint not null default 0,
    queued      bigint not null default 0,
    deferred    bigint not null default 0,
    suppressed  bigint not null default 0,
    failed      bigint not null default 0,
    idempotency_key text,
    body_hash   bytea,
    created_at  timestamptz not null,
    updated_at  timestamptz not null
) with (fillfactor = 50);
create index broadcasts_tenant on broadcasts (tenant, broadcast_id);
create index broadcasts_active on broadcasts (start_at) where state in ('scheduled', 'running');
create index broadcasts_started on broadcasts (tenant, started_at);  -- the broadcast of a notification, by its id
create index broadcasts_ended on broadcasts (ended_at) where ended_at is not null;
create unique index broadcasts_key on broadcasts (tenant, idempotency_key) where idempotency_key is not null;

-- How far each slot is, written with the notifications it speaks of. Gone when the broadcast is done.
create table broadcast_slots (
    broadcast_id uuid not null references broadcasts on delete cascade,
    slot        smallint not null,
    last_user   text not null default '',               -- the last user that was looked after
    done        boolean not null default false,
    stored      bigint not null default 0,
    delivered   bigint not null default 0,
    queued      bigint not null default 0,
    deferred    bigint not null default 0,
    suppressed  bigint not null default 0,
    failed      bigint not null default 0,
    primary key (broadcast_id, slot)
) with (fillfactor = 50);

-- Users whose notification could not be made, the first of them.
create table broadcast_failures (
    broadcast_id uuid not null references broadcasts on delete cascade,
    user_id     text not null,
    code        text not null,
    detail      text not null,
    failed_at   timestamptz not null,
    primary key (broadcast_id, user_id)
);
