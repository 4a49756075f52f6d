-- Templates: every version is kept, the highest is the present one.
create table templates (
    tenant      text not null references tenants on delete cascade,
    template_id text not null,
    version     integer not null,
    document    text not null,                          -- JSON (carillon/templates.py), complete with params
    created_at  timestamptz not null default now(),
    created_by  text not null default '',               -- as in audit
    primary key (tenant, template_id, version)
);
