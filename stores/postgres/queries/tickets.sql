-- One-time tickets.

-- name: make
-- $1 hash, $2 tenant, $3 user, $4 end of the token (ms), $5 its issue (ms), $6 end of the ticket, $7 now (seconds),
-- $8 the token's id.
with stale as (
    delete from tickets where ticket_hash = any (
        array(select ticket_hash from tickets where expires_at < to_timestamp($7) limit 100 for update skip locked))
)
insert into tickets (ticket_hash, tenant, user_id, token_expires_ms, token_issued_ms, expires_at, token_id)
values ($1, $2, $3, $4, $5, to_timestamp($6), $8);

-- name: redeem
-- Once: whoever deletes the row has it. $1 hash, $2 now (seconds).
delete from tickets where ticket_hash = $1
returning tenant, user_id, token_expires_ms, token_issued_ms, token_id, expires_at > to_timestamp($2) as valid;
