"""Validation of POST /v1/events."""

from __future__ import annotations

import json
from collections import defaultdict
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from carillon.event_rules import LAST_EXPIRY_MS, expiry_ms, explain_event
from carillon.events import EventBody, EventParser, NotPlainError, ProblemError
from carillon.external import CHANNELS, EXTERNAL
from carillon.ids import Uuid7Source, slot_of
from carillon.messages import Dedupe
from carillon.notification import encode_content
from carillon.problems import problem, problem_json
from carillon.templates import Rendered

NOW = 1_700_000_000_123
PARSER = EventParser(Uuid7Source())
MINIMAL = {"userId": "ada", "type": "t", "title": "x"}


RENDERED = Rendered({"title": "Hi"}, {"push": {"title": "Ho"}}, "default")


def parse(document: Any, key: str | None = None) -> Any:
    """Parse; whatever names a template gets the same text for everybody."""
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    try:
        return PARSER.parse(body, "acme", NOW, key)
    except NotPlainError as wanted:
        made = {index: defaultdict(lambda: RENDERED) for index in range(1000)}
        return PARSER.parse_prepared(wanted.document, made, "acme", NOW, key)


def refusal(document: Any) -> Any:
    with pytest.raises(ProblemError) as caught:
        parse(document)
    return caught.value.problem


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec=None), max_size=300),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
NAMES = st.sampled_from(sorted(f.encode_name for f in msgspec.structs.fields(EventBody)))
NEAR_DEDUPE = st.dictionaries(
    st.sampled_from(("key", "windowS", "merge")) | st.text(max_size=3),
    JSON_VALUES | st.sampled_from(("drop", "count", "replace", "accumulate", 1, 86_400.5, 0.001, "a\x01")),
    max_size=3,
)
NEAR_EVENTS = st.builds(
    lambda some, dedupe, aggregate: MINIMAL | some | dedupe | aggregate,
    st.dictionaries(NAMES | st.text(max_size=5), JSON_VALUES, max_size=8),
    st.just({}) | st.fixed_dictionaries({"dedupe": NEAR_DEDUPE}),
    st.just({}) | st.fixed_dictionaries({"aggregate": st.booleans()}),
)

PLAIN = st.text(st.characters(codec="utf-8", exclude_categories=("Cc",)), min_size=1, max_size=64)
LOOSE = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=255)
SAFE = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | LOOSE
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(LOOSE, inner, max_size=4),
    max_leaves=12,
)  # fmt: skip
VALID = st.fixed_dictionaries(
    {"userId": PLAIN, "type": PLAIN, "title": LOOSE},
    optional={
        "body": LOOSE,
        "category": PLAIN,
        "priority": st.sampled_from(["low", "normal", "high", "urgent", "critical"]),
        "actorId": PLAIN,
        "targetType": PLAIN,
        "targetId": PLAIN,
        "imageUrl": PLAIN,
        "icon": PLAIN,
        "link": PLAIN,
        "data": st.dictionaries(LOOSE, SAFE, max_size=4),
        "actions": st.lists(
            st.fixed_dictionaries(
                {},
                optional={
                    "id": PLAIN,
                    "label": LOOSE,
                    "action": PLAIN,
                    "url": PLAIN,
                    "method": st.sampled_from(["GET", "POST"]),
                    "payload": st.dictionaries(LOOSE, SAFE, max_size=3),
                },
            ),
            max_size=10,
        ),
        "channels": st.lists(st.sampled_from(CHANNELS), min_size=1, max_size=4),
        "collapseKey": PLAIN,
        "expiresAt": st.datetimes(min_value=datetime(1970, 1, 2)).filter(  # noqa: DTZ001  hypothesis wants naive bounds
            lambda at: at.year < 9998
        ).map(lambda at: at.isoformat() + "+01:00"),
        "campaignId": PLAIN,
        "sourceApp": PLAIN,
        "idempotencyKey": PLAIN,
        "aggregate": st.sampled_from([False, True, None]),
        "dedupe": st.fixed_dictionaries(
            {},
            optional={"key": PLAIN, "windowS": st.sampled_from([1, 0.5, 86_400]), "merge": st.just("drop")},
        ),
        "fallback": st.lists(st.sampled_from(tuple(EXTERNAL)), max_size=4),
        "topic": st.none(),
        "template": st.none(),
    },
)  # fmt: skip


