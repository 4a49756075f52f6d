"""Identifiers: UUIDv7, slots, texts."""

from __future__ import annotations

import itertools
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from carillon.ids import SLOTS, UserKey, Uuid7Source, parse_uuid, slot_of, uuid7_ms, uuid_text

MS = 1_700_000_000_123


def test_layout_is_that_of_rfc_9562() -> None:
    """48 bits of milliseconds, version 7, variant 10."""
    raw = Uuid7Source().next(MS)
    assert len(raw) == 16
    assert int.from_bytes(raw[:6], "big") == MS == uuid7_ms(raw)
    known = uuid.UUID(bytes=raw)
    assert known.version == 7
    assert known.variant == uuid.RFC_4122


@given(st.lists(st.integers(MS, MS + 3), min_size=2, max_size=50))
def test_ids_of_one_source_strictly_increase(times: list[int]) -> None:
    """Also when the clock goes back: a later id sorts after an earlier one."""
    source = Uuid7Source()
    ids = [source.next(ms) for ms in times]
    assert all(a < b for a, b in itertools.pairwise(ids))


def test_a_burst_borrows_the_next_millisecond() -> None:
    """More than 4,096 ids of one millisecond stay distinct, ordered and of version 7."""
    source = Uuid7Source()
    ids = [source.next(MS) for _ in range(5000)]
    assert ids == sorted(set(ids))
    assert uuid7_ms(ids[-1]) == MS + 1
    assert all(raw[6] >> 4 == 7 and raw[8] >> 6 == 0b10 for raw in ids)


def test_random_bits_differ_between_sources() -> None:
    """Two processes in the same millisecond do not collide."""
    assert Uuid7Source().next(MS)[8:] != Uuid7Source().next(MS)[8:]


@pytest.mark.parametrize(
    ("tenant", "user", "slot"),
    [("t", "u", 596), ("acme", "ada", 818), ("acme", "grace", 852), ("demo", "ünïcødé", 597), ("", "", 575)],
)
def test_slots_never_change(tenant: str, user: str, slot: int) -> None:
    """The mapping of users to slots is for ever: fixed values."""
    assert slot_of(tenant, user) == slot


@given(st.text(max_size=20), st.text(max_size=20))
def test_slots_are_in_range(tenant: str, user: str) -> None:
    """Every user has one of the 1,024 slots; lone surrogates never get here (events.py refuses them)."""
    assert 0 <= slot_of(tenant, user) < SLOTS == 1024


def test_users_spread_over_slots() -> None:
    """10,000 users leave no slot empty and none with more than five times its share."""
    counts = [0] * SLOTS
    for n in range(10_000):
        counts[slot_of("tenant", f"user-{n}")] += 1
    assert min(counts) > 0
    assert max(counts) < 5 * 10_000 / SLOTS


def test_a_user_is_a_pair() -> None:
    """Tenant "a:b", user "c" shares a slot with "a", "b:c" and is another user all the same."""
    assert UserKey("a:b", "c") != UserKey("a", "b:c")
    assert slot_of("a:b", "c") == slot_of("a", "b:c")


@given(st.binary(min_size=16, max_size=16))
def test_text_round_trip(raw: bytes) -> None:
    """Canonical text of any 16 bytes, as the uuid module writes it."""
    assert uuid_text(raw) == str(uuid.UUID(bytes=raw))
    assert parse_uuid(uuid_text(raw)) == raw
    assert parse_uuid(uuid_text(raw).upper()) == raw


@pytest.mark.parametrize(
    "text",
    ["", "x", "0" * 36, "00000000000000000000000000000000", "{00000000-0000-0000-0000-000000000000}",
     "00000000-0000-0000-0000-00000000000g", "00000000-0000-0000-0000-0000000000٠٠",
     "-0000000-0000-0000-0000-000000000000"],
)  # fmt: skip
def test_what_is_no_uuid(text: str) -> None:
    """Anything but 8-4-4-4-12 hexadecimal digits is None, never an exception."""
    assert parse_uuid(text) is None
