-- Who got which variant of a template: written before the notification, so that none is missing; one whose
-- notification was never stored counts for nothing.
create table template_exposures (
    notification_id uuid primary key,
    tenant      text not null references tenants on delete cascade,
    template_id text not null,
    version     integer not null,
    variant     text not null
);
create index template_exposures_template on template_exposures (tenant, template_id, version);
