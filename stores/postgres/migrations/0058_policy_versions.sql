-- Policies of tenants have a version, and a time since when it is the present one.

alter table tenants
    add column policy_version integer not null default 0,
    add column policy_at timestamptz;

update tenants set policy_version = 1, policy_at = now() where settings -> 'policy' is not null;
