-- Deliveries that were given up, by tenant, and their replay.

alter table deliveries
    add column tenant       text,                        -- set when the row dies: dead letters are listed by it
    add column base_attempt smallint not null default 0, -- tries before the last replay: they no longer count
    add column replayed_at  timestamptz;
update deliveries d set tenant = s.tenant from streams s where s.stream_id = d.stream_id and d.state = 'dead';
-- `updated_at` of a dead row is when it died.
create index deliveries_dead on deliveries (tenant, updated_at desc, id desc) where state = 'dead';
create index deliveries_dead_stream on deliveries (stream_id, updated_at desc, id desc) where state = 'dead';
