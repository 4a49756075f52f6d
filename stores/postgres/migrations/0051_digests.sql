-- Digests (carillon/digest.py): pushes that wait together and are told together.

alter table deliveries
    add column digest uuid,    -- the digest it waits in, or was told in
    add column carrier bigint; -- told: the row whose push spoke for it (its own id: it is the one)

-- Told digests stay until their notifications go; those that are open are found by the second index.
create index deliveries_digest on deliveries (stream_id, digest) where digest is not null;
create index deliveries_digest_open on deliveries (stream_id)
    where digest is not null and carrier is null and state in ('planned', 'sending');
-- The next moment at which something that rules hold is due: read once after a shard began, then as it passes.
create index deliveries_deferred on deliveries (slot, due_at) where state = 'planned' and gate = 'deferred';
