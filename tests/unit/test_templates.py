"""Template documents: their rules, which text a user gets, and their parameters."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.shard_outbox import job_of
from carillon.external import EXTERNAL, IN_APP
from carillon.ids import UserKey
from carillon.notification import encode_content, text_of
from carillon.templates import (
    DEFAULT,
    HTML_MEMBERS,
    MEMBERS,
    Template,
    TemplateDocumentError,
    assemble,
    chain,
    check_params,
    completed,
    parse_locale,
    parse_reference,
    pick,
    plan_jobs,
    sources,
    validate,
)
from stores.postgres.shard_rows import Claimed

MINIMAL: dict[str, Any] = {"content": {"default": {"title": "Hi"}}}
LOCALES = st.sampled_from(["pt", "pt-BR", "pt-PT", "zh", "zh-Hant", "zh-Hant-TW", "de", "en-001"])
TEXTS = st.dictionaries(st.sampled_from(MEMBERS), st.text("ab{} n", min_size=1, max_size=6), max_size=4)
CONTENT = st.dictionaries(
    LOCALES | st.just(DEFAULT),
    st.builds(
        lambda texts, own: {"title": "T", **texts, "channels": own},
        TEXTS,
        st.dictionaries(st.sampled_from(sorted(EXTERNAL)), TEXTS, max_size=3),
    ),
    max_size=5,
).map(lambda content: {DEFAULT: {"title": "D", "channels": {}}, **content})
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["content", "params", "default", "title", "channels", "push", "type", "locale"])
            | st.text(max_size=5),
            inner,
            max_size=4,
        )
    ),
    max_leaves=15,
)


def errors(document: Any) -> list[str]:
    with pytest.raises(TemplateDocumentError) as caught:
        validate(document)
    return [error.path for error in caught.value.errors]


def test_the_chain_of_locales() -> None:
    """pt-BR -> pt -> default."""
    assert chain("pt-BR") == ("pt-BR", "pt", "default")
    assert chain("zh-Hant-TW") == ("zh-Hant-TW", "zh-Hant", "zh", "default")
    assert chain(None) == ("default",)


def test_locales_are_written_in_one_way() -> None:
    """However a device writes its locale, it finds the texts."""
    assert [parse_locale(x) for x in ("pt_br", "PT-BR", "zh_hant_tw", "en-001", "de")] == [
        "pt-BR", "pt-BR", "zh-Hant-TW", "en-001", "de",
    ]  # fmt: skip
    assert [parse_locale(x) for x in ("", "english", "p", 5, None, "pt-BR\n", "a\0b")] == [None] * 7


def test_references_name_a_version_or_the_present_one() -> None:
    """welcome and welcome@3."""
    assert parse_reference("welcome") == ("welcome", None)
    assert parse_reference("a.b-c_d@12") == ("a.b-c_d", 12)
    assert [parse_reference(x) for x in ("", "@1", "a@0", "a@b", "a/b", "a@1@2", 7)] == [None] * 7


@pytest.mark.parametrize(
    ("document", "paths"),
    [
        ([], [""]),
        ({}, ["content"]),
        ({"content": {}}, ["content"]),
        ({"content": {"pt": {"title": "x"}}}, ["content/default"]),
        ({"content": {"default": {"body": "x"}}}, ["content/default/title"]),
        ({"content": {"default": {"title": ""}}}, ["content/default/title"]),
        ({"content": {"default": {"title": "x", "subject": "y"}}}, ["content/default/subject"]),
        ({"content": {"default": {"title": "x"}, "pt_BR": {"title": "x"}}}, ["content/pt_BR"]),
        ({"content": {"default": {"title": "x", "channels": {"fax": {}}}}}, ["content/default/channels/fax"]),
        ({**MINIMAL, "escape": "xml"}, ["escape"]),
        ({**MINIMAL, "locale": "English"}, ["locale"]),
        ({**MINIMAL, "params": {"a b": {}}}, ["params/a b"]),
        ({**MINIMAL, "params": {"a": {"type": "date"}}}, ["params/a/type"]),
        ({**MINIMAL, "params": {"a": {"type": "number", "default": "x"}}}, ["params/a/default"]),
        ({**MINIMAL, "params": {"a": {"require": True}}}, ["params/a/require"]),
        ({**MINIMAL, "other": 1}, ["other"]),
        ({**MINIMAL, "description": "\0"}, ["description"]),
        ({"content": {"default": {"title": "x" * 16_385}}}, ["content/default/title"]),
    ],
)
def test_rules_of_documents(document: Any, paths: list[str]) -> None:
    """What breaks a rule is named by its place."""
    assert errors(document) == paths


@given(JSON)
def test_any_json_is_judged(document: Any) -> None:
    """Whatever is sent: a valid document or a list of errors."""
    try:
        validate(document)
    except TemplateDocumentError as exc:
        refused = exc.errors
    else:
        refused = None
    if refused is not None:
        assert refused
        return
    assert dict(sources(document))
    full = completed(document, {})
    assert set(full["params"]) == set(document.get("params", {}))


@given(CONTENT, LOCALES | st.none(), st.sampled_from([IN_APP, *EXTERNAL]))
def test_the_nearest_locale_wins(content: dict[str, Any], locale: str | None, channel: str) -> None:
    """Title and body are of the first locale of the chain, the channel's own before those of all;
    URLs may come from further along the chain."""
    used, texts = pick(content, locale, channel)
    steps = [name for name in chain(locale) if name in content]
    assert used == steps[0]
    for name in MEMBERS:
        candidates = [
            text
            for at in (steps[:1] if name in HTML_MEMBERS else steps)
            for text in (content[at]["channels"].get(channel, {}).get(name), content[at].get(name))
            if text is not None
        ]
        assert texts.get(name) == (candidates[0] if candidates else None)


@given(CONTENT, LOCALES | st.none(), st.sampled_from(["html", "none"]))
def test_every_channel_tells_its_own_text(content: dict[str, Any], locale: str | None, escape: str) -> None:
    """What push, fcm and apns tell is what rendering their texts one by one would make."""
    template = Template("t", 3, {"content": content, "escape": escape})
    used, jobs = plan_jobs(template, content, locale, {})

    def made(job: Any) -> dict[str, str]:
        return {
            m: f"{s.strip()}{'!' if job.html and m in HTML_MEMBERS and '{' in s else ''}"
            for m, s in job.sources.items()
        }

    planned = [(channel, made(job)) for channel, job in jobs]
    try:
        rendered = assemble(used, 3, planned)
    except TemplateDocumentError:  # an empty title
        return
    members = {**rendered.members, "channelContent": rendered.channels}
    for channel, provider in (("push", "fcm"), ("push", "apns"), ("fcm", "fcm"), ("apns", "apns")):
        push = pick(content, locale, "push")[1]
        wanted = {**push, **content[used]["channels"].get(provider, {})}
        for name in MEMBERS:
            assert text_of(members, channel, provider, name) == (wanted.get(name, "").strip() or None)


def test_parameters_are_those_used_or_those_declared() -> None:
    """Undeclared, they are found in the texts; declared, a text may use no other."""
    used = {"content/default/title": {"who"}, "content/pt/body": {"n", "who"}}
    assert completed(MINIMAL, used)["params"] == {"n": {}, "who": {}}
    declared = {**MINIMAL, "params": {"who": {}, "spare": {}}}
    with pytest.raises(TemplateDocumentError) as caught:
        completed(declared, used)
    assert [(e.path, e.got) for e in caught.value.errors] == [("content/pt/body", "n")]
    assert completed({**declared, "params": {"who": {}, "n": {}}}, used)["params"].keys() == {"who", "n"}


def test_parameters_are_checked_before_anything_is_rendered() -> None:
    """Missing, of another type, unknown: each is named; defaults are filled in."""
    rules = {
        "who": {"type": "text"},
        "n": {"type": "number", "default": 1},
        "note": {"required": False},
        "ok": {"type": "boolean"},
        "xs": {"type": "array"},
    }
    document = {**MINIMAL, "params": rules}
    full = {"who": "Ada", "ok": False, "xs": []}
    assert check_params(document, full) == {**full, "n": 1}
    with pytest.raises(TemplateDocumentError) as caught:
        check_params(document, {"n": True, "ok": "yes", "xs": None, "more": 1})
    assert [(e.path, e.expected, e.got) for e in caught.value.errors][:4] == [
        ("params/who", "text", "nothing"),
        ("params/n", "number", "true"),
        ("params/ok", "boolean", "yes"),
        ("params/xs", "array", "nothing"),
    ]
    assert caught.value.errors[4].path == "params/more"
    assert "who" in caught.value.errors[4].expected


def test_what_is_offered_need_not_be_taken() -> None:
    """Of what a digest's template may use it names what it wants; that there is no category is a value."""
    document = {"params": {"count": {}, "category": {}}}
    offered = {"count": 2, "category": None, "titles": ["a"]}
    assert check_params(document, offered, offered=True) == {"count": 2, "category": None}
    with pytest.raises(TemplateDocumentError):
        check_params(document, offered)
    with pytest.raises(TemplateDocumentError):
        check_params(document, {"count": 2}, offered=True)


