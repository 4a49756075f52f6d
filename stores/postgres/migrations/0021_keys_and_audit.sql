-- API keys that end, and one rate for all replicas; and who did what to the system.
alter table api_keys
    add column expires_at  timestamptz,                -- a rotated key ends after its overlap
    add column rotated_to  text,                       -- the key that replaces it
    add column rate_per_s  real,                       -- events per second; null: no limit
    add column burst       integer;                    -- events at once

create table audit (
    id     bigint generated always as identity primary key,
    at     timestamptz not null default now(),
    tenant text not null,                              -- "" for the whole system
    actor  text not null,                              -- "cli:<login>", "key:<key id>", "system"
    action text not null,                              -- e.g. key.create; docs/explanation/security.md lists them
    target text not null default '',
    detail jsonb not null default '{}'                 -- never a secret
);
create index audit_tenant on audit (tenant, id);
