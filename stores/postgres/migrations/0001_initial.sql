-- The truth of Carillon. Forward only; applied in order under an advisory lock (stores/postgres/migrate.py).

create table tenants (
    tenant        text primary key,
    client_secret text not null,                       -- HS256 key of client tokens, >= 32 bytes of UTF-8
    settings      jsonb not null default '{}',
    created_at    timestamptz not null default now()
);

create table api_keys (
    key_id       text primary key,                     -- public part, shown in lists
    key_hash     bytea not null unique,                -- SHA-256 of the whole key; the key itself is not kept
    tenant       text not null references tenants on delete cascade,
    name         text not null default '',
    scopes       text[] not null default '{}',
    created_at   timestamptz not null default now(),
    last_used_at timestamptz,
    revoked_at   timestamptz
);
create index api_keys_tenant on api_keys (tenant);

-- One row per user: the serialization point of everything that happens to the user. Small and hot, so it
-- leaves room for HOT updates and is never indexed on what changes.
create table streams (
    stream_id   bigint generated always as identity primary key,
    tenant      text not null,
    user_id     text not null,
    slot        smallint not null,
    epoch       text not null,                         -- new only when history is lost, restored or erased
    seq         bigint not null default 0,             -- notifications ever appended; gap-free
    rev         bigint not null default 0,             -- durable changes ever made
    unread      integer not null default 0,
    pruned_rev  bigint not null default 0,             -- changes up to here may be missing rows (retention)
    last_seen_at timestamptz,
    tokens_valid_from timestamptz,                     -- tokens issued before are revoked
    created_at  timestamptz not null default now(),
    unique (tenant, user_id)
) with (fillfactor = 70);

-- Partitioned by month of the UUIDv7 id, so that the primary key is `id` alone and a look-up by id touches
-- one partition. Feed order is `position` (the rev that last moved the row to the top).
create table notifications (
    id           uuid not null primary key,
    stream_id    bigint not null,
    seq          bigint not null,
    rev          bigint not null,                      -- rev of the row's last change
    position     bigint not null,
    changed      boolean not null default false,       -- true once changed after it was appended
    priority     smallint not null,
    type         text not null,
    category     text,
    content      text not null,                        -- immutable JSON members (carillon/notification.py)
    created_at   timestamptz not null,
    expires_at   timestamptz,
    delivered_at timestamptz,
    seen_at      timestamptz,
    read_at      timestamptz,
    clicked_at   timestamptz,
    dismissed_at timestamptz,
    archived_at  timestamptz,
    retracted_at timestamptz,
    updated_at   timestamptz
) partition by range (id);

create index notifications_seq on notifications (stream_id, seq);             -- resume, acknowledgement by seq
create index notifications_feed on notifications (stream_id, position);       -- the feed
create index notifications_changed on notifications (stream_id, rev) where changed;  -- catching up on changes
create index notifications_unread on notifications (stream_id, position) where read_at is null;

-- Rows whose month has no partition yet (a clock far ahead) are still accepted.
create table notifications_default partition of notifications default;

-- The outbox: one row per planned external channel, born in the transaction of its notification.
create table deliveries (
    id              bigint generated always as identity primary key,
    notification_id uuid not null,
    stream_id       bigint not null,
    slot            smallint not null,
    channel         text not null,                     -- push (later: email, sms, webhook, ...)
    state           text not null default 'planned',   -- planned|sending|sent|unknown|failed|dead|cancelled
    due_at          timestamptz not null,              -- planned, unknown, failed: next try; sending: lease end
    attempts        smallint not null default 0,
    reason          text,                              -- why dead or cancelled
    created_at      timestamptz not null,
    updated_at      timestamptz not null
) with (fillfactor = 85);
create index deliveries_notification on deliveries (notification_id);
-- What is still to be done, per slot, by time. Terminal rows leave the index.
create index deliveries_due on deliveries (slot, due_at) where state in ('planned', 'sending', 'unknown', 'failed');

create table delivery_attempts (
    delivery_id bigint not null,
    attempt     smallint not null,
    device_id   text not null,
    provider    text not null,
    outcome     text not null,
    provider_id text not null default '',
    status      smallint not null default 0,
    error       text not null default '',
    started_at  timestamptz not null,
    duration_ms real not null,
    primary key (delivery_id, attempt, device_id)
);

create table devices (
    tenant        text not null,
    user_id       text not null,
    device_id     text not null,
    platform      text not null,
    provider      text not null,
    token_kind    text not null,
    token         text not null,
    app_id        text not null default '',
    environment   text not null default 'production',
    locale        text,
    registered_at timestamptz not null default now(),
    disabled_at   timestamptz,
    disabled_reason text,
    primary key (tenant, user_id, device_id)
);
-- A target belongs to one user: registering it again moves it.
create unique index devices_target on devices (tenant, provider, app_id, token);

create table preferences (
    tenant     text not null,
    user_id    text not null,
    version    bigint not null default 1,
    document   jsonb not null,
    updated_at timestamptz not null default now(),
    primary key (tenant, user_id)
);

create table idempotency_keys (
    tenant          text not null,
    key             text not null,                     -- "<route>:<key>", with #index or #userId
    body_hash       bytea not null,
    notification_id uuid not null,
    created_at      timestamptz not null,
    primary key (tenant, key)
);
create index idempotency_keys_age on idempotency_keys using brin (created_at);

-- Fencing: a shard's write transactions read their own row FOR SHARE and compare the term.
create table shards (
    shard       text primary key,
    term        bigint not null,
    node        text not null,
    incarnation text not null,
    updated_at  timestamptz not null default now()
);

create table slots (
    slot  smallint primary key,
    shard text                                          -- null: no owner
);

create table cluster_state (
    key   text primary key,
    value jsonb not null
);
