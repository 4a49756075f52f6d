from __future__ import annotations

import json
import pickle
import uuid
from typing import Any

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from carillon import client_frames
from carillon.client_frames import Auth, BadFrameError, ClientPing, parse_binary, parse_text
from carillon.errors import InvalidInputError
from carillon.messages import (
    ClientAck,
    ClientChange,
    ClientResume,
    ClientTopic,
    ClientVisibility,
    ClientWatch,
)

ID = uuid.UUID("018f0000-0000-7000-8000-0000000000aa")
ID2 = uuid.UUID("018F0000-0000-7000-8000-0000000000BB")
C = 7

VALID: list[tuple[dict[str, Any], Any]] = [
    ({"type": "AUTH", "token": "t"}, Auth("t")),
    ({"type": "AUTH", "token": "t", "deviceId": "phone", "id": 1}, Auth("t", "phone", 1)),
    ({"type": "PING"}, ClientPing()),
    ({"type": "PING", "id": "x"}, ClientPing("x")),
    ({"type": "RESUME", "epoch": "e", "lastSeq": 0}, ClientResume(C, "e", 0)),
    ({"type": "RESUME", "epoch": "e", "lastSeq": 4, "lastRev": 9, "id": -3}, ClientResume(C, "e", 4, 9, -3)),
    ({"type": "RESUME", "epoch": "e", "lastSeq": 4, "lastRev": None}, ClientResume(C, "e", 4)),
    ({"type": "ACK", "seq": 12}, ClientAck(C, 12)),
    ({"type": "ACK", "seq": 12, "rev": 30}, ClientAck(C, 12, rev=30)),
    ({"type": "ACK", "notificationId": str(ID)}, ClientAck(C, None, [ID.bytes])),
    ({"type": "ACK", "notificationIds": [str(ID), str(ID2)]}, ClientAck(C, None, [ID.bytes, ID2.bytes])),
    ({"type": "MARK_READ", "notificationIds": [str(ID)]}, ClientChange(C, "read", [ID.bytes])),
    ({"type": "MARK_SEEN", "notificationIds": [str(ID)]}, ClientChange(C, "seen", [ID.bytes])),
    ({"type": "MARK_ALL_READ"}, ClientChange(C, "read_all")),
    ({"type": "MARK_ALL_READ", "upToSeq": 3, "id": "r"}, ClientChange(C, "read_all", [], 3, None, "r")),
    ({"type": "ARCHIVE", "notificationId": str(ID)}, ClientChange(C, "archive", [ID.bytes])),
    ({"type": "DISMISS", "notificationId": str(ID)}, ClientChange(C, "dismiss", [ID.bytes])),
    ({"type": "CLICK", "notificationId": str(ID)}, ClientChange(C, "click", [ID.bytes])),
    (
        {"type": "CLICK", "notificationId": str(ID), "actionId": "open"},
        ClientChange(C, "click", [ID.bytes], None, "open"),
    ),
    ({"type": "VISIBILITY", "state": "hidden"}, ClientVisibility(C, "hidden")),
    (
        {"type": "VISIBILITY", "state": "focused", "viewing": "post:1:2"},
        ClientVisibility(C, "focused", "post:1:2"),
    ),
    ({"type": "WATCH_PRESENCE", "userIds": ["a", "ü"]}, ClientWatch(C, ["a", "ü"])),
    ({"type": "WATCH_PRESENCE", "userIds": []}, ClientWatch(C, [])),
    ({"type": "PING", "future": {"a": [1, 2.5, None, True]}}, ClientPing()),
    ({"type": "PING", "text": "\\u0000 is not NUL"}, ClientPing()),
    ({"type": "PING", "text": "😀"}, ClientPing()),
]


def names(cases: list[tuple[dict[str, Any], Any]]) -> list[str]:
    return [json.dumps(frame)[:60] for frame, _ in cases]


