-- Tokens that were logged out, until they would have ended by themselves.
create table revoked_tokens (
    stream_id  bigint not null,
    token_id   bytea not null,                         -- carillon.tokens.token_id
    expires_at timestamptz not null,
    primary key (stream_id, token_id)
);
create index revoked_tokens_end on revoked_tokens (expires_at);

alter table tickets add column token_id bytea not null default '';
