-- What follows when a channel ends without success.

alter table deliveries
    add column chain text not null default '',          -- channels that follow, joined by commas
    add column step  smallint not null default 0;       -- 0: a channel the event asked for; n: its n-th fallback
