"""Sending, driven by hand: whatever happens on the way, every event has one result and one effect."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from client_kit import Store, problem
from hypothesis import given, settings
from hypothesis import strategies as st

from carillon_client.core.delivery import (
    BatchLimits,
    Delivery,
    Item,
    batches,
    item_bytes,
    item_of,
    items_to_many,
)
from carillon_client.core.exchange import Request, Response, RetryPolicy, Wait
from carillon_client.errors import (
    GaveUpError,
    IdempotencyConflictError,
    InvalidRequestError,
    TransportError,
    UnavailableError,
)
from carillon_client.models import Event, NotSent, Sent

POLICY = RetryPolicy(deadline_s=60.0, attempt_timeout_s=5.0, first_pause_s=0.2, longest_pause_s=5.0)
KEYS = itertools.count()


def key() -> str:
    return f"k{next(KEYS)}"


def items(count: int, deadline: float = 60.0) -> list[Item]:
    return [item_of({"type": "t", "title": f"e{i}", "userId": "u"}, deadline, key) for i in range(count)]


def drive(delivery: Delivery, serve: Any, policy: RetryPolicy = POLICY) -> float:
    """Run to the end against `serve(request, now) -> Response | TransportError`; the time at the end."""
    now = 0.0
    for _ in range(10_000):
        step = delivery.next(now)
        if step is None:
            return now
        if isinstance(step, Wait):
            assert step.seconds > 0
            now += step.seconds
            continue
        answer = serve(step, now)
        if isinstance(answer, TransportError):
            now += step.timeout_s
            delivery.failed(now, answer)
        else:
            now += 0.01
            delivery.answered(now, answer)
    raise AssertionError("it never ends")


def answer(status: int, document: Any, **headers: str) -> Response:
    return Response(status, headers, json.dumps(document).encode())


FAULTS = st.lists(
    st.sampled_from(["drop", "lose", "503", "500", "429", "409", "413", "garbage", "short", "partly", "ok"]),
    max_size=12,
)


@given(st.integers(1, 8), FAULTS, st.booleans())
@settings(max_examples=300, deadline=None)
def test_every_event_has_one_result_and_one_effect(count: int, faults: list[str], to_many: bool) -> None:
    """Under any faults: one result each, in order; what is Sent was stored once; nothing is stored twice."""
    store = Store()
    if to_many:
        sent = items_to_many([f"u{i}" for i in range(count)], {"type": "t", "title": "x"}, 1000.0, key)
    else:
        sent = items(count, 1000.0)
    script = list(faults)

    def serve(request: Request, now: float) -> Any:
        fault = script.pop(0) if script else "ok"
        document = json.loads(request.body or b"")
        if fault == "drop":
            return TransportError("refused", maybe_sent=False)
        if fault in ("503", "500", "429", "409", "413"):
            return answer(int(fault), problem(int(fault), "x"))
        if fault == "partly" and isinstance(document, list):
            some, rest = document[::2], document[1::2]
            results = {json.dumps(one): store.put(dict(one)) for one in some}
            results |= {json.dumps(one): {"error": problem(503, "unavailable")} for one in rest}
            return answer(202, {"results": [results[json.dumps(one)] for one in document]})
        status, told = store.answer(document)
        if fault == "lose":
            return TransportError("reset")
        if fault == "garbage":
            return Response(200, {}, b"<html>")
        if fault == "short":
            return answer(202, {"results": told.get("results", [])[1:]})
        return answer(status, told)

    delivery = Delivery(sent, POLICY, lambda: 0.5)
    drive(delivery, serve)
    assert len(store.order) == len(store.by_key) <= count
    for item in sent:
        if isinstance(item.result, Sent):
            known = f"{item.key}#{item.user}" if to_many else item.key
            assert store.by_key[known]["result"]["id"] == item.result.id
        else:
            assert isinstance(item.result, NotSent)
            assert item.result.idempotency_key == item.key
    if "413" not in faults:  # a single item that is too large is refused for good
        assert all(isinstance(item.result, Sent) for item in sent)


@given(st.lists(st.integers(1, 3000), max_size=60), st.integers(1, 20), st.integers(1024, 6000))
def test_batches_stay_within_their_bounds(sizes: list[int], most: int, most_bytes: int) -> None:
    """In order, nothing left out, never more items or bytes than allowed but for one that is too large alone.
    In order, nothing left out, never more items or bytes than allowed but for one that is too large alone."""
    made = [item_of({"type": "t", "title": "x" * size, "userId": "u"}, 1.0, key) for size in sizes]
    parts = list(batches(made, BatchLimits(most, most_bytes)))
    assert [item for part in parts for item in part] == made
    for part in parts:
        request = Delivery(part, POLICY, lambda: 0.0).next(0.0)
        assert isinstance(request, Request)
        assert 1 <= len(part) <= most
        assert len(part) == 1 or len(request.body or b"") <= most_bytes


def test_parts_to_many_count_the_event_once() -> None:
    """The body of an event to many lies within the bytes allowed, whatever the names of the users."""
    made = items_to_many([f"\x01ü{i}" * 5 for i in range(500)], {"type": "t", "title": "x" * 300}, 1.0, key)
    parts = list(batches(made, BatchLimits(1000, 5000)))
    assert sum(len(part) for part in parts) == 500
    for part in parts:
        request = Delivery(part, POLICY, lambda: 0.0).next(0.0)
        assert isinstance(request, Request)
        assert len(request.body or b"") <= 5000
    assert item_bytes(made[0]) > 0


@given(st.integers(1, 60), st.floats(0, 100), st.floats(0, 1))
def test_pauses_obey_the_server_and_are_bounded(attempts: int, asked_s: float, chance: float) -> None:
    """Never shorter than Retry-After; without it between half and all of the doubled pause, up to the bound.
    Never shorter than Retry-After; without it between half and all of the doubled pause, up to the bound."""
    pause_s = POLICY.pause_s(attempts, asked_s, chance)
    base = min(5.0, 0.2 * 2 ** (attempts - 1))
    assert pause_s >= asked_s
    assert pause_s <= asked_s + base
    assert pause_s >= base / 2


def test_retry_after_is_obeyed() -> None:
    """429 with Retry-After: 7 is tried again after 7 seconds at the earliest."""
    times: list[float] = []

    def serve(request: Request, now: float) -> Response:
        times.append(now)
        if len(times) == 1:
            return answer(429, problem(429, "busy"), **{"retry-after": "7"})
        return answer(202, {"id": "i", "seq": 1, "status": "stored", "channels": []})

    drive(Delivery(items(1), POLICY, lambda: 0.0), serve)
    assert times[1] - times[0] >= 7


def test_no_try_begins_after_the_deadline() -> None:
    """An event is given up at its deadline at the latest, and says so at once if the next try would be later.
    An event is given up at its deadline at the latest, and says so at once if the next try would be later."""
    times: list[float] = []

    def serve(request: Request, now: float) -> TransportError:
        times.append(now)
        return TransportError("timed out")

    (item,) = made = items(1, deadline=20.0)
    end = drive(Delivery(made, POLICY, lambda: 1.0), serve)
    assert end <= 20.0
    assert max(times) < 20.0
    assert isinstance(item.result, NotSent)
    error = item.result.error
    assert isinstance(error, GaveUpError)
    assert error.maybe_sent
    assert error.attempts == len(times)

    (item,) = made = items(1)
    serve_503 = lambda request, now: answer(503, problem(503, "x"), **{"retry-after": "600"})  # noqa: E731
    assert drive(Delivery(made, POLICY, lambda: 0.0), serve_503) < 1.0
    assert isinstance(item.result, NotSent)
    assert isinstance(item.result.error, GaveUpError)
    assert isinstance(item.result.error.last, UnavailableError)


def test_max_attempts_ends_it() -> None:
    """With max_attempts=1 there is no retry; the error says that nothing was sent if nothing was."""
    calls: list[float] = []

    def serve(request: Request, now: float) -> TransportError:
        calls.append(now)
        return TransportError("refused", maybe_sent=False)

    (item,) = made = items(1)
    drive(Delivery(made, RetryPolicy(max_attempts=1), lambda: 0.0), serve)
    assert len(calls) == 1
    assert isinstance(item.result, NotSent)
    assert isinstance(item.result.error, GaveUpError)
    assert not item.result.error.maybe_sent


def test_only_what_failed_for_a_while_is_sent_again() -> None:
    """Of a batch with a stored, a refused and a postponed item, the second request has the postponed one
    alone."""
    bodies: list[Any] = []

    def serve(request: Request, now: float) -> Response:
        bodies.append(json.loads(request.body or b""))
        done = {"id": "i", "seq": 1, "status": "stored", "channels": []}
        if len(bodies) == 1:
            errors = [{"error": problem(422, "invalid")}, {"error": problem(503, "unavailable")}]
            return answer(202, {"results": [done, *errors]})
        return answer(202, done)

    made = items(3)
    drive(Delivery(made, POLICY, lambda: 0.0), serve)
    assert bodies[1] == bodies[0][2]
    assert [type(item.result) for item in made] == [Sent, NotSent, Sent]
    assert isinstance(made[1].result, NotSent)
    assert isinstance(made[1].result.error, InvalidRequestError)


def test_conflict_is_final() -> None:
    """422 idempotency_conflict is told by its own error and not tried again."""
    (item,) = made = items(1)
    drive(Delivery(made, POLICY, lambda: 0.0), lambda r, n: answer(422, problem(422, "idempotency_conflict")))
    assert isinstance(item.result, NotSent)
    assert isinstance(item.result.error, IdempotencyConflictError)
    assert item.attempts == 1


def test_keys_are_made_kept_and_checked() -> None:
    """An event without key gets one of its own; a given key stays; the caller's mapping is not touched."""
    event = {"type": "t", "title": "x"}
    first, second = item_of(event, 1.0, key), item_of(event, 1.0, key)
    assert first.key != second.key
    assert event == {"type": "t", "title": "x"}
    assert item_of(Event(type="t", idempotency_key="mine"), 1.0, key).key == "mine"
    for wrong in ("", "x" * 256, 5):
        with pytest.raises(InvalidRequestError):
            item_of({"type": "t", "idempotencyKey": wrong}, 1.0, key)
    for unsendable in ({"type": object()}, 5, {"userIds": ["a"]}):
        with pytest.raises(InvalidRequestError):
            item_of(unsendable, 1.0, key)  # type: ignore[arg-type]
