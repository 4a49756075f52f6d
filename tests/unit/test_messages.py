"""The wire between actors: tags, field order, round trips, and another MessagePack implementation."""

from __future__ import annotations

import json
import typing
from pathlib import Path
from typing import Any

import msgpack
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from carillon import messages
from carillon.messages import Envelope, Event, Outcome, PushResult, make_envelope_decoder

SNAPSHOT = Path(__file__).with_name("messages_snapshot.json")
MESSAGES: list[type[Any]] = list(typing.get_args(messages.type_union))
STRUCTS = [
    value
    for value in vars(messages).values()
    if isinstance(value, type) and issubclass(value, msgspec.Struct) and value is not msgspec.Struct
]
decoder = make_envelope_decoder()


def layout(cls: type[Any]) -> dict[str, Any]:
    return {"tag": cls.__struct_config__.tag, "fields": list(cls.__struct_fields__)}


def test_tags_are_unique_and_all_are_in_the_union() -> None:
    """A tag names one message; whatever has a tag can travel in an envelope."""
    tags = [cls.__struct_config__.tag for cls in MESSAGES]
    assert len(tags) == len(set(tags))
    assert all(isinstance(tag, int) for tag in tags)
    tagged = {cls for cls in STRUCTS if cls.__struct_config__.tag is not None}
    assert tagged == set(MESSAGES)


@pytest.mark.parametrize("cls", STRUCTS, ids=lambda cls: cls.__name__)
def test_every_struct_is_an_array(cls: type[Any]) -> None:
    """Field names never travel, so every struct is array_like."""
    assert cls.__struct_config__.array_like


def test_fields_are_only_appended() -> None:
    """The layout begins with that of the snapshot; what is new stands at the end and has a default.

    After an addition: `python -m tests.unit.test_messages` writes the snapshot anew.
    """
    known = json.loads(SNAPSHOT.read_text())
    present = {cls.__name__: cls for cls in STRUCTS}
    assert set(known) <= set(present), "a message was removed"
    for name, was in known.items():
        cls = present[name]
        now = layout(cls)
        assert now["tag"] == was["tag"], name
        kept = len(was["fields"])
        assert now["fields"][:kept] == was["fields"], f"{name}: fields were moved, renamed or removed"
        added = msgspec.structs.fields(cls)[kept:]
        assert all(not f.required for f in added), f"{name}: a new field needs a default"
    missing = [cls.__name__ for cls in STRUCTS if cls.__name__ not in known]
    longer = [n for n, was in known.items() if layout(present[n])["fields"] != was["fields"]]
    assert not missing + longer, f"write the snapshot anew for {missing + longer}"


def value_of(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a field's type that MessagePack can carry."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is int:
        return st.integers(-(2**63), 2**63 - 1)
    if hint is float:
        return st.floats(allow_nan=False)
    if hint is bool:
        return st.booleans()
    if hint is str:
        return st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
    if hint is bytes:
        return st.binary(max_size=16)
    if hint is type(None):
        return st.none()
    if origin is list:
        return st.lists(value_of(args[0]), max_size=2)
    if origin is dict:
        return st.dictionaries(value_of(args[0]), value_of(args[1]), max_size=2)
    if args:  # a union
        return st.one_of(*[value_of(arg) for arg in args])
    return built(hint)


def built(cls: type[Any]) -> st.SearchStrategy[Any]:
    hints = typing.get_type_hints(cls)
    return st.builds(cls, *[value_of(hints[name]) for name in cls.__struct_fields__])


@pytest.mark.parametrize("cls", MESSAGES, ids=lambda cls: cls.__name__)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_every_message_round_trips_and_is_plain_messagepack(cls: type[Any], data: st.DataObject) -> None:
    """What is encoded decodes to the same; another implementation reads [request, [tag, fields...]]."""
    message = data.draw(built(cls))
    request = data.draw(st.integers(-(2**31), 2**31))
    raw = msgspec.msgpack.encode(Envelope(request, message))
    again = decoder.decode(raw)
    assert again.request == request
    assert type(again.body) is cls
    assert again.body == message
    number, (tag, *fields) = msgpack.unpackb(raw, strict_map_key=False)
    assert (number, tag) == (request, cls.__struct_config__.tag)
    assert fields == msgspec.to_builtins(message, builtin_types=(bytes,))[1:]


@pytest.mark.parametrize("cls", [*MESSAGES, Event, Outcome, PushResult], ids=lambda cls: cls.__name__)
def test_an_older_peer_may_leave_out_what_has_a_default(cls: type[Any]) -> None:
    """A message without its defaulted fields decodes; one with a field too many does as well."""
    fields = msgspec.structs.fields(cls)
    required = [f for f in fields if f.required]
    assert list(fields[: len(required)]) == required, "required fields come first"
    newest = cls(*[sample(f.type) for f in required])
    row = msgspec.to_builtins(newest, builtin_types=(bytes,))
    tagged = int(cls.__struct_config__.tag is not None)
    short, long = row[: len(required) + tagged], [*row, "from the future"]
    for body in (short, long):
        raw = msgpack.packb(body, use_bin_type=True)
        assert msgspec.msgpack.decode(raw, type=cls) == newest


def sample(hint: Any) -> Any:
    """One value of a type."""
    plain = {int: 1, str: "x", bytes: b"0" * 16, bool: True, float: 1.5}
    if hint in plain:
        return plain[hint]
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is list:
        return [sample(args[0])]
    if origin is dict:
        return {}
    if args:
        return None if type(None) in args else sample(args[0])
    return hint(*[sample(f.type) for f in msgspec.structs.fields(hint) if f.required])


def test_an_unknown_tag_is_refused() -> None:
    """A message of a later version fails to decode instead of becoming another one."""
    with pytest.raises(msgspec.ValidationError):
        decoder.decode(msgpack.packb([1, [9999]]))


if __name__ == "__main__":
    rows = {cls.__name__: layout(cls) for cls in STRUCTS}
    body = ",\n".join(f" {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
    SNAPSHOT.write_text("{\n" + body + "\n}\n")