def outcome(document: Any) -> Any:
    """(parsed, None) or (None, problem)."""
    try:
        return parse(document), None
    except ProblemError as exc:
        return None, exc.problem


@given(st.binary(max_size=200))
def test_any_bytes_never_crash(body: bytes) -> None:
    """Whatever the bytes: an answer or a problem, never another exception."""
    parsed, told = outcome(body)
    assert parsed is not None or told.status in (400, 422)
    if told is not None:
        problem_json(told)


@settings(max_examples=150)
@given(JSON_VALUES | NEAR_EVENTS | st.lists(NEAR_EVENTS | JSON_VALUES, max_size=4))
def test_any_json_never_crashes(document: Any) -> None:
    """Whatever the JSON: an answer or a problem that can be written down."""
    parsed, told = outcome(document)
    if told is not None:
        assert told.status == 422
        problem_json(told)
    else:
        for slot in parsed.slots or []:
            assert (slot.refused is None) == (slot.event >= 0)


@settings(max_examples=200)
@given(NEAR_EVENTS)
def test_fast_and_slow_path_agree(document: dict[str, Any]) -> None:
    """The typed decoder accepts exactly what the rules, told one by one, accept."""
    text = json.dumps(document)
    explained = explain_event(json.loads(text), recipients=True)
    _, told = outcome(text.encode())
    assert (told is None) == (explained is None)
    if told is not None:
        assert "breaks a rule" not in told.detail


@settings(max_examples=150)
@given(VALID)
def test_valid_events_round_trip(document: dict[str, Any]) -> None:
    """A valid event becomes one with the same members, and the content that `encode_content` writes."""
    [event] = parse(document).events
    content = json.loads(f"{{{event.content}}}")
    for name, value in document.items():
        if name in ("userId", "idempotencyKey", "topic", "template"):
            continue
        if name == "aggregate":
            assert event.aggregate is value
            continue
        if name == "dedupe":
            assert event.dedupe == Dedupe(
                value.get("merge", "drop"), value.get("key"), round(value.get("windowS", 0) * 1000)
            )
            continue
        if name == "fallback":
            assert event.fallback == (list(dict.fromkeys(value)) or None)
            continue
        if name == "priority":
            assert content[name] == ("urgent" if value == "critical" else value)
        elif name == "channels":
            assert content[name] == list(dict.fromkeys(value)) == event.channels
        elif name == "expiresAt":
            assert content[name].endswith("Z")
        else:
            assert content[name] == value
    assert encode_content(content) == event.content
    assert event.slot == slot_of("acme", document["userId"])
    assert (event.user, event.type, event.created_ms) == (document["userId"], document["type"], NOW)


@given(st.lists(VALID, min_size=1, max_size=4))
def test_batch_equals_singles(documents: list[dict[str, Any]]) -> None:
    """A batch makes the same events as its items one by one."""
    batch = parse(documents)
    assert [slot.event for slot in batch.slots] == list(range(len(documents)))
    for document, event in zip(documents, batch.events, strict=True):
        [single] = parse(document).events
        assert (single.content, single.user, single.body_hash) == (event.content, event.user, event.body_hash)


@pytest.mark.parametrize(
    ("more", "path"),
    [
        ({"dedupe": "k"}, "dedupe"),
        ({"dedupe": {"window": 5}}, "dedupe/window"),
        ({"dedupe": {"key": ""}}, "dedupe/key"),
        ({"dedupe": {"key": "a\nb"}}, "dedupe/key"),
        ({"dedupe": {"windowS": 0}}, "dedupe/windowS"),
        ({"dedupe": {"windowS": 86_401}}, "dedupe/windowS"),
        ({"dedupe": {"windowS": True}}, "dedupe/windowS"),
        ({"dedupe": {"merge": "sum"}}, "dedupe/merge"),
        ({"dedupe": {"merge": "count"}, "aggregate": True}, "dedupe/merge"),
        ({"aggregate": "yes"}, "aggregate"),
    ],
)
def test_what_is_wrong_with_merging_is_named(more: dict[str, Any], path: str) -> None:
    """dedupe and aggregate: each rule that is broken is named."""
    assert refusal({**MINIMAL, **more}).errors[0].path == path


