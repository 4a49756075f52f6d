-- A push that was held and speaks for others is their `carrier`, as that of a digest is: should it end untold, they are
-- found by it, and decided again.
create index deliveries_carrier on deliveries (carrier) where carrier is not null;
