-- A batch that was merged beside an erasure left rows of the user behind, who is no longer there to own them. A push
-- among them was claimed for ever.

with gone as (
    delete from deliveries d
    where d.state in ('planned', 'sending', 'unknown', 'failed')
      and (not exists (select from streams s where s.stream_id = d.stream_id)
           or not exists (select from notifications n where n.id = d.notification_id))
    returning d.id
)
delete from delivery_attempts a using gone where a.delivery_id = gone.id;

delete from merge_windows w where not exists (select from streams s where s.stream_id = w.stream_id);

delete from merged_events e where not exists (select from streams s where s.stream_id = e.stream_id);
