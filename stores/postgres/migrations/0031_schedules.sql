-- What is to be sent later: once, or by a rule (carillon/schedules.py).
create table schedules (
    tenant      text not null references tenants on delete cascade,
    schedule_id uuid not null,                          -- of one event: the id of the notification to come
    slot        smallint not null,                      -- the owner of this slot fires it
    user_id     text,                                   -- the one recipient, null: several
    rule        text not null,                          -- JSON {at, localAt, rrule, cron, timezone}
    event       text not null,                          -- JSON, as POST /v1/events takes it
    single      boolean not null,                       -- an event's scheduleAt: the notification has this id
    state       text not null default 'active',         -- active|done|cancelled|failed
    zone        text not null default 'UTC',            -- the user's, in which next_at was computed
    next_at     timestamptz not null,                   -- the occurrence that comes; ended: the last one
    due_at      timestamptz not null,                   -- when its owner looks at it: then, or at the end of a claim
    claim       integer not null default 0,             -- counts claims: an answer to an older one is ignored
    fired       bigint not null default 0,
    missed      bigint not null default 0,              -- occurrences that another one stood for
    fired_at    timestamptz,
    result      text,                                   -- of the last occurrence
    idempotency_key text,
    body_hash   bytea,
    created_at  timestamptz not null default now(),
    updated_at  timestamptz not null default now(),
    primary key (tenant, schedule_id)
) with (fillfactor = 80);
create index schedules_due on schedules (due_at) where state = 'active';
create index schedules_ended on schedules (updated_at) where state <> 'active';
create index schedules_user on schedules (tenant, user_id, schedule_id) where user_id is not null;
create unique index schedules_key on schedules (tenant, idempotency_key) where idempotency_key is not null;
