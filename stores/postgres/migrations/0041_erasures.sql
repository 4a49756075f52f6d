-- What is still to be deleted of users who were erased, and since when their tokens no longer count. A user is named
-- by a hash: what erases everything must not keep the name.
create table erasures (
    erasure_id bigint generated always as identity primary key,
    tenant     text not null,
    user_hash  bytea not null,                          -- SHA-256 of the user's id
    slot       smallint not null,                       -- the owner of this slot goes on with it
    stream_id  bigint,                                  -- whose rows go; null: there was no stream
    erased_at  timestamptz not null,
    done_at    timestamptz
);
create index erasures_open on erasures (slot) where done_at is null;
create index erasures_user on erasures (tenant, user_hash, erased_at);
create index erasures_done on erasures (done_at) where done_at is not null;

-- A time as every answer of the API writes it.
create function rfc3339(t timestamptz) returns text
language sql stable strict parallel safe as $$
    select to_char(t at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"')
$$;
