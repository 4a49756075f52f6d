-- How the user was reached when the notification was planned (carillon.explain.receipt_of), for GET .../explain.
alter table notifications add column receipt smallint;
