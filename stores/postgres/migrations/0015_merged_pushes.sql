-- A push that was held may speak for others, which are cancelled then: for how many, itself included.
alter table deliveries add column merged smallint;
