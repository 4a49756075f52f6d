-- How many broadcasts of a tenant have not ended: counted whenever one is made.
create index broadcasts_open on broadcasts (tenant) where ended_at is null;
