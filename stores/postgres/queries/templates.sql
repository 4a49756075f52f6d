-- Templates and what decides which of their texts a user gets.

-- name: template
-- $1 tenant, $2 id, $3 version (null: the present one).
select template_id, version, document, (extract(epoch from created_at) * 1000)::bigint as created_ms
from templates where tenant = $1 and template_id = $2 and ($3::int is null or version = $3)
order by version desc limit 1;

-- name: put_template
-- A new version; two that come at once get two numbers or one of them no row. $3 document, $4 who.
insert into templates (tenant, template_id, version, document, created_by)
select $1, $2, coalesce(max(version), 0) + 1, $3, $4 from templates where tenant = $1 and template_id = $2
on conflict do nothing
returning version;

-- name: prune_versions
-- Old versions of one template. $3 the newest version that goes.
delete from templates where tenant = $1 and template_id = $2 and version <= $3;

-- name: delete_template
-- All versions.
delete from templates where tenant = $1 and template_id = $2 returning version;

-- name: templates
-- The present versions, by id. $2 after this id (null: from the first), $3 limit.
select distinct on (template_id) template_id, version, document,
       (extract(epoch from created_at) * 1000)::bigint as created_ms
from templates where tenant = $1 and ($2::text is null or template_id > $2)
order by template_id, version desc limit $3;

-- name: versions
-- $1 tenant, $2 id. Newest first.
select version, created_by, (extract(epoch from created_at) * 1000)::bigint as created_ms
from templates where tenant = $1 and template_id = $2 order by version desc limit 1000;

-- name: locales
-- The language of users: that of the device registered last that names one, else of the profile. $1 tenant, $2 users.
select distinct on (user_id) user_id, locale from (
    select user_id, locale, 0 as place, registered_at from devices
    where tenant = $1 and user_id = any ($2::text[]) and locale is not null
    union all
    select user_id, locale, 1, updated_at from profiles
    where tenant = $1 and user_id = any ($2::text[]) and locale is not null
) as told
order by user_id, place, registered_at desc;

-- name: expose
-- Who gets which variant. $1 tenant, $2 notifications, $3 templates, $4 versions, $5 variants.
insert into template_exposures (notification_id, tenant, template_id, version, variant)
select t.id, $1, t.template, t.version, t.variant
from unnest($2::uuid[], $3::text[], $4::int[], $5::text[]) as t (id, template, version, variant)
on conflict do nothing;

-- name: exposure
-- Which variant a notification shows. $1 tenant, $2 notification.
select template_id, version, variant from template_exposures where notification_id = $2 and tenant = $1;

-- name: results
-- $1 tenant, $2 template, $3 version.
select e.variant, count(n.id) as sent, count(n.delivered_at) as delivered, count(n.seen_at) as seen,
       count(n.clicked_at) as clicked
from template_exposures e join notifications n on n.id = e.notification_id
where e.tenant = $1 and e.template_id = $2 and e.version = $3
group by e.variant order by e.variant;
