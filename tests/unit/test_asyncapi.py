"""The description of the frames is complete, and true in both directions."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from carillon import client_frames, server_frames
from carillon.client_frames import TYPES, BadFrameError, parse_binary, parse_text
from carillon.clock import rfc3339
from carillon.notification import ALWAYS, OPTIONAL, NotificationRow, encode_content, notification_json
from serve.asyncapi import asyncapi_document, asyncapi_json
from serve.frame_schemas import CLIENT_FRAMES, SERVER_FRAMES
from serve.schemas import COMPONENTS
from tests.fuzz.frames import MEMBERS, as_msgpack, documents
from tests.fuzz.schema import check_server_frame, client_validator

DOCUMENT = asyncapi_document()


def test_every_frame_is_described() -> None:
    """What clients may send is what is described, no more and no less."""
    assert set(CLIENT_FRAMES) == set(TYPES)
    assert set(CLIENT_FRAMES).isdisjoint(SERVER_FRAMES)
    for kind, schema in (CLIENT_FRAMES | SERVER_FRAMES).items():
        assert schema["properties"]["type"] == {"const": kind}
        jsonschema.Draft202012Validator.check_schema(schema)
    for kind in set(MEMBERS):
        members = MEMBERS[kind]
        assert set(CLIENT_FRAMES[kind]["properties"]) == {"type", "id", *members}


def test_the_document_holds_together() -> None:
    """Every reference leads somewhere; each frame belongs to the operations that send or receive it."""
    json.loads(asyncapi_json())

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            if "$ref" in value:
                found: Any = DOCUMENT
                for part in value["$ref"].removeprefix("#/").split("/"):
                    found = found[part]
            for inner in value.values():
                walk(inner)
        elif isinstance(value, list):
            for inner in value:
                walk(inner)

    walk(DOCUMENT)
    told = {name: _names(operation["messages"]) for name, operation in DOCUMENT["operations"].items()}
    assert told == {"tell": set(SERVER_FRAMES), "hear": set(CLIENT_FRAMES), "stream": set(SERVER_FRAMES)}
    assert {o["action"] for o in DOCUMENT["operations"].values()} == {"send", "receive"}
    assert set(DOCUMENT["components"]["messages"]) == set(SERVER_FRAMES) | set(CLIENT_FRAMES)


def _names(messages: list[dict[str, str]]) -> set[str]:
    return {message["$ref"].rsplit("/", 1)[1] for message in messages}


# -- from clients -----------------------------------------------------------------------------------------


@settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
@given(documents())
def test_what_is_described_is_what_is_taken(document: dict[str, Any]) -> None:
    """A frame is valid by its schema if and only if the parser takes it, in both encodings."""
    # The general rules (no NUL, no huge integers, ... anywhere) are told in words.
    try:
        client_frames._check_values(document)
    except BadFrameError:
        assume(False)
    kind = document["type"]
    described = isinstance(kind, str) and kind in CLIENT_FRAMES and client_validator(kind).is_valid(document)
    packed = as_msgpack(document)
    assert packed is not None
    for parse, data in ((parse_text, json.dumps(document).encode()), (parse_binary, packed)):
        try:
            parse(data, 1)
            taken = True
        except BadFrameError as exc:
            taken = exc.code == "not_supported"
            reason = str(exc)
        assert taken == described, reason if described else "it is taken"


@pytest.mark.parametrize("kind", TYPES)
def test_each_frame_can_be_right(kind: str) -> None:
    """Of every type there are frames that are taken: the comparison above is not one of refusals."""
    found: list[Any] = []

    @settings(max_examples=60, database=None, derandomize=True, deadline=None)
    @given(documents((kind,)))
    def look(document: dict[str, Any]) -> None:
        if document["type"] == kind and client_validator(kind).is_valid(document):
            found.append(document)

    look()
    assert len(found) > 3


# -- from the server --------------------------------------------------------------------------------------

texts = st.text(st.characters(codec="utf-8"), max_size=20)
whole = st.integers(0, 2**53 - 1)
ids = st.binary(min_size=16, max_size=16)
times = st.integers(0, 4_000_000_000_000).map(rfc3339)
refs = st.one_of(texts, st.integers(-(2**53) + 1, 2**53 - 1))
maybe = st.none() | st.integers(0, 4_000_000_000_000)
rows = st.builds(
    NotificationRow, ids, whole, whole, whole,
    st.fixed_dictionaries(
        {"type": texts, "title": texts, "createdAt": times},
        optional={
            "body": texts, "data": st.dictionaries(texts, texts), "imageUrl": texts, "actions": st.just([]),
            "channels": st.lists(texts), "expiresAt": times, "priority": st.sampled_from(["low", "urgent"]),
        },
    ).map(encode_content),
    maybe, maybe, maybe, maybe, maybe, maybe,
)  # fmt: skip
notes = st.builds(notification_json, rows, st.just('"u"'))

WRITERS: dict[str, st.SearchStrategy[bytes]] = {
    "welcome": st.builds(
        server_frames.welcome, texts, texts, texts, whole, whole, whole, st.integers(1, 10**6),
        st.sampled_from([None, True, False]), times,
    ),
    "new_notification": st.builds(server_frames.new_notification, notes, st.booleans()),
    "notification_updated": st.builds(server_frames.notification_updated, notes, st.booleans()),
    "notifications_read": st.builds(
        server_frames.notifications_read, st.lists(ids, min_size=1), times, whole
    ),
    "all_notifications_read": st.builds(server_frames.all_notifications_read, times, whole, whole),
    "notifications_seen": st.builds(server_frames.notifications_seen, st.lists(ids, min_size=1), whole),
    "notification_state": st.builds(
        server_frames.notification_state, st.sampled_from(server_frames.STATE_KINDS), ids, whole
    ),
    "unread_count": st.builds(server_frames.unread_count, whole, whole),
    "presence": st.builds(
        server_frames.presence, texts, st.sampled_from(["active", "idle", "offline"]), st.none() | times
    ),
    "presentation": st.builds(
        server_frames.presentation, texts, st.booleans(), st.none() | st.integers(0, 3_600_000),
        st.none() | st.booleans(),
    ),
    "ok": st.builds(server_frames.ok, refs, st.lists(texts)),
    "pong": st.builds(server_frames.pong, st.none() | refs),
    "error": st.builds(server_frames.error, texts, texts, st.booleans(), st.none() | refs),
}  # fmt: skip


def test_every_writer_is_tried() -> None:
    """Everything in carillon/server_frames.py that makes a frame is below, and makes every type described."""
    public = {name for name, made in vars(server_frames).items() if callable(made) and name[0] != "_"}
    makers = {name for name in public if getattr(server_frames, name).__module__ == server_frames.__name__}
    assert makers - {"as_new_notification", "transcode", "positioned"} == set(WRITERS)


@pytest.mark.parametrize("name", WRITERS)
def test_what_is_written_is_described(name: str) -> None:
    """Every frame the server can write is valid by its schema and has no member that is not described."""
    kinds: set[str] = set()

    @settings(max_examples=60, deadline=None)
    @given(WRITERS[name])
    def look(frame: bytes) -> None:
        kinds.add(check_server_frame(json.loads(frame)))

    look()
    if name == "notification_state":
        assert kinds == {f"NOTIFICATION_{kind}" for kind in server_frames.STATE_KINDS}
    else:
        assert kinds == {name.upper()}


def test_notification_members() -> None:
    """The described notification has exactly the members that it can have."""
    states = {"deliveredAt", "seenAt", "readAt", "clickedAt", "dismissedAt", "archivedAt", "updatedAt"}
    always = {*ALWAYS, "id", "seq", "rev", "userId", "read", "seen", "archived"}
    schema = COMPONENTS["Notification"]
    assert set(schema["required"]) == always
    assert set(schema["properties"]) == always | set(OPTIONAL) | states | {"clicked", "dismissed"}