def test_required_fields_are_named() -> None:
    """What is missing is named, all of it at once."""
    assert [e.path for e in refusal({}).errors] == ["type", "title", "userId"]
    assert refusal(b"").errors == refusal({}).errors


def test_unknown_field_is_named() -> None:
    """An unknown field is 422 naming it, even when it is null."""
    assert refusal({**MINIMAL, "tittle": None}).errors[0].path == "tittle"


@pytest.mark.parametrize(
    "more",
    [
        {"fallback": ["email"]},
        {"topic": "t", "userId": None},
        {"channels": ["sms"]},
        {"channels": ["in_app", "webhook"]},
    ],
)
def test_later_fields_are_not_supported(more: dict[str, Any]) -> None:
    """What is known and not built yet is refused as not_supported, never ignored."""
    told = refusal({**MINIMAL, **more})
    assert (told.status, told.code) == (422, "not_supported")


@pytest.mark.parametrize(
    ("more", "path"),
    [
        ({"params": {}}, "params"),
        ({"locale": "pt"}, "locale"),
        ({"template": "t", "body": "x"}, "body"),
        ({"template": "t@0"}, "template"),
        ({"template": "../t"}, "template"),
        ({"template": 5}, "template"),
        ({"template": "t", "params": []}, "params"),
        ({"template": "t", "locale": "Portuguese"}, "locale"),
    ],
)
def test_rules_of_templates(more: dict[str, Any], path: str) -> None:
    """Parameters and locale belong to a template, which stands instead of a body."""
    told = refusal({**MINIMAL, **more})
    assert (told.code, [e.path for e in told.errors]) == ("invalid", [path])


def test_a_template_writes_the_content() -> None:
    """Its texts become the event's, those the event names itself win, and other channels keep their own."""
    body = {"userId": "ada", "type": "t", "template": "welcome@3", "params": {"a": 1}, "idempotencyKey": "k"}
    [event] = parse(body).events
    content = json.loads(f"{{{event.content}}}")
    assert content["title"] == "Hi"
    assert content["channelContent"] == {"push": {"title": "Ho"}}
    assert encode_content(content) == event.content
    assert "template" not in content
    assert json.loads(f"{{{parse({**body, 'title': 'Mine'}).events[0].content}}}")["title"] == "Mine"


def test_the_body_hash_is_of_what_was_sent() -> None:
    """A template that changed between two tries does not make another body of the same request."""
    body = {
        "userIds": ["ada", "bob"],
        "type": "t",
        "template": "t",
        "params": {"a": 1},
        "idempotencyKey": "k",
    }
    first = parse(body).events
    other = PARSER.parse_prepared(
        body, {0: dict.fromkeys(("ada", "bob"), Rendered({"title": "Other"}, {}, "de"))}, "acme", NOW
    ).events
    assert [e.body_hash for e in first] == [e.body_hash for e in other]
    assert first[0].content != other[0].content
    assert parse({**body, "params": {"a": 2}}).events[0].body_hash != first[0].body_hash


def test_one_failing_template_fails_its_item() -> None:
    """A problem of one item's template is that item's; recipients of one event may get different texts."""
    bad = problem("template_failed", "no")
    item = {"userId": "ada", "type": "t", "template": "t"}
    parsed = PARSER.parse_prepared([item, MINIMAL], {0: bad}, "acme", NOW)
    assert [slot.refused for slot in parsed.slots or []] == [bad, None]
    many = {"userIds": ["ada", "", "bob"], "type": "t", "template": "t"}
    texts = {"ada": Rendered({"title": "A"}, {}, "x"), "bob": Rendered({"title": "B"}, {}, "y")}
    parsed = PARSER.parse_prepared(many, {0: texts}, "acme", NOW)
    assert ['"title":"A"' in e.content for e in parsed.events] == [True, False]
    assert [slot.event for slot in parsed.slots or []] == [0, -1, 1]


