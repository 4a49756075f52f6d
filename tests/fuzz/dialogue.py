"""One client's frames against the whole system: what must be answered, and with what."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import msgspec
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from carillon.client_frames import MAX_DEPTH, MAX_INT
from tests.fuzz.arena import LONGEST_S, Arena
from tests.fuzz.frames import as_json, as_msgpack
from tests.fuzz.schema import check_server_frame

BARRIER = "the end of this dialogue"


def answerable(document: Any) -> bool:
    """Whether a frame has an `id` that its answer must echo."""
    ref = document.get("id") if isinstance(document, dict) else None
    if isinstance(ref, str):
        return len(ref) <= 128 and "\0" not in ref
    return type(ref) is int and abs(ref) <= MAX_INT


def _depth(value: Any) -> int:
    if isinstance(value, list | dict):
        inner = value.values() if isinstance(value, dict) else value
        return 1 + max((_depth(item) for item in inner), default=0)
    return 0


async def converse(arena: Arena, sent: list[Any], packed: bool, own_ids: dict[str, str]) -> None:
    """Send frames on a new connection; every one that has an `id` gets one answer. Raises AssertionError.

    Args:
        own_ids: ids of the user's notifications by their placeholders.
    """
    wire: list[bytes] = []
    owed: list[Any] = []
    late: list[Any] = []  # answered after a look or a commit of their own, perhaps behind what came later
    for number, document in enumerate(sent):
        if isinstance(document, dict) and answerable(document):
            # Each of its own, so that answers can be told apart.
            document = document | {"id": number if type(document["id"]) is int else f"f{number}"}
        data = as_msgpack(document) if packed else as_json(document)
        if data is None:
            continue
        for placeholder, real in own_ids.items():
            data = data.replace(placeholder.encode(), real.encode())
        wire.append(data)
        if _readable(data, packed) and answerable(document) and _depth(document) <= MAX_DEPTH:
            owed.append(document["id"])
            if document.get("type") in ("SET_PRESENCE", "SUBSCRIBE", "UNSUBSCRIBE", "WATCH_PRESENCE"):
                late.append(document["id"])
    answers: list[Any] = []
    code = None
    client = await connect(
        f"ws://127.0.0.1:{arena.port}/ws?token={arena.facts[0].token}",
        subprotocols=["carillon.v1.msgpack" if packed else "carillon.v1.json"],  # type: ignore[list-item]
        compression=None, proxy=None, ping_interval=None, max_size=None,
    )  # fmt: skip
    try:
        async with asyncio.timeout(LONGEST_S):
            for data in wire:
                await client.send(data if packed else data.decode())
            # Answered by the shard, behind everything before it.
            last = {"type": "MARK_ALL_READ", "upToSeq": 0, "id": BARRIER}
            await client.send(msgspec.msgpack.encode(last) if packed else json.dumps(last))
            while True:
                frame = await client.recv()
                assert isinstance(frame, bytes) is packed
                told = msgspec.msgpack.decode(frame) if packed else json.loads(frame)  # type: ignore[arg-type]
                assert next(iter(told)) == "type", f"{told} does not begin with its type"
                check_server_frame(told)
                if told["type"] in ("OK", "ERROR", "PONG") and "id" in told:
                    answers.append(told["id"])
                if BARRIER in answers and all(ref in answers for ref in late):
                    break
    except ConnectionClosed as closed:
        code = closed.rcvd.code if closed.rcvd is not None else 1006
    finally:
        client.transport.abort()
    kinds = [document.get("type") for document in sent if isinstance(document, dict)]
    if code is not None:
        assert (code, "RESUME" in kinds[1:]) == (4213, True), f"closed with {code}"
        return
    answers.remove(BARRIER)
    assert sorted(map(str, answers)) == sorted(map(str, owed)), f"answers to {answers}, not to {owed}"


def _readable(data: bytes, packed: bool) -> bool:
    """Whether it is JSON, or MessagePack, at all."""
    try:
        if packed:
            msgspec.msgpack.decode(data)
        else:
            # A lone surrogate is not Unicode: then it is not JSON that everybody reads.
            json.dumps(json.loads(data, parse_constant=_refuse), ensure_ascii=False).encode()
    except (ValueError, msgspec.DecodeError):
        return False
    return True


def _refuse(name: str) -> None:
    raise ValueError(name)
