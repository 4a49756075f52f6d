-- Full-text search in a user's feed (stores/postgres/search.py).
--
-- $1 stream, $2 what is asked, $3 below this position, $4 now, $5 limit, $6 type, $7 category, $8 status.

-- name: place
-- Where a stream is, and how far its words are indexed. $1 tenant, $2 user.
select s.stream_id, s.seq,
       coalesce((select p.seq from search_progress p where p.stream_id = s.stream_id), 0) as indexed
from streams s
where s.tenant = $1 and s.user_id = $2;

-- name: wanted
-- The part of both searches that says what the feed shows.
n.position < $3 and n.retracted_at is null
    and (n.archived_at is not null or n.dismissed_at is not null) = ($8::text is not distinct from 'archived')
    and (n.expires_at is null or n.expires_at > to_timestamp($4::float8))
    and ($6::text is null or n.type = $6)
    and ($7::text is null or n.category = $7)
    and ($8::text is distinct from 'read' or n.read_at is not null)
    and ($8::text is distinct from 'unread' or n.read_at is null)

-- name: matches
-- The part that takes a row's words apart. Not those of a row that lacks the longest word asked for, which is told
-- for a fraction of that: text in normal form (ASCII is) holds its words as `search_text` has them.
(strpos(lower(n.content), (select w from string_to_table(search_text($2), ' ') w order by length(w) desc limit 1)) > 0
    or (octet_length(n.content) <> length(n.content) and n.content is not nfkc normalized))
    and search_words($1, n.content) @@ (select search_query($1, $2))

-- name: walk
-- The matches among the newest $9 rows. Index: notifications_feed.
select %(row)s
from (
    select * from notifications f
    where f.stream_id = $1 and f.position < $3
    order by f.position desc
    limit $9
) n
where %(wanted)s
  and %(matches)s
order by n.position desc
limit $5;

-- name: search
-- All matches: by the index up to seq $9, row by row after it. Indexes: search_documents_words,
-- notifications_seq.
select %(row)s
from (
    select f.*
    from search_documents d
    cross join lateral (select * from notifications t where t.id = d.notification_id limit 1) f
    where d.words @@ (select search_query($1, $2)) and f.stream_id = $1 and f.seq <= $9
    union all
    select n.* from notifications n
    where n.stream_id = $1 and n.seq > $9
      and %(matches)s
) n
where %(wanted)s
order by n.position desc
limit $5;

-- name: fill
-- Index the words of some notifications more. $1 stream, $2 after seq, $3 how many. Answers the seq reached, no
-- row if there was nothing. Rows are kept from being deleted meanwhile; seqs of a stream are committed in order
-- (its row in `streams` is locked), so that nothing below the one reached can appear later.
with todo as materialized (
    select n.id, n.seq, n.content from notifications n
    where n.stream_id = $1 and n.seq > $2
    order by n.seq
    limit $3
    for key share
),
added as (
    insert into search_documents (notification_id, words)
    select t.id, search_words($1, t.content) from todo t
    on conflict (notification_id) do nothing
)
insert into search_progress as p (stream_id, seq)
select $1, max(t.seq) from todo t having count(*) > 0
on conflict (stream_id) do update set seq = greatest(p.seq, excluded.seq)
returning p.seq;
