"""The asynchronous subscriber: `async for notification in Subscriber(url, token=...)`."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from types import TracebackType
from typing import Any, Literal
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import msgspec
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.typing import Subprotocol

from carillon_client import clock
from carillon_client.core.closing import Duty, duty_of_close, duty_of_status
from carillon_client.core.codec import CODECS
from carillon_client.core.subscription import Item, Subscription, SubscriptionLimits
from carillon_client.errors import CarillonError, ClosedError, SubscriptionError, SubscriptionRefusedError
from carillon_client.http_shell import USER_AGENT
from carillon_client.models import Change, Notification, Position, Presentation, Reset

log = logging.getLogger(__name__)

Token = str | Callable[[], str | Awaitable[str]]
Ack = Literal["processed", "received", "manual"]

MAX_MESSAGE_BYTES = 16 * 1024 * 1024
"""A larger message ends the connection (1009).

Pages of a replay come as single notifications of 32 KiB at most.
"""
CLOSE_TIMEOUT_S = 2.0
IDS_PER_FRAME = 1000


class Subscriber:
    """A user's notifications, over connections that are made again whenever they are lost.

    Iterating gives every notification once and in order: what is missed while away is replayed by the server
    (resume), what comes twice is dropped here. A notification counts as processed, and is acknowledged, when
    the loop asks for the next one, or when the `async with` block is left without an exception.

    Args:
        url: of the gateway, e.g. "ws://127.0.0.1:8001/ws"; without a path "/ws" is taken.
        token: a client token, or a (possibly asynchronous) function that gives one. It is called for the
            first connection and whenever the server says that the token expired.
        position: where to go on: what `position` gave, or its text. None: from now on.
        device_id: the id used for this device's push target; None: random per connection.
        ack: "processed"; "received": at once on arrival; "manual": when `ack` is called.
        encoding: "json" or "msgpack".
        max_queue: items received and not taken. Beyond it the socket is not read, unless an operation waits
            for its answer; a server that cannot write closes with 4208, and nothing is missed after the
            reconnect.
        on_reset: called when the server cannot replay everything after `position`: read the feed. May be
            async.
        limits: durations and bounds.
        trust_env: whether proxies of the environment are used.

    Raises:
        ValueError: an argument cannot be right.
    """

    def __init__(
        self,
        url: str,
        *,
        token: Token,
        position: Position | str | None = None,
        device_id: str | None = None,
        ack: Ack = "processed",
        encoding: Literal["json", "msgpack"] = "json",
        max_queue: int = 1000,
        on_reset: Callable[[Reset], Any] | None = None,
        limits: SubscriptionLimits | None = None,
        trust_env: bool = True,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("ws", "wss") or not parts.hostname:
            raise ValueError(f"expected url to be like ws://host:8001/ws, got {url!r}")
        if ack not in ("processed", "received", "manual"):
            raise ValueError(f"expected ack to be processed, received or manual, got {ack!r}")
        if encoding not in ("json", "msgpack"):
            raise ValueError(f"expected encoding to be json or msgpack, got {encoding!r}")
        if max_queue < 1:
            raise ValueError(f"expected max_queue to be at least 1, got {max_queue!r}")
        self._parts = parts._replace(path="/ws" if parts.path in ("", "/") else parts.path)
        self._query = dict(parse_qsl(parts.query))
        if device_id is not None:
            self._query["deviceId"] = device_id
        self._token = token
        self._known_token: str | None = None
        self._subprotocol = Subprotocol(f"carillon.v1.{encoding}")
        self._encode, self._decode = CODECS[self._subprotocol]
        self._manual = ack == "manual"
        self._max_queue = max_queue
        self._on_reset = on_reset
        self._trust_env = trust_env
        if isinstance(position, str):
            position = Position.parse(position)
        self._core = Subscription(position, limits or SubscriptionLimits(), clock.chance, ack == "received")
        self._main = _Queue()
        self._changes: _Queue | None = None
        self._unacked: dict[str, Item] = {}
        self._socket: ClientConnection | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._kick = asyncio.Event()
        self._room = asyncio.Event()
        self._reading = True
        self._error: BaseException | None = None
        self._closed = False
        self._ended = False

    # -- life ---------------------------------------------------------------------------------------

    async def __aenter__(self) -> Subscriber:
        self._start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.processed()
        await self.aclose()

    async def aclose(self) -> None:
        """Send acknowledgements that wait, close the connection (1000).

        Open operations fail with ClosedError.
        """
        if self._closed:
            return
        self._closed = True
        socket = self._socket
        if socket is not None:
            with contextlib.suppress(WebSocketException, OSError, asyncio.TimeoutError):
                await asyncio.wait_for(self._write(socket, flush=True), CLOSE_TIMEOUT_S)
                await socket.close()
        self._ended = True
        self._kick.set()  # wait_for may lose the cancellation; this ends the pump all the same
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._end(ClosedError("the subscriber is closed"))

    @property
    def position(self) -> Position | None:
        """Up to where everything is processed: store it (`str`), and give it to the next `Subscriber`.

        None until the first WELCOME of a subscriber that began without one. With ack="manual" it never passes
        a notification that was not acknowledged.
        """
        return self._core.ledger.position

    @property
    def connected(self) -> bool:
        """Whether there is a connection that the server welcomed."""
        return self._core.live

    @property
    def unread_count(self) -> int | None:
        """Unread notifications, as the last WELCOME said; None before the first."""
        return None if self._core.welcome is None else self._core.welcome.get("unreadCount")

    @property
    def presentation(self) -> Presentation:
        """How the user wants notifications to be shown, as the present connection was told."""
        return self._core.presentation

    # -- items --------------------------------------------------------------------------------------

    def __aiter__(self) -> Subscriber:
        return self

    async def __anext__(self) -> Notification:
        while True:
            item = await self._next(self._main)
            value = item.value
            if isinstance(value, Notification):
                return value
            if isinstance(value, Reset):
                await self._tell_reset(value)

    async def events(self) -> AsyncIterator[Notification | Change | Reset]:
        """Everything in the order received. Instead of, not beside, iterating the subscriber itself."""
        while True:
            try:
                item = await self._next(self._main)
            except StopAsyncIteration:
                return
            yield item.value

    def changes(self) -> AsyncIterator[Change]:
        """What changes, for a second task beside the one that iterates notifications. One at a time.

        Changes are kept for it from this call on; each counts as processed when the next is asked for.

        Raises:
            RuntimeError: there is one already.
        """
        if self._changes is not None:
            raise RuntimeError("changes() is being iterated already")
        queue = self._changes = _Queue()
        for item in [item for item in self._main.items if isinstance(item.value, Change)]:
            self._main.items.remove(item)
            queue.items.append(item)
        return self._iterate_changes(queue)

    async def _iterate_changes(self, queue: _Queue) -> AsyncIterator[Change]:
        try:
            while True:
                try:
                    item = await self._next(queue)
                except StopAsyncIteration:
                    return
                assert isinstance(item.value, Change)
                yield item.value
        finally:
            self._changes = None
            for item in queue.items:
                self._core.done(item, clock.monotonic())

    async def _next(self, queue: _Queue) -> Item:
        self._start()
        self._processed(queue)
        while self._closed or not queue.items:
            if self._closed:
                raise StopAsyncIteration
            if self._error is not None:
                raise self._error
            queue.arrived.clear()
            await queue.arrived.wait()
        item = queue.current = queue.items.popleft()
        self._room.set()
        if self._manual and isinstance(item.value, Notification):
            self._unacked[item.value.id] = item
        return item

    def _processed(self, queue: _Queue) -> None:
        item, queue.current = queue.current, None
        if item is not None and not (self._manual and isinstance(item.value, Notification)):
            self._core.done(item, clock.monotonic())
            self._kick.set()

    async def _tell_reset(self, reset: Reset) -> None:
        if self._on_reset is None:
            log.warning(
                "not everything after %s could be replayed; going on at %s", reset.before, reset.position
            )
            return
        told = self._on_reset(reset)
        if inspect.isawaitable(told):
            await told

    def processed(self) -> None:
        """Say that the items handed out last are processed, before asking for the next ones."""
        self._processed(self._main)
        if self._changes is not None:
            self._processed(self._changes)

    def ack(self, *notifications: Notification | str) -> None:
        """With ack="manual": these (or their ids) are processed.

        Ids that are not waiting for it are ignored.
        """
        for one in notifications:
            item = self._unacked.pop(one if isinstance(one, str) else one.id, None)
            if item is not None:
                self._core.done(item, clock.monotonic())
        self._kick.set()

    # -- operations ---------------------------------------------------------------------------------

    async def mark_read(self, *ids: str) -> None:
        """Mark as read, on all devices; returns after the commit.

        All operations: repeated over reconnects until `operation_timeout_s`; states only grow, so that is
        safe.

        Raises:
            OperationError: the server refused it.
            OperationTimeoutError: no answer in time.
            QueueFullError: too many operations are open.
        """
        await self._for_ids("MARK_READ", ids)

    async def mark_seen(self, *ids: str) -> None:
        """Mark as seen; see `mark_read`."""
        await self._for_ids("MARK_SEEN", ids)

    async def mark_all_read(self, up_to_seq: int | None = None) -> None:
        """Mark everything up to a `seq` as read.

        None: up to the last one received here, never what nobody has seen yet; up to the head if none was.
        """
        if up_to_seq is None:
            up_to_seq = self._core.received_seq
        frame: dict[str, Any] = {"type": "MARK_ALL_READ"}
        if up_to_seq is not None:
            frame["upToSeq"] = up_to_seq
        await self._operate(frame)

    async def archive(self, id: str) -> None:
        """Archive; see `mark_read`."""
        await self._operate({"type": "ARCHIVE", "notificationId": id})

    async def dismiss(self, id: str) -> None:
        """Dismiss; see `mark_read`."""
        await self._operate({"type": "DISMISS", "notificationId": id})

    async def click(self, id: str, action_id: str | None = None) -> None:
        """Note a click (which implies read); see `mark_read`."""
        frame: dict[str, Any] = {"type": "CLICK", "notificationId": id}
        if action_id is not None:
            frame["actionId"] = action_id
        await self._operate(frame)

    async def set_visibility(
        self, state: Literal["focused", "visible", "hidden", "idle"], viewing: str | None = None
    ) -> None:
        """Say how much attention there is; said again on every further connection. See `mark_read`."""
        frame: dict[str, Any] = {"type": "VISIBILITY", "state": state}
        if viewing is not None:
            frame["viewing"] = viewing
        self._core.set_visibility(frame)
        await self._operate(frame, repeat=False)

    async def watch_presence(self, user_ids: Sequence[str]) -> None:
        """Ask for PRESENCE changes of these users, on every further connection too."""
        frame = {"type": "WATCH_PRESENCE", "userIds": list(user_ids)}
        await self._operate(frame)
        self._core.watch("presence", frame)

    async def subscribe(self, topic: str) -> None:
        """Subscribe this connection, and every further one, to a topic."""
        frame = {"type": "SUBSCRIBE", "topic": topic}
        await self._operate(frame)
        self._core.watch(f"topic {topic}", frame)

    async def unsubscribe(self, topic: str) -> None:
        """The end of `subscribe`."""
        self._core.watch(f"topic {topic}", None)
        await self._operate({"type": "UNSUBSCRIBE", "topic": topic})

    async def _for_ids(self, kind: str, ids: Sequence[str]) -> None:
        for start in range(0, len(ids), IDS_PER_FRAME):
            await self._operate({"type": kind, "notificationIds": list(ids[start : start + IDS_PER_FRAME])})

    async def _operate(self, frame: dict[str, Any], *, repeat: bool = True) -> None:
        self._start()
        if self._closed:
            raise ClosedError("the subscriber is closed")
        if self._error is not None:
            raise self._error
        operation = self._core.operate(frame, clock.monotonic(), repeat=repeat)
        ended = asyncio.Event()
        operation.on_end = ended.set
        self._kick.set()
        self._room.set()  # its answer must be read even if the queue is full
        await ended.wait()
        if isinstance(operation.outcome, CarillonError):
            raise operation.outcome

    # -- connections --------------------------------------------------------------------------------

    def _start(self) -> None:
        if not self._tasks and not self._closed and self._error is None:
            loop = asyncio.get_running_loop()
            self._tasks = [loop.create_task(self._guard(work)) for work in (self._run, self._pump)]

    async def _guard(self, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        except Exception as exc:
            if not isinstance(exc, SubscriptionError):
                log.exception("the subscription ended")
            self._end(exc)
            if self._socket is not None:
                self._socket.transport.abort()
            for task in self._tasks:
                if task is not asyncio.current_task():
                    task.cancel()

    def _end(self, error: BaseException) -> None:
        self._ended = True
        self._kick.set()
        if self._error is None:
            self._error = error
        self._core.stop(
            error if isinstance(error, CarillonError) else ClosedError(f"the subscription ended: {error!r}")
        )
        self._main.arrived.set()
        if self._changes is not None:
            self._changes.arrived.set()

    async def _run(self) -> None:
        while True:
            code, reason = await self._connect_once()
            if self._closed:
                return
            pause_s = self._core.closed(code, reason, can_renew=callable(self._token))
            if duty_of_close(code) is Duty.NEW_TOKEN:
                self._known_token = None
            log.info("connection ended (%s %s); the next in %.2f s", code, reason, pause_s)
            await asyncio.sleep(pause_s)

    async def _connect_once(self) -> tuple[int | None, str]:
        """One connection from beginning to end; its close code and reason."""
        try:
            token = await self._get_token()
        except (OSError, asyncio.TimeoutError) as exc:
            return None, f"no token: {exc!r}"
        except CarillonError as exc:
            if not exc.temporary:
                raise
            return None, f"no token: {exc}"
        query = {**self._query, **self._core.connecting(clock.monotonic())}
        url = urlunsplit(self._parts._replace(query=urlencode(query)))
        try:
            socket = await connect(
                url,
                additional_headers={"Authorization": f"Bearer {token}"},
                subprotocols=[self._subprotocol],
                user_agent_header=USER_AGENT,
                compression=None,
                max_size=MAX_MESSAGE_BYTES,
                open_timeout=self._core.limits.welcome_timeout_s,
                close_timeout=CLOSE_TIMEOUT_S,
                ping_interval=None,  # the machine supervises: it knows when silence means something
                proxy=True if self._trust_env else None,
            )
        except InvalidStatus as exc:
            status = exc.response.status_code
            if duty_of_status(status) is Duty.STOP:
                raise SubscriptionRefusedError(
                    status, f"the handshake was refused with HTTP {status}"
                ) from exc
            return None, f"HTTP {status}"
        except (OSError, asyncio.TimeoutError, EOFError, WebSocketException) as exc:
            return None, f"{type(exc).__name__}: {exc}"
        self._socket = socket
        self._core.opened(clock.monotonic())
        self._kick.set()
        try:
            while True:
                while self._full():
                    self._reading = False
                    self._room.clear()
                    await self._room.wait()
                self._reading = True
                self._receive(await socket.recv())
        except ConnectionClosed:
            return socket.close_code, socket.close_reason or ""
        finally:
            self._reading = True
            self._socket = None
            socket.transport.abort()

    async def _get_token(self) -> str:
        if self._known_token is None:
            token = self._token() if callable(self._token) else self._token
            self._known_token = await token if inspect.isawaitable(token) else token
        return self._known_token

    def _full(self) -> bool:
        waiting = len(self._main.items) + (len(self._changes.items) if self._changes is not None else 0)
        return waiting >= self._max_queue and not self._core.operations

    def _receive(self, message: str | bytes) -> None:
        try:
            frame = self._decode(message)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            log.warning("a message that cannot be read was passed over")
            return
        self._core.receive(frame, clock.monotonic())
        for item in self._core.take_items():
            queue = self._main
            if self._changes is not None and isinstance(item.value, Change):
                queue = self._changes
            queue.items.append(item)
            queue.arrived.set()
        self._kick.set()

    async def _pump(self) -> None:
        """Write what is to be written, and let time pass for the machine."""
        while not self._ended:
            self._kick.clear()
            socket = self._socket
            if not self._core.tick(clock.monotonic(), self._reading) and socket is not None:
                log.info("the connection is silent: abandoned")
                socket.transport.abort()
                await asyncio.sleep(
                    0.02
                )  # until the reader has heard of it, the machine would say the same again
            elif socket is not None:
                try:
                    await asyncio.wait_for(self._write(socket), self._core.limits.pong_timeout_s)
                except asyncio.TimeoutError:  # first: from Python 3.11 on it is an OSError
                    socket.transport.abort()
                except (ConnectionClosed, OSError):
                    pass  # the reader hears of it
            wake_at = self._core.wake_at()
            # Not wait_for: before Python 3.12 it loses a cancellation that comes together with the event.
            timer = None
            if wake_at is not None:
                wait_s = max(0.0, wake_at - clock.monotonic())
                timer = asyncio.get_running_loop().call_later(wait_s, self._kick.set)
            try:
                await self._kick.wait()
            finally:
                if timer is not None:
                    timer.cancel()

    async def _write(self, socket: ClientConnection, flush: bool = False) -> None:
        for frame in self._core.frames_to_send(clock.monotonic(), flush):
            await socket.send(self._encode(frame))


class _Queue:
    """Items for one iterator. `current` is the one that the application has."""

    def __init__(self) -> None:
        self.items: deque[Item] = deque()
        self.current: Item | None = None
        self.arrived = asyncio.Event()
