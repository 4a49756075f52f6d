-- Users beyond their streams: profiles, topics, segments; and the order in which an audience is walked.

create table profiles (
    tenant     text not null,
    user_id    text not null,
    slot       smallint not null,
    email      text,
    phone      text,
    locale     text,
    timezone   text,
    attributes jsonb not null default '{}',
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now(),
    primary key (tenant, user_id)
);

create table topic_subscribers (
    tenant     text not null,
    topic      text not null,
    slot       smallint not null,
    user_id    text not null,
    created_at timestamptz not null default now(),
    primary key (tenant, topic, slot, user_id)
);
create index topic_subscribers_user on topic_subscribers (tenant, user_id, topic);  -- the topics of a user

create table segments (
    tenant     text not null references tenants on delete cascade,
    segment_id text not null,
    document   text not null,                           -- JSON {name, filter} (carillon/segments.py)
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now(),
    primary key (tenant, segment_id)
);

-- An audience is walked slot by slot, each in the order of its users (stores/postgres/audience.py). None of these
-- columns ever changes: updates of streams stay on their pages.
create index streams_slot on streams (tenant, slot, user_id);
create index profiles_slot on profiles (tenant, slot, user_id);
