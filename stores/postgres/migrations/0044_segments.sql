-- The filter of a segment as PostgreSQL evaluates it (carillon/segments.py), made when the segment is put.
alter table segments
    add column path     jsonpath not null,
    add column vars     jsonb not null,
    add column platform boolean not null;               -- it asks for platforms: devices have to be looked at
