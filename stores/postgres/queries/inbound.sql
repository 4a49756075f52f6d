-- Sources of webhooks.

-- name: put_source
-- $1 a new id, $2 tenant, $3 name, $4 document, $5 a new secret, $6 the secret was given, $7 until when a replaced
-- one signs, too (seconds). A source that is there keeps its id, and its secret unless one was given.
insert into inbound_sources as s (source_id, tenant, name, document, secret)
values ($1, $2, $3, $4, $5)
on conflict (tenant, name) do update
    set document = excluded.document, updated_at = now(),
        previous_secret = case when $6 and s.secret <> $5 then s.secret else s.previous_secret end,
        previous_until = case when $6 and s.secret <> $5 then to_timestamp($7) else s.previous_until end,
        secret = case when $6 then $5 else s.secret end
returning source_id, xmax = 0 as made;

-- name: sources
-- $1 tenant, $2 name (null: all).
select source_id, tenant, name, document, secret, previous_secret,
       (extract(epoch from previous_until) * 1000)::bigint as previous_until_ms,
       (extract(epoch from created_at) * 1000)::bigint as created_ms
from inbound_sources where tenant = $1 and ($2::text is null or name = $2) order by name limit 1000;

-- name: source
-- $1 id.
select source_id, tenant, name, document, secret, previous_secret,
       (extract(epoch from previous_until) * 1000)::bigint as previous_until_ms,
       (extract(epoch from created_at) * 1000)::bigint as created_ms
from inbound_sources where source_id = $1;

-- name: delete_source
delete from inbound_sources where tenant = $1 and name = $2 returning source_id;