@pytest.mark.parametrize(("frame", "message"), VALID, ids=names(VALID))
def test_a_valid_frame_becomes_its_message(frame: dict[str, Any], message: Any) -> None:
    """JSON (escaped or not) and MessagePack give the same message; unknown members are ignored."""
    assert parse_text(json.dumps(frame).encode(), C) == message
    assert parse_text(json.dumps(frame, ensure_ascii=False).encode(), C) == message
    assert parse_binary(msgpack.packb(frame), C) == message


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "expected type to be one of AUTH, .*, got nothing"),
    ({"type": None}, "expected type to be one of"),
    ({"type": 3}, "expected type to be one of .*, got 3"),
    ({"type": ["PING"]}, "expected type to be one of .*, got a list of 1"),
    ({"type": "ping"}, "expected type to be one of .*, got 'ping'"),
    (
        {"type": "PING", "id": True},
        "expected id to be text of at most 128 characters or an integer, got True",
    ),
    ({"type": "PING", "id": 1.5}, "expected id to be"),
    ({"type": "PING", "id": "x" * 129}, "expected id to be .*, got text of 129 characters"),
    ({"type": "PING", "id": {}}, "expected id to be .*, got an object"),
    ({"type": "PING", "id": 2**53}, "integer"),
    ({"type": "PING", "other": 2**53}, r"expected integers within \+-9007199254740991, got 9007199254740992"),
    ({"type": "PING", "other": [-(2**53)]}, "expected integers within"),
    ({"type": "PING", "other": "a\0b"}, "expected text without NUL, got NUL"),
    ({"type": "PING", "a\0b": 1}, "expected text without NUL, got NUL"),
    ({"type": "PING", "other": deep(32)}, "expected nesting of at most 32 levels"),
    (
        {"type": "AUTH"},
        "expected token to be text of 1-8192 characters without control characters, got nothing",
    ),
    ({"type": "AUTH", "token": ""}, "expected token to be"),
    ({"type": "AUTH", "token": "x" * 8193}, "expected token to be"),
    ({"type": "AUTH", "token": "t", "deviceId": "a\nb"}, "expected deviceId to be"),
    ({"type": "AUTH", "token": "t", "deviceId": "x" * 129}, "expected deviceId to be"),
    ({"type": "RESUME"}, "expected epoch to be"),
    ({"type": "RESUME", "epoch": 5, "lastSeq": 1}, "expected epoch to be .*, got 5"),
    (
        {"type": "RESUME", "epoch": "e"},
        "expected lastSeq to be an integer from 0 to 9007199254740991, got nothing",
    ),
    ({"type": "RESUME", "epoch": "e", "lastSeq": "4"}, "expected lastSeq to be an integer"),
    ({"type": "RESUME", "epoch": "e", "lastSeq": True}, "expected lastSeq to be an integer"),
    ({"type": "RESUME", "epoch": "e", "lastSeq": 4.0}, "expected lastSeq to be an integer"),
    ({"type": "RESUME", "epoch": "e", "lastSeq": -1}, "expected lastSeq to be an integer"),
    ({"type": "RESUME", "epoch": "e", "lastSeq": 1, "lastRev": "x"}, "expected lastRev to be an integer"),
    ({"type": "ACK"}, "expected one of notificationId, notificationIds and seq, got none of them"),
    ({"type": "ACK", "seq": 1, "notificationId": str(ID)}, "got notificationId and seq"),
    ({"type": "ACK", "seq": "1"}, "expected seq to be an integer"),
    (
        {"type": "ACK", "notificationId": "x"},
        r"expected notificationId to be a notification id \(UUID\), got 'x'",
    ),
    ({"type": "ACK", "notificationId": ID.hex}, "expected notificationId to be a notification id"),
    ({"type": "MARK_READ"}, "expected notificationIds to be a list of 1-1000 notification ids, got nothing"),
    ({"type": "MARK_READ", "notificationIds": []}, "expected notificationIds to be a list of 1-1000"),
    ({"type": "MARK_READ", "notificationIds": str(ID)}, "expected notificationIds to be a list"),
    ({"type": "MARK_READ", "notificationIds": [str(ID)] * 1001}, "got a list of 1001"),
    ({"type": "MARK_READ", "notificationIds": [str(ID), None]}, "expected notificationIds/1 to be"),
    ({"type": "MARK_SEEN", "notificationIds": [1]}, "expected notificationIds/0 to be"),
    ({"type": "MARK_ALL_READ", "upToSeq": "all"}, "expected upToSeq to be an integer"),
    ({"type": "ARCHIVE"}, "expected notificationId to be"),
    ({"type": "DISMISS", "notificationId": [str(ID)]}, "expected notificationId to be"),
    ({"type": "CLICK", "notificationId": str(ID), "actionId": 1}, "expected actionId to be"),
    ({"type": "VISIBILITY"}, "expected state to be one of focused, visible, hidden, idle, got nothing"),
    ({"type": "VISIBILITY", "state": "away"}, "expected state to be one of .*, got 'away'"),
    ({"type": "VISIBILITY", "state": {}}, "expected state to be one of"),
    (
        {"type": "VISIBILITY", "state": "idle", "viewing": "post"},
        'expected viewing to be "targetType:targetId"',
    ),
    ({"type": "VISIBILITY", "state": "idle", "viewing": ":1"}, "expected viewing to be"),
    ({"type": "WATCH_PRESENCE"}, "expected userIds to be a list of at most 1000 user ids"),
    ({"type": "WATCH_PRESENCE", "userIds": ["a"] * 1001}, "expected userIds to be a list"),
    ({"type": "WATCH_PRESENCE", "userIds": ["a", ""]}, "expected userIds/1 to be"),
    ({"type": "WATCH_PRESENCE", "userIds": ["a\x7f"]}, "expected userIds/0 to be"),
]


