"""The synchronous publisher."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, TypeVar

import httpx

from carillon_client import clock
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
    counted,
    parts,
    report_of,
)
from carillon_client.errors import CarillonError, ClosedError
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
    NotSent,
    Presence,
    Retracted,
    SendReport,
    Sent,
    Token,
)
from carillon_client.user_publisher import UserPublisher

T = TypeVar("T")


class Publisher(UserPublisher):
    """Sends events and asks about users, over pooled connections. Threads may share one.

    Every event has an idempotency key before its first try, its own or one made here, so a retry after a
    timeout or a broken connection never duplicates. Calls return when they are over: nothing waits in the
    background.

    Args:
        url: of the ingress, e.g. "http://127.0.0.1:8000".
        key: an API key.
        retry: deadline, time-outs and pauses of every call.
        limits: bounds of one request of `send_many` and `send_to`.
        max_connections: of the pool; threads beyond it wait for one another.
        trust_env: whether proxies of the environment are used.

    Raises:
        ValueError: the URL or the key cannot be one.
    """

    def __init__(
        self,
        url: str,
        key: str,
        *,
        retry: RetryPolicy | None = None,
        limits: BatchLimits | None = None,
        max_connections: int = 20,
        trust_env: bool = True,
    ) -> None:
        self._retry = retry or RetryPolicy()
        self._limits = limits or BatchLimits()
        options = client_options(url, key, self._retry.attempt_timeout_s, max_connections, trust_env)
        self._client = httpx.Client(**options)

    def __enter__(self) -> Publisher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    # -- events -------------------------------------------------------------------------------------

    def send(self, event: Event | Mapping[str, Any]) -> Sent:
        """Send one event; returns when it is stored.

        Raises:
            CarillonError: it was not, or nobody knows (`GaveUpError.maybe_sent`).
        """
        item = item_of(event, clock.monotonic() + self._retry.deadline_s, clock.new_key)
        self._deliver([item])
        if isinstance(item.result, NotSent):
            raise item.result.error
        assert item.result is not None
        return item.result

    def send_many(self, events: Iterable[Event | Mapping[str, Any]]) -> SendReport:
        """Send any number of events, in requests within `limits`, one after the other.

        Returns a result for every event, in order. The deadline of an event counts from when its request
        begins.
        """
        items: list[Item] = []
        for event in events:
            try:
                items.append(item_of(event, 0.0, clock.new_key))
            except CarillonError as error:
                items.append(failed_item(event, error))
        return self._report(items)

    def send_to(self, user_ids: Iterable[str], event: Event | Mapping[str, Any]) -> SendReport:
        """Send one event to many users; a result for every user, in order, each once.

        Raises:
            InvalidRequestError: the event names recipients itself, or cannot be written as JSON.
        """
        return self._report(items_to_many(user_ids, event, 0.0, clock.new_key))

    def _report(self, items: list[Item]) -> SendReport:
        for part in batches(items, self._limits):
            deadline = clock.monotonic() + self._retry.deadline_s
            for item in part:
                item.deadline = deadline
            self._deliver(part)
        return SendReport([item.result for item in items if item.result is not None])

    def _deliver(self, items: list[Item]) -> None:
        self._drive(Delivery(items, self._retry, clock.chance))

    # -- users --------------------------------------------------------------------------------------

    def presence(self, user_id: str) -> Presence:
        """Whether a user is there."""
        return self._call(calls.presence(user_id))

    def presence_of_many(self, user_ids: Iterable[str]) -> list[Presence]:
        """The same of many users, in the order asked; asks in parts of 1,000."""
        users = list(user_ids)
        found: list[Presence] = []
        for start in range(0, len(users), calls.MAX_PRESENCE):
            found += self._call(calls.presence_of_many(users[start : start + calls.MAX_PRESENCE]))
        return found

    def mint_token(self, user_id: str, ttl_s: float | None = None) -> Token:
        """A token with which a client acts as this user. `ttl_s` None: the server's default."""
        return self._call(calls.token(user_id, ttl_s))

    def put_device(self, user_id: str, device_id: str, device: Device) -> Device:
        """Register or replace a push target."""
        return self._call(calls.put_device(user_id, device_id, device))

    def get_device(self, user_id: str, device_id: str) -> Device | None:
        """A push target; None if there is none."""
        return self._call(calls.get_device(user_id, device_id))

    def delete_device(self, user_id: str, device_id: str) -> bool:
        """Forget a push target; False if there was none (or an earlier try took it away)."""
        return self._call(calls.delete_device(user_id, device_id))

    def feed(
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
        return self._call(
            calls.feed(user_id, limit=limit, cursor=cursor, status=status, type=type, category=category, q=q)
        )

    def feed_all(self, user_id: str, **query: Any) -> Iterator[Notification]:
        """A user's whole feed, page by page as it is read; arguments of `feed` but `cursor`."""
        cursor: str | None = None
        query = {"limit": 100, **query}
        while True:
            page = self.feed(user_id, cursor=cursor, **query)
            yield from page.notifications
            cursor = page.next_cursor
            if cursor is None:
                return

    def notification(self, id: str) -> NotificationHistory:
        """A notification with every try of every push, and what was done to it since."""
        return self._call(calls.notification(id))

    def edit(self, id: str, changes: Mapping[str, Any], *, version: int | None = None) -> Edited:
        """Edit a notification everywhere it is shown.

        Args:
            changes: members by their name on the wire (title, body, link, imageUrl, icon, actions, data,
                expiresAt) with their new values; None takes one away.
            version: only if this is the present one. Raises VersionConflictError: it is not.
        """
        return self._call(calls.edit(id, changes, version))

    def retract(self, id: str) -> Retracted:
        """Withdraw a notification from feeds, devices and phones, for good."""
        return self._call(calls.retract(id))

    def cancel(self, id: str) -> Cancelled:
        """Stop what is pending of a notification; what is shown stays."""
        return self._call(calls.cancel(id))

    def preferences(self, user_id: str, *, own: bool = False) -> dict[str, Any]:
        """The user's preferences document with every member; or (`own`) what the user said, no more."""
        return self._call(calls.get_preferences(user_id, own))

    def set_preferences(self, user_id: str, document: Mapping[str, Any]) -> dict[str, Any]:
        """Replace the preferences document; returns it with every member."""
        return self._call(calls.put_preferences(user_id, document))

    def patch_preferences(
        self, user_id: str, patch: Mapping[str, Any], *, own: bool = False
    ) -> dict[str, Any]:
        """Change a part of what the user said; returns the document as `preferences` does.

        Args:
            patch: a JSON merge patch (RFC 7396): what it leaves out stays, None takes a member out.
        """
        return self._call(calls.patch_preferences(user_id, patch, own))

    def revoke_sessions(self, user_id: str) -> None:
        """Tokens issued before now become invalid; the user's sockets are closed with 4001."""
        self._call(calls.revoke_sessions(user_id))

    # -- many events --------------------------------------------------------------------------------

    def import_events(
        self,
        open_lines: Callable[[], Iterable[bytes]],
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
        if self._client.is_closed:
            raise ClosedError("the publisher is closed")
        for attempt in range(1, (self._retry.max_attempts or IMPORT_TRIES) + 1):
            last = attempt == (self._retry.max_attempts or IMPORT_TRIES)
            try:
                answer = self._client.post(
                    "/v1/events/import",
                    content=counted(parts(open_lines()), sent),
                    headers=IMPORT_HEADERS | {"Idempotency-Key": idempotency_key},
                    timeout=IMPORT_TIMEOUT_S,
                )
            except httpx.RequestError as exc:
                error: CarillonError = transport_error(exc)
                wait_s = 0.0
            else:
                told = response_of(answer)
                found = report_of(told.status, dict(told.headers), told.body)
                if isinstance(found, ImportReport) and (found.complete or last):
                    return found
                if isinstance(found, ImportReport):
                    continue
                error, wait_s = found
            if last:
                raise error
            clock.sleep(self._retry.pause_s(attempt, wait_s, clock.chance()))
        raise AssertionError("unreachable")

    # -- broadcasts ---------------------------------------------------------------------------------

    def send_broadcast(
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
        return self._call(calls.send_broadcast(event, audience, schedule_at, key))

    def broadcast(self, id: str) -> Broadcast:
        """How far a broadcast is."""
        return self._call(calls.broadcast(id))

    def broadcasts(
        self, *, limit: int | None = None, cursor: str | None = None, state: str | None = None
    ) -> BroadcastPage:
        """One page of broadcasts, newest first."""
        return self._call(calls.broadcasts(limit, cursor, state))

    def broadcast_failures(self, id: str) -> list[BroadcastFailure]:
        """Users whom a broadcast could not reach, the first hundred."""
        return self._call(calls.broadcast_failures(id))

    def pause_broadcast(self, id: str) -> Broadcast:
        """Pause: when this returns nothing more is stored for it."""
        return self._call(calls.act_on_broadcast(id, "pause"))

    def resume_broadcast(self, id: str) -> Broadcast:
        """Go on where it stood."""
        return self._call(calls.act_on_broadcast(id, "resume"))

    def cancel_broadcast(self, id: str) -> Broadcast:
        """End it for good; what is stored stays."""
        return self._call(calls.act_on_broadcast(id, "cancel"))

    # -- driving ------------------------------------------------------------------------------------

    def _call(self, call: Call[T]) -> T:
        machine = CallMachine(call, self._retry, clock.monotonic(), clock.chance)
        self._drive(machine)
        return machine.result()

    def _drive(
        self,
        machine: Machine,
        now: Callable[[], float] = clock.monotonic,
        sleep: Callable[[float], None] = clock.sleep,
    ) -> None:
        if self._client.is_closed:
            raise ClosedError("the publisher is closed")
        while (step := machine.next(now())) is not None:
            if isinstance(step, Wait):
                sleep(step.seconds)
                continue
            try:
                answer = self._client.request(**arguments_of(step))
            except httpx.RequestError as exc:
                machine.failed(now(), transport_error(exc))
            else:
                machine.answered(now(), response_of(answer))
