-- Notifications that are edited, retracted and cancelled by the service that sent them.

alter table notifications
    add column version integer,            -- of the content; null: 1, it was never edited
    add column cancelled_at timestamptz;   -- what was still pending was stopped; what is shown stays

-- A push that was on its way while its text changed: it shows the former one.
alter table deliveries add column stale boolean;

-- What was done, when and by whom, with the content it replaced. `act_id` is minted before the first try, so that
-- a repeated one finds itself here.
create table amendments (
    notification_id uuid not null,
    act_id          uuid not null,
    stream_id       bigint not null,
    act             text not null,         -- edit | retract | cancel
    at              timestamptz not null,
    actor           text not null,         -- "key:<key id>", as in `audit`
    version         integer,               -- edit: the version it made
    former          text,                  -- edit: the content before, as in notifications.content
    primary key (notification_id, act_id)
);
create index amendments_stream on amendments (stream_id);  -- for whoever erases or exports a user
