-- Users who want to be seen as offline: since when, null for those who do not.
alter table streams add column invisible_since timestamptz;
