-- Tenants and their API keys. Small tables, read through a cache of the ingress (ingress.auth_cache_s).

-- name: tenant
-- One tenant by its name.
select tenant, client_secret, settings, jwks_url, jwks, previous_secret,
       (extract(epoch from previous_secret_until) * 1000)::bigint as previous_until_ms
from tenants where tenant = $1;

-- name: tenants
-- All names, for the command line.
select tenant from tenants order by tenant;

-- name: create_tenant
-- No row comes back if the name is taken.
insert into tenants (tenant, client_secret) values ($1, $2)
on conflict (tenant) do nothing
returning tenant, client_secret, settings;

-- name: rotate_secret
-- A new client secret; the one before stays valid until $3 (seconds since the epoch).
update tenants set previous_secret = client_secret, previous_secret_until = to_timestamp($3), client_secret = $2
where tenant = $1 returning tenant;

-- name: put_jwks
-- Where the public keys are ($2), or the keys themselves ($3); both null: only the secret signs.
update tenants set jwks_url = $2, jwks = $3::jsonb where tenant = $1 returning tenant;

-- name: create_key
insert into api_keys (key_id, key_hash, tenant, name, scopes, rate_per_s, burst) values ($1, $2, $3, $4, $5, $6, $7);

-- name: rotate_key
-- A key like another one, which ends at $5 (seconds since the epoch). $1 new id, $2 its hash, $3 tenant, $4 old id.
with old as (
    update api_keys set expires_at = to_timestamp($5), rotated_to = $1
    where tenant = $3 and key_id = $4 and revoked_at is null and rotated_to is null
      and (expires_at is null or expires_at > to_timestamp($6))
    returning name, scopes, rate_per_s, burst
)
insert into api_keys (key_id, key_hash, tenant, name, scopes, rate_per_s, burst)
select $1, $2, $3, name, scopes, rate_per_s, burst from old
returning key_id;

-- name: limit_key
-- $3 events per second (null: no limit), $4 events at once.
update api_keys set rate_per_s = $3, burst = $4 where tenant = $1 and key_id = $2 returning key_id;

-- name: record_audit
insert into audit (tenant, actor, action, target, detail) values ($1, $2, $3, $4, $5::jsonb);

-- name: audit
-- Newest first. $1 tenant (null: all), $2 before this id (null: from the newest), $3 limit.
select id, (extract(epoch from at) * 1000)::bigint as at_ms, tenant, actor, action, target, detail from audit
where ($1::text is null or tenant = $1) and ($2::bigint is null or id < $2)
order by id desc limit $3;

-- name: api_key
-- The look-up of every request that is not cached: by the unique hash, with what its tenant is limited to.
select k.key_id, k.tenant, k.name, k.scopes, k.revoked_at is not null as revoked, k.rate_per_s, k.burst,
       (extract(epoch from k.expires_at) * 1000)::bigint as expires_ms, t.settings -> 'limits' as limits
from api_keys k join tenants t using (tenant) where k.key_hash = $1;

-- name: list_keys
-- Newest first; revoked ones stay visible.
select key_id, tenant, name, scopes, revoked_at is not null as revoked,
       (extract(epoch from created_at) * 1000)::bigint as created_ms,
       (extract(epoch from last_used_at) * 1000)::bigint as last_used_ms,
       (extract(epoch from revoked_at) * 1000)::bigint as revoked_ms,
       (extract(epoch from expires_at) * 1000)::bigint as expires_ms, rotated_to, rate_per_s, burst
from api_keys where tenant = $1 order by created_at desc, key_id;

-- name: revoke_key
-- Keeps the time of the first revocation.
update api_keys set revoked_at = coalesce(revoked_at, now()) where tenant = $1 and key_id = $2 returning key_id;

-- name: touch_keys
-- Many keys at once; a late batch never moves the time back.
update api_keys set last_used_at = greatest(api_keys.last_used_at, used.at)
from (select * from unnest($1::text[], $2::timestamptz[])) as used(key_id, at)
where api_keys.key_id = used.key_id;

-- name: policy
-- The policy document, null if none is stored. $1 tenant.
select settings -> 'policy' as policy from tenants where tenant = $1;

-- name: stored_policy
-- The same with its version (0: nothing was ever stored) and since when it is the present one, in ms. $1 tenant.
select settings -> 'policy' as policy, policy_version as version,
       (extract(epoch from policy_at) * 1000)::bigint as since_ms
from tenants where tenant = $1;

-- name: put_policy
-- $1 tenant, $2 the document as text, $3 the version that it replaces (null: any). The same document again is no new
-- version: a request that is repeated changes nothing.
update tenants set
    settings = jsonb_set(settings, '{policy}', $2::jsonb),
    policy_version = policy_version + (settings -> 'policy' is distinct from $2::jsonb)::integer,
    policy_at = case when settings -> 'policy' is distinct from $2::jsonb then now() else policy_at end
where tenant = $1 and ($3::integer is null or policy_version = $3)
returning policy_version as version, (extract(epoch from policy_at) * 1000)::bigint as since_ms;

-- name: limits
-- The document of limits (carillon/limits.py), null if none is stored. $1 tenant.
select settings -> 'limits' as limits from tenants where tenant = $1;

-- name: put_limits
-- $1 tenant, $2 members to set, as text; those that are null are taken out.
update tenants set settings = jsonb_set(
    settings, '{limits}', jsonb_strip_nulls(coalesce(settings -> 'limits', '{}') || $2::jsonb)
) where tenant = $1 returning tenant;

-- name: user_security
-- Since when tokens of a user count (POST .../sessions/revoke), in ms, and which were logged out; no row: the user
-- never had a stream, or has none since it was erased long ago.
select (extract(epoch from s.tokens_valid_from) * 1000)::bigint as valid_from_ms,
       array(select r.token_id from revoked_tokens r where r.stream_id = s.stream_id and r.expires_at > now()) as revoked
from streams s where s.tenant = $1 and s.user_id = $2
union all
select (extract(epoch from max(e.erased_at)) * 1000)::bigint, '{}'
from erasures e where e.tenant = $1 and e.user_hash = sha256(convert_to($2::text, 'UTF8'))
having max(e.erased_at) is not null and not exists (select from streams t where t.tenant = $1 and t.user_id = $2);