@pytest.mark.parametrize(
    ("texts", "path"),
    [
        ({"title": " "}, "title"),
        ({"title": "x" * 256}, "title"),
        ({"title": "x", "body": "ä" * 2049}, "body"),
        ({"title": "x", "link": "javascript:alert(1)"}, "link"),
        ({"title": "x", "link": " JaVa\tScript:alert(1)"}, "link"),
        ({"title": "x", "imageUrl": "data:text/html,x"}, "imageUrl"),
        ({"title": "a\0b"}, "title"),
        ({"title": "\ud800"}, "title"),
    ],
)
def test_what_is_rendered_keeps_the_limits_of_events(texts: dict[str, str], path: str) -> None:
    """A text beyond a limit, or a link that runs a script, is refused."""
    with pytest.raises(TemplateDocumentError) as caught:
        assemble(DEFAULT, 1, [(IN_APP, texts)])
    assert caught.value.errors[0].path == path


def test_pushes_tell_the_text_of_their_channel() -> None:
    """The job for a provider has the channel's own title and body; an event without them has one text."""
    members = {"title": "a &amp; b", "body": "x", "channelContent": {"push": {"title": "a & b", "body": ""}}}
    row = Claimed(1, 1, 0, UserKey("t", "u"), 0, bytes(16), 1, "t", 1, encode_content(members), None, [])
    job = job_of(row, members, "fcm", [])
    assert (job.title, job.body) == ("a & b", None)
    del members["channelContent"]
    assert job_of(row, members, "fcm", []).title == "a &amp; b"