@pytest.mark.parametrize(
    ("more", "path"),
    [
        ({"fallback": ["carrier pigeon"]}, "fallback/0"),
        ({"fallback": ["push", "in_app"]}, "fallback/1"),
        ({"fallback": [[]]}, "fallback/0"),
        ({"fallback": "push"}, "fallback"),
        ({"fallback": ["push"] * 21}, "fallback"),
        ({"channels": ["fcm", "pigeon"]}, "channels/1"),
        ({"channels": []}, "channels"),
    ],
)
def test_an_unknown_channel_is_named(more: dict[str, Any], path: str) -> None:
    """422 invalid with the place; in_app is no channel to fall back to."""
    told = refusal({**MINIMAL, **more})
    assert (told.status, told.code) == (422, "invalid")
    assert told.errors[0].path == path


@pytest.mark.parametrize(
    ("name", "longest"),
    [("userId", 128), ("type", 64), ("category", 64), ("title", 255), ("idempotencyKey", 255)],
)
def test_lengths_count_characters(name: str, longest: int) -> None:
    """Lengths are in characters, not bytes, up to the limit and not beyond."""
    assert parse({**MINIMAL, name: "🎵" * longest}).events
    assert refusal({**MINIMAL, name: "🎵" * (longest + 1)}).errors[0].path == name
    assert refusal({**MINIMAL, name: ""}).errors[0].path == name


def test_body_counts_bytes() -> None:
    """The body's 4 KiB are bytes of UTF-8."""
    assert parse({**MINIMAL, "body": "é" * 2048}).events
    assert refusal({**MINIMAL, "body": "é" * 2049}).errors[0].path == "body"


@pytest.mark.parametrize(
    "name", ["userId", "type", "category", "actorId", "collapseKey", "link", "sourceApp"]
)
@pytest.mark.parametrize("bad", ["\n", "\x7f", "\x85", "\0"])
def test_control_characters(name: str, bad: str) -> None:
    """Names and ids hold no control character; a title may have a line break, but no NUL."""
    assert refusal({**MINIMAL, name: f"a{bad}b"}).errors[0].path == name
    assert parse({**MINIMAL, "title": "two\nlines"}).events
    assert refusal({**MINIMAL, "title": "a\0b"}).errors[0].path == "title"


@pytest.mark.parametrize(
    "data",
    [
        b'{"a":9007199254740992}',
        b'{"a":-9007199254740992}',
        b'{"a":[{"b":1' + b"0" * 400 + b"}]}",
        b'{"a":"x\\u0000"}',
        b'{"x\\u0000":1}',
        b'{"a":"\\udc00"}',
        b'{"\\ud800":1}',
        b'{"a":1e400}',
        b'{"a":' * 32 + b"1" + b"}" * 32,
    ],
)
def test_what_no_document_may_hold(data: bytes) -> None:
    """Integers beyond 2^53-1, NUL, lone surrogates, infinity, nesting beyond 32: refused."""
    body = b'{"userId":"a","type":"t","title":"x","data":%s}' % data
    told = refusal(body)
    assert told.code == "invalid"
    assert told.errors[0].path.startswith("data")
    [good, bad] = parse(b"[%s,%s]" % (json.dumps(MINIMAL).encode(), body)).slots
    assert good.refused is None
    assert bad.refused == told


def test_what_a_document_may_hold() -> None:
    """The largest integers, 31 levels of data, strings of digits, escaped backslashes before u0000."""
    for data in (
        b'{"a":9007199254740991,"b":-9007199254740991}',
        b'{"a":"12345678901234567890"}',
        b'{"a":"\\\\u0000"}',
        b'{"a":' * 31 + b"1" + b"}" * 31,
    ):
        body = b'{"userId":"a","type":"t","title":"x","data":%s}' % data
        [event] = parse(body).events
        assert json.loads(f"{{{event.content}}}")["data"] == json.loads(data)


