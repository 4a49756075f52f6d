-- Full-text search over title and body (docs/adr/0013-search-indexed-by-searching.md). The index is filled by those
-- who search: an event that is stored costs nothing for it.

-- A text as lower-case words between single blanks. In scripts that are written without blanks (Thai to Khmer,
-- kana, Han) each character is a word. The same for what is stored and what is asked.
create function search_text(given text) returns text
language plpgsql immutable strict parallel safe as $$
declare
    t text := given;
begin
    if octet_length(t) <> length(t) then
        t := regexp_replace(normalize(t, nfkc),
                            '([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff])',
                            ' \1 ', 'g');
    end if;
    t := btrim(regexp_replace(lower(t), '[^[:alnum:]]+', ' ', 'g'));
    if t ~ '[^ ]{65}' then  -- a lexeme has a longest length, and nobody types more
        t := regexp_replace(t, '([^ ]{64})[^ ]+', '\1', 'g');
    end if;
    return t;
end
$$;

-- The words of a notification, each with its stream before it: a prefix is looked up among the user's own words,
-- whatever the others wrote.
create function search_words(stream bigint, content text) returns tsvector
language plpgsql immutable strict parallel safe as $$
declare
    document jsonb := ('{' || content || '}')::jsonb;
    t text := search_text(concat_ws(' ', document ->> 'title', document ->> 'body'));
begin
    if t = '' then
        return ''::tsvector;
    end if;
    return array_to_tsvector(string_to_array(stream || ':' || replace(t, ' ', ' ' || stream || ':'), ' '));
end
$$;

-- What finds them: every word of the text has to begin one of theirs. Null: the text holds no word.
create function search_query(stream bigint, asked text) returns tsquery
language sql immutable strict parallel safe as $$
    select string_agg('''' || stream || ':' || w || ''':*', ' & ')::tsquery
    from string_to_table(search_text(asked), ' ') as w
    where w <> ''
$$;

-- The words of notifications of users who search and have many. Not logged: after a crash, and at a replica that
-- takes over, both tables are empty and fill again.
create unlogged table search_documents (
    notification_id uuid primary key,
    words           tsvector not null
);
-- Without a pending list: every search would read it from end to end.
create index search_documents_words on search_documents using gin (words) with (fastupdate = off);

-- Up to which seq a stream has its words there.
create unlogged table search_progress (
    stream_id bigint primary key,
    seq       bigint not null
);

-- Whoever changes the content of a notification changes its words. The trigger names the column: an
-- acknowledgement or a read does not fire it. Words that were not there yet are written all the same: whoever is
-- indexing the former content at this moment then leaves these alone.
create function search_follow_content() returns trigger
language plpgsql as $$
begin
    insert into search_documents (notification_id, words)
    values (new.id, search_words(new.stream_id, new.content))
    on conflict (notification_id) do update set words = excluded.words;
    return null;
end
$$;
create trigger search_follow_content after update of content on notifications
    for each row execute function search_follow_content();

-- What is deleted is found no more, not even as a word. Once per statement on `notifications`; a month that is
-- detached and dropped leaves its words: `delete from search_documents where notification_id < ...`.
create function search_follow_delete() returns trigger
language plpgsql as $$
begin
    delete from search_documents d using gone g where d.notification_id = g.id;
    return null;
end
$$;
create trigger search_follow_delete after delete on notifications
    referencing old table as gone for each statement execute function search_follow_delete();
