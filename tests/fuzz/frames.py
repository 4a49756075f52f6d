"""Client frames for hypothesis: right ones, nearly right ones, and anything JSON or MessagePack can say."""

from __future__ import annotations

import json
from typing import Any

import msgspec
from hypothesis import strategies as st

from carillon.client_frames import TYPES

OWN = [f"018f0000-0000-7000-8000-00000000000{n}" for n in range(3)]
"""Placeholders: the test puts ids of the user in."""

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(), st.text(max_size=20),
    st.sampled_from(["", "\0", "x" * 129, "e1", "focused", "thread:42", *OWN]),
    st.sampled_from(["not-a-uuid", "\ud800", "\ud83d\ude00"]),
)  # fmt: skip
json_values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
ids = st.sampled_from([*OWN, OWN[0].upper(), "018f0000-0000-7000-8000-ffffffffffff"])
counts = st.one_of(st.integers(0, 20), st.sampled_from([2**53 - 1]))
refs = st.one_of(
    st.integers(-(2**53) + 1, 2**53 - 1),
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20),
)

MEMBERS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "AUTH": {"token": st.text(max_size=30), "deviceId": st.text("abc", min_size=1, max_size=8)},
    "PING": {},
    "RESUME": {"epoch": st.text("abc", min_size=1, max_size=8), "lastSeq": counts, "lastRev": counts},
    "ACK": {
        "notificationId": ids,
        "notificationIds": st.lists(ids, min_size=1, max_size=4),
        "seq": counts,
        "rev": counts,
    },
    "MARK_READ": {"notificationIds": st.lists(ids, min_size=1, max_size=4)},
    "MARK_SEEN": {"notificationIds": st.lists(ids, min_size=1, max_size=4)},
    "MARK_ALL_READ": {"upToSeq": counts},
    "ARCHIVE": {"notificationId": ids},
    "DISMISS": {"notificationId": ids},
    "CLICK": {"notificationId": ids, "actionId": st.text("abc", min_size=1, max_size=8)},
    "VISIBILITY": {
        "state": st.sampled_from(["focused", "visible", "hidden", "idle"]),
        "viewing": st.sampled_from(["thread:42", "a:b:c"]),
    },
    "WATCH_PRESENCE": {"userIds": st.lists(st.text("abc", min_size=1, max_size=8), max_size=3)},
    "SET_PRESENCE": {"mode": st.sampled_from(["auto", "invisible"])},
    "SUBSCRIBE": {"topic": st.text("abc", min_size=1, max_size=8)},
    "UNSUBSCRIBE": {"topic": st.text("abc", min_size=1, max_size=8)},
}
"""By type its members, with values that are right."""


@st.composite
def documents(draw: st.DrawFn, kinds: tuple[str, ...] = tuple(MEMBERS)) -> Any:
    """A frame as an object: mostly right, perhaps with wrong, missing and unknown members."""
    kind = draw(st.sampled_from(kinds))
    frame: dict[str, Any] = {"type": kind}
    if draw(st.integers(0, 3)):
        frame["id"] = draw(refs)
    members = MEMBERS[kind]
    if kind == "ACK" and draw(st.booleans()):  # it has exactly one of them
        name = draw(st.sampled_from(("notificationId", "notificationIds", "seq")))
        members = {name: members[name], "rev": counts}
    for name, values in members.items():
        way = draw(st.integers(0, 9))
        if way < 7:
            frame[name] = draw(values)
        elif way < 9:
            frame[name] = draw(json_values)
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        name = draw(st.sampled_from(["id", "type", "extra", "notificationIds", "seq", "userId", "tenant"]))
        frame[name] = draw(json_values)
    return frame


def as_json(document: Any) -> bytes:
    """JSON text, with what JSON should not say: NaN, lone surrogates as escapes."""
    return json.dumps(document).encode()


def as_msgpack(document: Any) -> bytes | None:
    """MessagePack; None if it has no way to say it."""
    try:
        return msgspec.msgpack.encode(document)
    except (UnicodeEncodeError, ValueError, OverflowError, TypeError):
        return None


assert set(MEMBERS) == set(TYPES)
