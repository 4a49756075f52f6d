-- One-time tickets for clients that can only set a URL (protocol.md). Deleted when redeemed; those that nobody
-- redeemed are deleted, a few at a time, when others are made.
create table tickets (
    ticket_hash bytea primary key,                     -- SHA-256; the ticket itself is not kept
    tenant      text not null,
    user_id     text not null,
    token_expires_ms bigint not null,                  -- of the token that asked: the connection ends with it
    token_issued_ms  bigint not null,
    expires_at  timestamptz not null
);
create index tickets_expiry on tickets (expires_at);
