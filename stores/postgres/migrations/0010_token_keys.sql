-- Keys of client tokens beyond one secret: the former secret while a rotation overlaps, and the public keys of
-- the tenant's own identity provider, by URL or as a document.
alter table tenants
    add column previous_secret       text,
    add column previous_secret_until timestamptz,
    add column jwks_url              text,
    add column jwks                  jsonb;
