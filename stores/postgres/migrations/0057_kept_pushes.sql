-- Pushes that wait for an acknowledgement are kept in their notification until they need rows of the outbox
-- (docs/adr/0016-kept-pushes.md).
alter table notifications add column kept text;  -- carillon/kept_push.py; begins with "[" while it waits

-- Notifications from this id on may keep pushes, by the shard that appended them. What is older is in the outbox.
create table kept_marks (
    shard   text primary key,
    from_id uuid not null
);
-- The same of slots whose owner was taken them; null once their new owner has moved all of it to the outbox.
alter table slots add column kept_from uuid;
