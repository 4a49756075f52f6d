-- Segments as they are kept. $1 tenant, $2 segment.

-- name: put
-- $3 document, $4 path, $5 variables, $6 whether it asks for platforms, $7 now (seconds).
insert into segments (tenant, segment_id, document, path, vars, platform, created_at, updated_at)
values ($1, $2, $3, $4::text::jsonpath, $5::jsonb, $6, to_timestamp($7), to_timestamp($7))
on conflict (tenant, segment_id) do update
    set document = excluded.document, path = excluded.path, vars = excluded.vars, platform = excluded.platform,
        updated_at = excluded.updated_at;

-- name: get
select segment_id, document, (extract(epoch from created_at) * 1000)::bigint as created_ms,
       (extract(epoch from updated_at) * 1000)::bigint as updated_ms
from segments where tenant = $1 and segment_id = $2;

-- name: page
-- Behind $2, by id. $3 limit.
select segment_id, document, (extract(epoch from created_at) * 1000)::bigint as created_ms,
       (extract(epoch from updated_at) * 1000)::bigint as updated_ms
from segments where tenant = $1 and segment_id > $2 order by segment_id limit $3;

-- name: delete
delete from segments where tenant = $1 and segment_id = $2 returning segment_id;