@pytest.mark.parametrize(("frame", "sentence"), BAD, ids=names(BAD))
def test_a_bad_frame_is_refused_with_a_sentence(frame: dict[str, Any], sentence: str) -> None:
    """What breaks the protocol is refused in both encodings, and the error says what was expected."""
    with pytest.raises(BadFrameError, match=sentence) as text:
        parse_text(json.dumps(frame).encode(), C)
    with pytest.raises(BadFrameError, match=sentence):
        parse_binary(msgpack.packb(frame), C)
    assert isinstance(text.value, InvalidInputError)
    assert len(str(text.value)) < 300, "an error must not echo a whole frame"


@pytest.mark.parametrize("kind", ["SUBSCRIBE", "UNSUBSCRIBE"])
def test_topics(kind: str) -> None:
    """A topic is text of 1-128 characters; anything else is refused."""
    frame = {"type": kind, "topic": "goals/rapid", "id": 4}
    assert parse_text(json.dumps(frame).encode(), C) == ClientTopic(C, "goals/rapid", kind == "SUBSCRIBE", 4)
    for bad in (None, 7, "", "a" * 129, "a\n", ["t"]):
        with pytest.raises(BadFrameError) as caught:
            parse_text(json.dumps({**frame, "topic": bad}).encode(), C)
        assert (caught.value.code, caught.value.path, caught.value.ref) == ("invalid", "topic", 4)


def test_the_id_of_a_bad_frame_is_echoed_if_it_is_valid() -> None:
    """A client can match the ERROR to what it sent."""
    for frame, code in (
        ({"type": "NO", "id": "a"}, "unknown_type"),
        ({"type": "ACK", "id": "a"}, "invalid"),
        ({"type": "PING", "other": "a\0b", "id": "a"}, "invalid"),
        ({"type": "PING", "other": deep(32), "id": "a"}, "invalid"),
    ):
        with pytest.raises(BadFrameError) as caught:
            parse_text(json.dumps(frame).encode(), C)
        assert (caught.value.ref, caught.value.code) == ("a", code)


def test_the_error_survives_pickling() -> None:
    """Ray rebuilds exceptions from `args`."""
    with pytest.raises(BadFrameError) as caught:
        parse_text(b'{"type":"NO","id":5}', C)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.ref, again.code, again.path) == (str(caught.value), 5, "unknown_type", "type")


