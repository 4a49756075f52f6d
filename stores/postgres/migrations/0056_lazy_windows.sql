-- Windows of merging that nothing was merged into yet have no row of their own: the notification that began them
-- says all of it (carillon/merge_begun.py). Null in all others, which are in none of the indexes.

alter table notifications
    add column merging      text,    -- how it began windows, JSON
    add column merge_slot   bigint,  -- where one of them is found: its last day and a hash of its key
    add column merge_slot_2 bigint;  -- and the other, if there is one

create index notifications_merge_slot on notifications (stream_id, merge_slot) where merge_slot is not null;
create index notifications_merge_slot_2 on notifications (stream_id, merge_slot_2) where merge_slot_2 is not null;