def test_event_of_32_kib() -> None:
    """An event has at most 32 KiB of compact JSON; white space and the list of recipients do not count."""
    fits = {**MINIMAL, "data": {"a": "x" * 32_000}}
    assert parse(json.dumps(fits).encode() + b" " * 40_000).events
    assert "32768 bytes" in refusal({**MINIMAL, "data": {"a": "x" * 33_000}}).detail
    many = {"userIds": [f"{i:0128d}" for i in range(1000)], "type": "t", "title": "x"}
    assert len(parse(many).events) == 1000


def test_expiry_needs_an_offset() -> None:
    """expiresAt is RFC 3339 with offset, within the years that every part of the system can hold."""
    for bad in ("2030-01-01", "2030-01-01T00:00:00", "9999-12-31T23:59:59Z", "1969-12-31T00:00:00Z", 5, "x"):
        assert refusal({**MINIMAL, "expiresAt": bad}).errors[0].path == "expiresAt"
    [event] = parse({**MINIMAL, "expiresAt": "2030-01-01T02:00:00.1239+02:00"}).events
    assert event.expires_ms == 1_893_456_000_123
    assert '"expiresAt":"2030-01-01T00:00:00.123Z"' in event.content
    assert event.expires_ms < LAST_EXPIRY_MS


def test_expiry_ms_is_exact() -> None:
    """expiry_ms agrees with the library's arithmetic, without floats."""
    for at in (
        datetime(1970, 1, 1, tzinfo=UTC),
        datetime(2026, 2, 28, 23, 59, 59, 999_999, tzinfo=timezone(timedelta(hours=-9, minutes=-30))),
        datetime(9998, 12, 31, 23, 59, 59, 999_000, tzinfo=UTC),
    ):
        delta = at - datetime(1970, 1, 1, tzinfo=UTC)
        assert expiry_ms(at) == delta // timedelta(milliseconds=1)


def test_recipients_have_their_own_verdict() -> None:
    """A bad recipient is refused by itself; userIds beside userId, or in a batch, are refused."""
    parsed = parse({"userIds": ["a", 5, "", "x" * 129, "b\n", "a", None], "type": "t", "title": "x"})
    assert [slot.event for slot in parsed.slots] == [0, -1, -1, -1, -1, 0, -1]
    assert len(parsed.events) == 1
    assert refusal({**MINIMAL, "userIds": ["b"]}).errors[0].path == "userIds"
    [slot] = parse([{"userIds": ["a"], "type": "t", "title": "x"}]).slots
    assert slot.refused.code == "not_supported"


def test_lone_surrogate_as_recipient() -> None:
    """A recipient that no encoder can write is refused by itself, and told back in a form that can be."""
    parsed = parse(b'{"userIds":["a","\\ud800"],"type":"t","title":"x"}')
    assert [slot.event for slot in parsed.slots] == [0, -1]
    msgspec.json.encode(parsed.slots[1].user)


def test_idempotency_scope_and_hash() -> None:
    """Keys are scoped by route, index and user; the hash sees the body, not its spelling or the key."""
    [a] = parse(MINIMAL, key="k").events
    [b] = parse(b' {"title":"x", "type":"t", "userId":"\\u0061da", "body":null, "idempotencyKey":"k"}').events
    assert a.idempotency_key == b.idempotency_key == "events:k"
    assert a.body_hash == b.body_hash
    [c] = parse({**MINIMAL, "title": "y"}, key="k").events
    assert c.body_hash != a.body_hash
    first, second = parse([MINIMAL, {**MINIMAL, "idempotencyKey": "own"}], key="k").events
    assert (first.idempotency_key, second.idempotency_key) == ("events:k#0", "events:own")
    one, two = parse({"userIds": ["u", "v"], "type": "t", "title": "x"}, key="k").events
    assert (one.idempotency_key, two.idempotency_key) == ("events:k#u", "events:k#v")
    assert one.body_hash != two.body_hash
    [none] = parse(MINIMAL).events
    assert none.idempotency_key is none.body_hash is None
    for bad in ("", "k" * 256, "a\nb"):
        with pytest.raises(ProblemError):
            parse(MINIMAL, key=bad)


def test_ids_are_minted_once_and_differ() -> None:
    """Every event has an id of its own, increasing, before anything is sent."""
    events = parse([MINIMAL] * 50).events
    assert [e.id for e in events] == sorted({e.id for e in events})