RAW_TEXT = [
    b"", b" ", b"{", b"null", b"[]", b'"PING"', b"3", b"{} {}", b'{"type":"PING"}x', b"\xff",
    b'{"type":"\xc3"}',
    b'{"type":"PING","a":"\\ud800"}', b'{"type":"PING","a":"\\ud800x"}', b'{"type":"PING","a":"\\udc00"}',
    b'{"type":"PING","a":"\\u0000"}', b'{"type":"PING","a":NaN}', b'{"type":"PING","a":1e999}',
    b'{"type":"PING","a":' + b"[" * 30_000 + b"]" * 30_000 + b"}",
    b'{"type":"PING","a":' + b'{"a":' * 9_000 + b"1" + b"}" * 9_000 + b"}",
    b'{"type":"PING","a":' + b"1" * 5_000 + b"}",
]  # fmt: skip


@pytest.mark.parametrize("data", RAW_TEXT, ids=lambda data: repr(data[:30]))
def test_bytes_that_are_no_frame_are_refused(data: bytes) -> None:
    """Malformed JSON, lone surrogates, NUL, huge numbers and deep nesting never get further."""
    with pytest.raises(BadFrameError):
        parse_text(data, C)


RAW_BINARY = [
    b"", b"\xc0", b"\x01", b"\x90", b"\xc1", b"\x81", b"\x81\xa4type", b"\x80\x80", b"\xdf\xff\xff\xff\xff",
    msgpack.packb({"type": "PING", "a": b"raw"}), msgpack.packb({"type": "PING", 5: 1}),
    msgpack.packb({"type": "PING", b"b": 1}), msgpack.packb({"type": "PING", "a": msgpack.ExtType(5, b"x")}),
    msgpack.packb({"type": "PING", "a": msgpack.Timestamp(5)}),
    msgpack.packb({"type": "PING", "a": float("inf")}),
    msgpack.packb({"type": "PING", "a": float("nan")}), b"\x82\xa4type\xa4PING\xa1a\xa3\xed\xa0\x80",
    b"\x82\xa4type\xa4PING\xa1a" + b"\x91" * 50_000 + b"\xc0",
    b"\x82\xa4type\xa4PING\xa1a\xd7\xff\xff\xff\xff\xff\xff\xff\xff\xff",
]  # fmt: skip


@pytest.mark.parametrize("data", RAW_BINARY, ids=lambda data: repr(data[:30]))
def test_messagepack_that_is_no_frame_is_refused(data: bytes) -> None:
    """Truncated data, types that JSON does not have, odd keys and deep nesting never get further."""
    with pytest.raises(BadFrameError):
        parse_binary(data, C)


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(),
    st.text(max_size=20),
    st.just(str(ID)),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
members = st.sampled_from(
    ["id", "token", "deviceId", "epoch", "lastSeq", "lastRev", "seq", "notificationId", "notificationIds",
     "upToSeq", "actionId", "state", "viewing", "userIds", "topic", "else"]
)  # fmt: skip
shaped = st.builds(
    lambda kind, rest: {"type": kind, **rest},
    st.sampled_from(client_frames.TYPES),
    st.dictionaries(members, values, max_size=5),
)


# The machine may be busy: how long an example takes says nothing here.
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(frame=shaped)
def test_any_shape_gives_a_message_or_an_error(frame: dict[str, Any]) -> None:
    """No member of any type makes the parser fail otherwise, and both encodings agree."""
    outcomes: list[Any] = []
    for parse, data in (
        (parse_text, json.dumps(frame, allow_nan=True).encode()),
        (parse_binary, msgpack.packb(frame)),
    ):
        try:
            outcomes.append(parse(data, C))
        except BadFrameError:
            outcomes.append(None)
    assert outcomes[0] == outcomes[1]


@settings(deadline=None)
@given(data=st.binary(max_size=200))
def test_any_bytes_give_a_message_or_an_error(data: bytes) -> None:
    """Noise raises BadFrameError and nothing else."""
    sentences: list[str] = []
    for parse in (parse_text, parse_binary):
        try:
            parse(data, C)
        except BadFrameError as exc:
            sentences.append(str(exc))
    assert all(sentence.startswith("expected") for sentence in sentences)
