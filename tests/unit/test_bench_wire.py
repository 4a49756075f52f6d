"""The lean parsers understand every split of the bytes, and the processes are recognised by title."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.procs import Process, cpu_between, group_of, memory_of, snapshot
from benchmarks.storm import memory_per_connection
from benchmarks.wire import Door, Receiver, http_request, masked_frame, parse_response

ID = "0190a000-0000-7000-8000-000000000001"


def server_frame(payload: bytes, opcode: int = 1) -> bytes:
    """An unmasked frame as a server sends it."""
    head = bytes((0x80 | opcode,))
    if len(payload) < 126:
        return head + bytes((len(payload),)) + payload
    if len(payload) < 65536:
        return head + b"\x7e" + len(payload).to_bytes(2, "big") + payload
    return head + b"\x7f" + len(payload).to_bytes(8, "big") + payload


class Transport:
    """Keeps what is written."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.closed = False

    def write(self, data: bytes) -> None:
        """Keep `data`."""
        self.written.append(data)

    def is_closing(self) -> bool:
        """True once closed."""
        return self.closed

    def close(self) -> None:
        """Note it."""
        self.closed = True

    abort = close


def open_receiver() -> tuple[Receiver, Transport]:
    """A receiver whose handshake was answered."""
    receiver = Receiver(Door("h", 1, "/ws"), "ana", "t", "d0")
    transport: Any = Transport()
    receiver.connection_made(transport)
    receiver.data_received(b"HTTP/1.1 101 Switching Protocols\r\nX: y\r\n\r\n")
    transport.written.clear()
    return receiver, transport


def new_notification(seq: int, body: str = "b") -> bytes:
    """The frame as Carillon writes it."""
    note = {"id": ID, "seq": seq, "rev": seq, "userId": "ana", "body": body}
    return json.dumps({"type": "NEW_NOTIFICATION", "notification": note}, separators=(",", ":")).encode()


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100, 100_000])
def test_frames_are_found_whatever_way_the_bytes_are_split(size: int) -> None:
    """Short, 16-bit and 64-bit lengths, in pieces of any size, give the same receipts."""
    stream = b"".join(
        server_frame(new_notification(n, "x" * n)) for n in (1, 200, 70_000 if size > 50 else 300)
    )
    receiver, _ = open_receiver()
    for at in range(0, len(stream), size):
        receiver.data_received(stream[at : at + size])
    assert [seq for _, _, seq in receiver.device.receipts][:2] == [1, 200]
    assert len(receiver.device.receipts) == 3
    assert {note for _, note, _ in receiver.device.receipts} == {ID.encode()}


def test_another_key_order_is_still_understood() -> None:
    """The fast path is an optimisation of the JSON, not another protocol."""
    receiver, _ = open_receiver()
    frame = {"notification": {"seq": 5, "id": ID}, "type": "NEW_NOTIFICATION"}
    receiver.data_received(server_frame(json.dumps(frame).encode()))
    assert [(note, seq) for _, note, seq in receiver.device.receipts] == [(ID.encode(), 5)]


def test_acknowledgements_are_cumulative_and_sent_once() -> None:
    """One ACK with the highest seq covers what arrived; without news none is sent."""
    receiver, transport = open_receiver()
    receiver.data_received(server_frame(new_notification(1)) + server_frame(new_notification(2)))
    receiver.acknowledge()
    receiver.acknowledge()
    assert transport.written == [masked_frame(1, b'{"type":"ACK","seq":2}')]


def test_pings_are_answered_and_close_codes_kept() -> None:
    """A ping gets its payload back; a close frame's code is what `redial` decides by."""
    receiver, transport = open_receiver()
    receiver.data_received(server_frame(b"hi", 9))
    assert transport.written == [masked_frame(10, b"hi")]
    receiver.data_received(server_frame((4208).to_bytes(2, "big") + b"slow", 8))
    assert receiver.close_code == 4208
    assert transport.closed


def test_responses_are_parsed_with_length_and_in_chunks() -> None:
    """Content-Length and chunked bodies; an incomplete response asks for more bytes."""
    plain = b"HTTP/1.1 202 Accepted\r\nContent-Length: 4\r\n\r\nabcd"
    for cut in range(len(plain)):
        assert parse_response(plain[:cut]) is None
    response = parse_response(plain)
    assert response is not None
    assert (response.status, response.body) == (202, b"abcd")
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n1\r\nd\r\n0\r\n\r\n"
    assert parse_response(chunked[:-9]) is None
    response = parse_response(chunked)
    assert response is not None
    assert response.body == b"abcd"


def test_a_request_names_its_length_in_bytes() -> None:
    """Content-Length counts UTF-8 bytes."""
    request = http_request(Door.of("http://h:80/base/"), "POST", "/v1/events", "ä".encode(), "key")
    assert request.startswith(b"POST /base/v1/events HTTP/1.1\r\nHost: h:80\r\nAuthorization: Bearer key\r\n")
    assert b"Content-Length: 2\r\n\r\n\xc3\xa4" in request


@pytest.mark.parametrize(
    ("command", "group"),
    [
        ("ray::Gateway", "ray::Gateway"),
        ("ray::Shard.status", "ray::Shard"),
        ("ray::ServeReplica:carillon:Ingress", "ray::ServeReplica:carillon:Ingress"),
        ("ray::IDLE", "ray idle workers"),
        ("/x/bin/postgres -D /data", "postgres"),
        ("postgres: carillon carillon 127.0.0.1(5) idle", "postgres"),
        ("/site-packages/ray/core/src/ray/gcs/gcs_server --x", "ray gcs_server"),
        ("/usr/bin/vim notes", None),
    ],
)
def test_processes_are_grouped_by_title(command: str, group: str | None) -> None:
    """An actor counts under its class, whatever method it runs."""
    assert group_of(command) == group


def test_cpu_is_the_difference_and_new_processes_count_in_full() -> None:
    """A pid that was reused (its time went back) is a new process."""
    before = {1: Process(1, "a", 5.0, 0, 0), 2: Process(2, "b", 9.0, 0, 0)}
    after = {1: Process(1, "a", 7.5, 0, 0), 2: Process(2, "b", 1.0, 0, 0), 3: Process(3, "a", 0.5, 0, 0)}
    assert cpu_between(before, after) == {"a": 3.0, "b": 1.0}


def test_memory_per_connection_divides_the_growth() -> None:
    """1,024 KiB more in the gateway for 64 connections are 16 KiB each."""
    before = {1: Process(1, "ray::Gateway", 0, 1 << 20, 1 << 20)}
    after = {1: Process(1, "ray::Gateway", 0, 2 << 20, 2 << 20)}
    assert memory_of(after, "gateway") == {"rss": float(2 << 20), "pss": float(2 << 20)}
    assert memory_per_connection(before, after, 64)["gateway"] == {"rss": 16.0, "pss": 16.0}


def test_a_snapshot_of_a_root_contains_its_descendants() -> None:
    """A child of the root is found with its memory, although its name is unknown; strangers are not."""
    import os
    import subprocess
    import sys

    with subprocess.Popen(
        [sys.executable, "-c", "print(1, flush=True); input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        found = snapshot([os.getpid()], memory=True)
        child.communicate(b"\n")
    assert found[child.pid].group == "other"
    assert found[child.pid].rss_bytes > 0
    assert 1 not in found
