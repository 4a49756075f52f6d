"""The asynchronous publisher: as the synchronous one, and a background queue that makes batches by itself."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, TypeVar

import httpx

from carillon_client import clock
from carillon_client.async_user_publisher import AsyncUserPublisher
from carillon_client.core import calls
from carillon_client.core.delivery import (
    BatchLimits,
    Delivery,
    Item,
    batches,
    failed_item,
    item_of,
    items_to_many,
)
from carillon_client.core.exchange import Call, CallMachine, Machine, RetryPolicy, Wait
from carillon_client.core.importing import (
    IMPORT_HEADERS,
    IMPORT_TIMEOUT_S,
    IMPORT_TRIES,
    async_counted,
    async_parts,
    report_of,
)
from carillon_client.core.queue import MicroBatcher
from carillon_client.errors import CarillonError, ClosedError, QueueFullError, TransportError
from carillon_client.http_shell import arguments_of, client_options, response_of, transport_error
from carillon_client.models import (
    Broadcast,
    BroadcastFailure,
    BroadcastPage,
    Cancelled,
    Device,
    Edited,
    Event,
    FeedPage,
    ImportReport,
    Notification,
    NotificationHistory,
    Presence,
    Retracted,
    SendReport,
    Sent,
    Token,
)

T = TypeVar("T")


class AsyncPublisher(AsyncUserPublisher):
    """Sends events and asks about users. Belongs to the event loop it is first used on.

    `send` and `enqueue` go through a queue: what comes within `linger_s` travels as one request. Events of
    one user keep their order; the exception is a part of a batch that failed for a while and is sent again.

    Args:
        url: of the ingress, e.g. "http://127.0.0.1:8000".
        key: an API key.
        retry: deadline (from when an event is queued), time-outs and pauses.
        limits: bounds of one request.
        linger_s: how long an event waits for company, in seconds; 0: not at all.
        max_queue: events that wait or are on their way; beyond it `send` and `enqueue` wait, `enqueue_nowait`
            refuses.
        max_flights: requests of the queue at the same time.
        max_connections: of the pool.
        trust_env: whether proxies of the environment are used.

    Raises:
        ValueError: an argument cannot be right.
    """

    def __init__(
        self,
        url: str,
        key: str,
        *,
        retry: RetryPolicy | None = None,
        limits: BatchLimits | None = None,
        linger_s: float = 0.005,
        max_queue: int = 10_000,
        max_flights: int = 4,
        max_connections: int = 20,
        trust_env: bool = True,
    ) -> None:
        if max_queue < 1:
            raise ValueError(f"expected max_queue to be at least 1, got {max_queue!r}")
        self._retry = retry or RetryPolicy()
        self._limits = limits or BatchLimits()
        self._batcher = MicroBatcher(self._limits, linger_s, max_flights)
        options = client_options(url, key, self._retry.attempt_timeout_s, max_connections, trust_env)
        self._client = httpx.AsyncClient(**options)
        self._max_queue = max_queue
        self._max_flights = max_flights
        self._futures: dict[Item, asyncio.Future[Sent]] = {}
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._reserved = 0  # places of waiters that were admitted and have not run yet
        self._flushing = 0
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        self._ended = False

    async def __aenter__(self) -> AsyncPublisher:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Refuse new events, see every queued one through to its result, close the connections.

        Cancellation: what has no result then fails with `ClosedError`; nothing is lost silently.
        """
        self._closed = True
        self._admit()
        try:
            await self.flush()
        finally:
            self._ended = True
            if self._timer is not None:
                self._timer.cancel()
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            for item, future in list(self._futures.items()):
                self._settle(item, future, ClosedError("closed before the event had a result"))
            await self._client.aclose()

    # -- events -------------------------------------------------------------------------------------

    async def send(self, event: Event | Mapping[str, Any]) -> Sent:
        """Send one event, in company; returns when it is stored.

        Cancellation: the event is sent nevertheless; give it a key of your own to find out later.

        Raises:
            CarillonError: it was not stored, or nobody knows (`GaveUpError.maybe_sent`).
        """
        return await asyncio.shield(await self.enqueue(event))

    async def enqueue(self, event: Event | Mapping[str, Any]) -> asyncio.Future[Sent]:
        """Queue one event, waiting while the queue is full; the future gets its result.

        A future that nobody looks at logs its error when it is collected, as futures do.

        Raises:
            InvalidRequestError: it cannot be written as JSON.
            ClosedError: the publisher is closed.
        """
        item = self._item(event)
        if self._waiters or self._room() < 1:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            try:
                await waiter
            except asyncio.CancelledError:
                if waiter in self._waiters:
                    self._waiters.remove(waiter)
                else:
                    self._reserved -= 1
                    self._admit()
                raise
            self._reserved -= 1
            item.deadline = clock.monotonic() + self._retry.deadline_s
        return self._queue(item)

    def enqueue_nowait(self, event: Event | Mapping[str, Any]) -> asyncio.Future[Sent]:
        """Queue one event without waiting.

        Raises:
            QueueFullError: `max_queue` events wait or are on their way.
            InvalidRequestError, ClosedError: as `enqueue`.
        """
        item = self._item(event)
        if self._waiters or self._room() < 1:
            raise QueueFullError(f"{self._max_queue} events are waiting or on their way")
        return self._queue(item)

    async def flush(self) -> None:
        """Send what is queued at once; returns when everything queued so far has a result."""
        self._flushing += 1
        try:
            self._pump()
            waiting = list(self._futures.values())
            if waiting:
                await asyncio.wait(waiting)
        finally:
            self._flushing -= 1

    async def send_many(self, events: Iterable[Event | Mapping[str, Any]]) -> SendReport:
        """Send any number of events in requests within `limits`, past the queue; a result for each, in order.

        Requests go one after the other, so events of one user keep their order. The deadline of an event
        counts from when its request begins.
        """
        items: list[Item] = []
        for event in events:
            try:
                items.append(item_of(event, 0.0, clock.new_key))
            except CarillonError as error:
                items.append(failed_item(event, error))
        return await self._report(items)

    async def send_to(self, user_ids: Iterable[str], event: Event | Mapping[str, Any]) -> SendReport:
        """Send one event to many users; a result for every user, in order, each once.

        Raises:
            InvalidRequestError: the event names recipients itself, or cannot be written as JSON.
        """
        return await self._report(items_to_many(user_ids, event, 0.0, clock.new_key))

    async def _report(self, items: list[Item]) -> SendReport:
        self._check_open()
        for part in batches(items, self._limits):
            deadline = clock.monotonic() + self._retry.deadline_s
            for item in part:
                item.deadline = deadline
            await self._drive(Delivery(part, self._retry, clock.chance))
        return SendReport([item.result for item in items if item.result is not None])

    # -- the queue ----------------------------------------------------------------------------------

    def _item(self, event: Event | Mapping[str, Any]) -> Item:
        self._check_open()
        return item_of(event, clock.monotonic() + self._retry.deadline_s, clock.new_key)

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the publisher is closed")

    def _queue(self, item: Item) -> asyncio.Future[Sent]:
        self._check_open()
        future: asyncio.Future[Sent] = asyncio.get_running_loop().create_future()
        self._futures[item] = future
        self._batcher.add(clock.monotonic(), item)
        self._pump()
        return future

    def _pump(self) -> None:
        """Send every batch that is due and set the timer for the next."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._ended:
            return
        now = clock.monotonic()
        flush = self._flushing > 0
        while batch := self._batcher.take(now, flush):
            task = asyncio.get_running_loop().create_task(self._fly(batch))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        due_s = self._batcher.due_in_s(now, flush)
        if due_s is not None:
            self._timer = asyncio.get_running_loop().call_later(due_s, self._pump)

    async def _fly(self, batch: list[Item]) -> None:
        error: CarillonError = ClosedError("closed before the event had a result")
        try:
            await self._drive(Delivery(batch, self._retry, clock.chance))
        except Exception as exc:
            error = TransportError(f"a defect of this library: {exc!r}")
            error.__cause__ = exc
        finally:
            for item in batch:
                self._settle(item, self._futures[item], error)
            self._batcher.finish(batch)
            self._pump()
            self._admit()

    def _settle(self, item: Item, future: asyncio.Future[Sent], otherwise: CarillonError) -> None:
        del self._futures[item]
        if future.done():
            return
        if isinstance(item.result, Sent):
            future.set_result(item.result)
        else:
            future.set_exception(item.result.error if item.result is not None else otherwise)

    def _room(self) -> int:
        return self._max_queue - len(self._futures) - self._reserved

    def _admit(self) -> None:
        """Let those who wait longest in, as far as there is room; everybody, to be refused, once closed."""
        while self._waiters and (self._closed or self._room() > 0):
            waiter = self._waiters.popleft()
            if not waiter.done():
                self._reserved += 1
                waiter.set_result(None)

    # -- users --------------------------------------------------------------------------------------

    async def presence(self, user_id: str) -> Presence:
        """Whether a user is there."""
        return await self._call(calls.presence(user_id))

    async def presence_of_many(self, user_ids: Iterable[str]) -> list[Presence]:
        """The same of many users, in the order asked; asks in parts of 1,000."""
        users = list(user_ids)
        found: list[Presence] = []
        for start in range(0, len(users), calls.MAX_PRESENCE):
            found += await self._call(calls.presence_of_many(users[start : start + calls.MAX_PRESENCE]))
        return found

    async def mint_token(self, user_id: str, ttl_s: float | None = None) -> Token:
        """A token with which a client acts as this user. `ttl_s` None: the server's default."""
        return await self._call(calls.token(user_id, ttl_s))

    async def put_device(self, user_id: str, device_id: str, device: Device) -> Device:
        """Register or replace a push target."""
        return await self._call(calls.put_device(user_id, device_id, device))

    async def get_device(self, user_id: str, device_id: str) -> Device | None:
        """A push target; None if there is none."""
        return await self._call(calls.get_device(user_id, device_id))

    async def delete_device(self, user_id: str, device_id: str) -> bool:
        """Forget a push target; False if there was none (or an earlier try took it away)."""
        return await self._call(calls.delete_device(user_id, device_id))

    async def feed(
        self,
        user_id: str,
        *,
        limit: int | None = None,
        cursor: str | None = None,
        status: str | None = None,
        type: str | None = None,
        category: str | None = None,
        q: str | None = None,
    ) -> FeedPage:
        """One page of a user's feed, newest first.

        `status`: unread, read or archived; `q`: text in title or body.
        """
        return await self._call(
            calls.feed(user_id, limit=limit, cursor=cursor, status=status, type=type, category=category, q=q)
        )

    async def feed_all(self, user_id: str, **query: Any) -> AsyncIterator[Notification]:
        """A user's whole feed, page by page as it is read; arguments of `feed` but `cursor`."""
        cursor: str | None = None
        query = {"limit": 100, **query}
        while True:
            page = await self.feed(user_id, cursor=cursor, **query)
            for notification in page.notifications:
                yield notification
            cursor = page.next_cursor
            if cursor is None:
                return

    async def notification(self, id: str) -> NotificationHistory:
        """A notification with every try of every push, and what was done to it since."""
        return await self._call(calls.notification(id))

    async def edit(self, id: str, changes: Mapping[str, Any], *, version: int | None = None) -> Edited:
        """Edit a notification everywhere it is shown.

        Args:
            changes: members by their name on the wire (title, body, link, imageUrl, icon, actions, data,
                expiresAt) with their new values; None takes one away.
            version: only if this is the present one. Raises VersionConflictError: it is not.
        """
        return await self._call(calls.edit(id, changes, version))

    async def retract(self, id: str) -> Retracted:
        """Withdraw a notification from feeds, devices and phones, for good."""
        return await self._call(calls.retract(id))

    async def cancel(self, id: str) -> Cancelled:
        """Stop what is pending of a notification; what is shown stays."""
        return await self._call(calls.cancel(id))

    async def preferences(self, user_id: str, *, own: bool = False) -> dict[str, Any]:
        """The user's preferences document with every member; or (`own`) what the user said, no more."""
        return await self._call(calls.get_preferences(user_id, own))

    async def set_preferences(self, user_id: str, document: Mapping[str, Any]) -> dict[str, Any]:
        """Replace the preferences document; returns it with every member."""
        return await self._call(calls.put_preferences(user_id, document))

    async def patch_preferences(
        self, user_id: str, patch: Mapping[str, Any], *, own: bool = False
    ) -> dict[str, Any]:
        """Change a part of what the user said; returns the document as `preferences` does.

        Args:
            patch: a JSON merge patch (RFC 7396): what it leaves out stays, None takes a member out.
        """
        return await self._call(calls.patch_preferences(user_id, patch, own))

    async def revoke_sessions(self, user_id: str) -> None:
        """Tokens issued before now become invalid; the user's sockets are closed with 4001."""
        await self._call(calls.revoke_sessions(user_id))

    # -- broadcasts ---------------------------------------------------------------------------------

    async def import_events(
        self,
        open_lines: Callable[[], Iterable[bytes] | AsyncIterable[bytes]],
        *,
        idempotency_key: str,
        sent: Callable[[int], None] | None = None,
    ) -> ImportReport:
        """Send lines of JSON, each an event (`userIds`: one for each), as fast as they are stored.

        Args:
            open_lines: gives the lines from the first on; called again if the connection broke.
            idempotency_key: names the lines as a whole: what was stored before is not stored again.
            sent: told how many bytes were sent so far.

        Raises:
            CarillonError: it was refused, or the last of `retry.max_attempts` tries (else 5) failed.
        """
        self._check_open()
        tries = self._retry.max_attempts or IMPORT_TRIES
        for attempt in range(1, tries + 1):
            try:
                answer = await self._client.post(
                    "/v1/events/import",
                    content=async_counted(async_parts(open_lines()), sent),
                    headers=IMPORT_HEADERS | {"Idempotency-Key": idempotency_key},
                    timeout=IMPORT_TIMEOUT_S,
                )
            except httpx.RequestError as exc:
                error: CarillonError = transport_error(exc)
                wait_s = 0.0
            else:
                told = response_of(answer)
                found = report_of(told.status, dict(told.headers), told.body)
                if isinstance(found, ImportReport):
                    if found.complete or attempt == tries:
                        return found
                    continue
                error, wait_s = found
            if attempt == tries:
                raise error
            await asyncio.sleep(self._retry.pause_s(attempt, wait_s, clock.chance()))
        raise AssertionError("unreachable")

    async def send_broadcast(
        self,
        event: Event | Mapping[str, Any],
        audience: Any = "all",
        *,
        schedule_at: str | None = None,
        idempotency_key: str | None = None,
    ) -> Broadcast:
        """Send one event to many users, behind single events.

        Args:
            event: without recipients.
            audience: "all", {"topic": name}, {"segment": id}, or a list of at most 1,000 user ids.
            schedule_at: RFC 3339 with offset: it begins then.
            idempotency_key: None: one is made here, so that a repeated try makes no second broadcast.
        """
        key = idempotency_key or clock.new_key()
        return await self._call(calls.send_broadcast(event, audience, schedule_at, key))

    async def broadcast(self, id: str) -> Broadcast:
        """How far a broadcast is."""
        return await self._call(calls.broadcast(id))

    async def broadcasts(
        self, *, limit: int | None = None, cursor: str | None = None, state: str | None = None
    ) -> BroadcastPage:
        """One page of broadcasts, newest first."""
        return await self._call(calls.broadcasts(limit, cursor, state))

    async def broadcast_failures(self, id: str) -> list[BroadcastFailure]:
        """Users whom a broadcast could not reach, the first hundred."""
        return await self._call(calls.broadcast_failures(id))

    async def pause_broadcast(self, id: str) -> Broadcast:
        """Pause: when this returns nothing more is stored for it."""
        return await self._call(calls.act_on_broadcast(id, "pause"))

    async def resume_broadcast(self, id: str) -> Broadcast:
        """Go on where it stood."""
        return await self._call(calls.act_on_broadcast(id, "resume"))

    async def cancel_broadcast(self, id: str) -> Broadcast:
        """End it for good; what is stored stays."""
        return await self._call(calls.act_on_broadcast(id, "cancel"))

    # -- driving ------------------------------------------------------------------------------------

    async def _call(self, call: Call[T]) -> T:
        self._check_open()
        machine = CallMachine(call, self._retry, clock.monotonic(), clock.chance)
        await self._drive(machine)
        return machine.result()

    async def _drive(self, machine: Machine) -> None:
        while (step := machine.next(clock.monotonic())) is not None:
            if isinstance(step, Wait):
                await asyncio.sleep(step.seconds)
                continue
            try:
                answer = await self._client.request(**arguments_of(step))
            except httpx.RequestError as exc:
                machine.failed(clock.monotonic(), transport_error(exc))
            else:
                machine.answered(clock.monotonic(), response_of(answer))
