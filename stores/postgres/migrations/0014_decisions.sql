-- Why a notification went where it went: the rules of preferences and tenants that fired (carillon.decision.pack).
-- Null where none did, so that whoever has no rules pays nothing.
alter table notifications add column decision text;
