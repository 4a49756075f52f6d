-- Where webhooks come in (carillon/inbound.py).
create table inbound_sources (
    source_id   text primary key,                       -- in the URL; public, says nothing
    tenant      text not null references tenants on delete cascade,
    name        text not null,
    document    text not null,                          -- JSON {scheme, event, when, description}
    secret      text not null,                          -- HMAC key, needed as it is
    previous_secret text,
    previous_until  timestamptz,                        -- until when the former secret signs, too
    created_at  timestamptz not null default now(),
    updated_at  timestamptz not null default now(),
    unique (tenant, name)
);
