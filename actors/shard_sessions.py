"""Session actors of a shard: attachments by gateway link, effects carried out, timers.

Everything written to a gateway in one turn of the event loop leaves as one `Deliver`, in order.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import logging
from collections.abc import Callable, Iterable
from typing import Any

from actors.link import Link
from actors.shard_acks import Acknowledgements
from actors.shard_expiry import Expiry
from actors.shard_presentation import Presentations
from actors.shard_users import User, UserCache
from carillon import server_frames
from carillon.clock import Clock
from carillon.effects import Acknowledged, AcknowledgedRange
from carillon.errors import BusyError, CarillonError, LinkError, LinkFrameError
from carillon.ids import UserKey
from carillon.messages import (
    Attach,
    AttachRefused,
    ClientAck,
    ClientReady,
    ClientResume,
    ClientVisibility,
    ClientWatch,
    CloseSocket,
    Deliver,
    Detach,
    DeviceAck,
    DeviceTold,
    DeviceVisibility,
    SocketDrained,
    Write,
)
from carillon.session import (
    Attachment,
    Close,
    Effect,
    LoadChanges,
    LoadNotifications,
    PresenceChanged,
    PushSignal,
    Send,
    Session,
    SessionLimits,
    Wake,
)
from stores.postgres.shard_store import ShardStore

log = logging.getLogger(__name__)


class Peer:
    """A gateway's link and what waits to be written to it this turn."""

    __slots__ = ("attached", "early", "link", "writes")

    def __init__(self, link: Link) -> None:
        self.link = link
        self.attached: dict[int, tuple[User, Attachment]] = {}
        self.early: dict[int, list[Any]] = {}  # messages of connections whose user is still being loaded
        self.writes: list[Write] = []


class Sessions:
    """The sessions of one shard.

    Args:
        shard: name told in Deliver and CloseSocket.
        term, map_version: give the present values.
        owns: whether a slot is this shard's.
        acks: takes what devices acknowledge, how attention moves on, and when users were last seen.
        presence_changed: told of users whose status changed.
        watch: answers WATCH_PRESENCE.
        expiry: counts anew what was unread when something has expired.
        presentation: knows what to tell connections of how notifications are to present themselves.
        take: takes messages that came while their connection's user was still being loaded.
    """

    def __init__(
        self,
        shard: str,
        store: ShardStore,
        users: UserCache,
        clock: Clock,
        limits: SessionLimits,
        *,
        term: Callable[[], int],
        map_version: Callable[[], int],
        owns: Callable[[int], bool],
        acks: Acknowledgements,
        presence_changed: Callable[[User], None],
        watch: Callable[[Link, ClientWatch, User], None],
        expiry: Expiry,
        presentation: Presentations,
        take: Callable[[Link, Any], None],
    ) -> None:
        self._expiry = expiry
        self._presentation = presentation
        presentation.on_change(self.tell)
        self._shard = shard
        self._store = store
        self._users = users
        self._clock = clock
        self._limits = limits
        self._term = term
        self._map_version = map_version
        self._owns = owns
        self._acks = acks
        self._presence_changed = presence_changed
        self._watch = watch
        self._take = take
        self._peers: dict[Link, Peer] = {}
        self._dirty: dict[Peer, None] = {}
        self._flush_scheduled = False
        self._loop = asyncio.get_running_loop()
        self._deadlines: list[tuple[float, int, User]] = []
        self._order = itertools.count()
        self._timer: asyncio.TimerHandle | None = None
        self._wakes_at = 0.0  # when; uvloop's handle of a short wait (below 0.5 ms) does not know
        self._tasks: set[asyncio.Task[None]] = set()
        self.live = 0  # sessions in memory

    def connections(self) -> int:
        """Attached connections."""
        return sum(len(peer.attached) for peer in self._peers.values())

    # -- messages of gateways ---------------------------------------------------------------------------

    def attach(self, link: Link, message: Attach) -> None:
        """Attach a connection once its user is loaded; refuse it if the slot is another shard's."""
        peer = self._peers.get(link)
        if peer is None:
            peer = self._peers[link] = Peer(link)
        if not self._owns(message.slot):
            self._refuse(peer, [message.conn])
            return
        key = UserKey(message.tenant, message.user)
        user = self._users.ready(key)
        stale = user is not None and user.session is None and user.overdue(self._clock.now_ms())
        if user is not None and not stale:
            self._attach(peer, message, user)
            return
        peer.early[message.conn] = []

        def loaded(found: User | None, error: CarillonError | None) -> None:
            early = peer.early.pop(message.conn, None)
            if early is None or peer.link.closed:
                return  # detached meanwhile
            if found is None:
                log.info("%s: cannot attach: %s", self._shard, error)
                if error is not None and error.code == "fenced":
                    self._refuse(peer, [message.conn])
                else:
                    self._close(peer, [message.conn], 4213, "the service is not available: try later")
                return
            if not self._owns(message.slot):
                self._refuse(peer, [message.conn])
                return
            self._attach(peer, message, found)
            for later in early:
                self._take(link, later)

        def counted() -> None:
            if user is not None and self._users.peek(key) is user:
                loaded(user, None)
            else:  # its slot was away meanwhile
                self._users.when_loaded(key, message.slot, loaded)

        if user is not None:
            self._expiry.count(user, counted)
        else:
            counted()

    def _attach(self, peer: Peer, message: Attach, user: User) -> None:
        if message.token_issued_ms < (user.valid_from_ms or 0):
            self._close(peer, [message.conn], 4001, "the sessions of this user were revoked")
            return
        if user.revoked and message.token_id in user.revoked:
            self._close(peer, [message.conn], 4001, "this token was logged out")
            return
        session = user.session
        if session is None:
            session = user.session = Session(user.key.user, user.head(), self._limits)
            session.last_seen_ms = user.last_seen_ms
            self.live += 1
            self._expiry.attached(user)
        position = None
        if message.epoch is not None:
            position = (message.epoch, message.last_seq, message.last_rev)
        known = peer.attached.pop(message.conn, None)
        if known is not None:  # the gateway attaches the same socket again: the old attachment is stale
            session.detach(known[1], False, self._clock.monotonic(), self._clock.now_ms())
        attachment, effects = session.attach(
            peer, message.conn, message.device, message.session_id,
            self._clock.monotonic(), self._clock.now_ms(),
            position=position, reattach=message.reattach, ready=message.ready, legacy=message.legacy,
            attention=message.attention, viewing=message.viewing,
            began_seq=message.began_seq, acked_seq=message.acked_seq, acked_rev=message.acked_rev,
            poll=message.poll,
        )  # fmt: skip
        attachment.token_id = message.token_id
        peer.attached[message.conn] = (user, attachment)
        frame = self._presentation.again(user) if message.reattach and not message.poll else None
        if frame is not None:
            effects.insert(
                0, Send((attachment,), frame)
            )  # before what is replayed; `run` has WELCOME followed
        self.run(user, effects)
        self._schedule(user)

    def receive(self, link: Link, message: Any) -> None:
        """Take one message of an attached connection (the Client* ones but ClientChange, Detach, Drained)."""
        peer = self._peers.get(link)
        if peer is None:
            return
        early = peer.early.get(message.conn)
        if early is not None:
            if type(message) is Detach:
                del peer.early[message.conn]
            elif len(early) < 64:
                early.append(message)
            return
        found = peer.attached.get(message.conn)
        if found is None:
            return  # a late message of a connection that was closed from here
        user, attachment = found
        session = attachment.session
        kind = type(message)
        if kind is ClientAck:
            effects = session.acknowledge(
                attachment,
                message.seq,
                message.ids,
                self._clock.monotonic(),
                self._clock.now_ms(),
                message.rev,
            )
            self.run(user, effects)
        elif kind is ClientReady:
            self.run(user, session.ready(attachment))
        elif kind is ClientResume:
            effects = session.resume(
                attachment, message.epoch, message.last_seq, message.last_rev,
                self._clock.monotonic(), self._clock.now_ms(),
            )  # fmt: skip
            self.run(user, effects)
            self._schedule(user)
        elif kind is SocketDrained:
            self.run(user, session.drained(attachment))
        elif kind is ClientVisibility:
            effects = session.visibility(
                attachment, message.state, message.viewing, self._clock.monotonic(), self._clock.now_ms()
            )
            self.run(user, effects)
        elif kind is Detach:
            del peer.attached[message.conn]
            self._detach(user, attachment, message.clean)
            return
        elif kind is ClientWatch:
            self._watch(link, message, user)
            return
        if getattr(message, "ref", None) is not None:
            self.answer(link, message.conn, server_frames.ok(message.ref))

    def device_ack(self, user: User, message: DeviceAck) -> None:
        """What a device acknowledges by HTTP; it need not be connected."""
        session = user.session or Session(user.key.user, user.head(), self._limits)
        mine, effects = session.acknowledge_from(
            message.device,
            message.seq,
            message.ids,
            self._clock.monotonic(),
            self._clock.now_ms(),
            message.rev,
        )
        self.run(user, effects)
        if message.seq is not None:
            self._tell(mine, DeviceTold([], message.seq, rev=message.rev))

    def device_visibility(self, user: User, message: DeviceVisibility) -> bool:
        """Where a device's user looks, told by HTTP; False if it is not connected."""
        if user.session is None:
            return False
        found = user.session.visibility_from(
            message.device, message.state, message.viewing, self._clock.monotonic(), self._clock.now_ms()
        )
        if found is None:
            return False
        self.run(user, found[1])
        self._tell(found[0], DeviceTold([], 0, message.state, message.viewing))
        return True

    def _tell(self, attachments: list[Attachment], told: DeviceTold) -> None:
        """Let the holders of connections remember what their device said."""
        for attachment in attachments:
            peer: Peer = attachment.peer
            told.conns = [attachment.conn]
            with contextlib.suppress(CarillonError):
                peer.link.send_nowait(told)

    def find(self, link: Link, conn: int) -> tuple[User, Attachment] | None:
        """The user and attachment of a connection, if it is attached."""
        peer = self._peers.get(link)
        return None if peer is None else peer.attached.get(conn)

    def early(self, link: Link, conn: int) -> list[Any] | None:
        """Where messages of a connection wait whose user is still being loaded, else None."""
        peer = self._peers.get(link)
        return None if peer is None else peer.early.get(conn)

    def answer(self, link: Link, conn: int, frame: bytes) -> None:
        """Write one frame to one connection, behind everything written before."""
        peer = self._peers.get(link)
        if peer is not None and conn in peer.attached:
            peer.writes.append(Write([conn], frame))
            self._mark(peer)

    def tell(self, users: Iterable[User], frame: bytes) -> None:
        """Write a frame that changes no position to all connections of users; a poll would answer for it."""
        by_peer: dict[Peer, list[int]] = {}
        for user in users:
            for attachment in () if user.session is None else user.session.attachments:
                if not attachment.poll:
                    by_peer.setdefault(attachment.peer, []).append(attachment.conn)
        for peer, conns in by_peer.items():
            peer.writes.append(Write(conns, frame))
            self._mark(peer)

    def link_closed(self, link: Link) -> None:
        """A gateway or its link is gone: detach its connections; it attaches those it still has again."""
        peer = self._peers.pop(link, None)
        if peer is None:
            return
        self._dirty.pop(peer, None)
        peer.early.clear()
        for user, attachment in list(peer.attached.values()):
            self._detach(user, attachment, False)
        peer.attached.clear()

    def forget_slots(self, gone: list[User]) -> None:
        """Slots were given away: their sessions end here without a word, gateways attach at the new owner."""
        for user in gone:
            session, user.session = user.session, None
            if session is None:
                continue
            self.live -= 1
            for attachment in session.attachments:
                peer: Peer = attachment.peer
                peer.attached.pop(attachment.conn, None)
                self._refuse(peer, [attachment.conn])
            session.attachments.clear()

    def give_back(self, link: Link, conn: int) -> None:
        """Let a connection be attached again, and ask again: what it asked for could not be written under our
        term, and its gateway may know the next one already, and would tell nobody."""
        peer = self._peers.get(link)
        found = None if peer is None else peer.attached.pop(conn, None)
        if peer is not None and found is not None:
            self._refuse(peer, [conn])
            self._detach(*found, False)

    def close_user(
        self,
        user: User,
        code: int,
        reason: str,
        *,
        only: Callable[[Attachment], bool] | None = None,
    ) -> None:
        """Close all connections of a user, or (`only`) some."""
        session = user.session
        if session is None:
            return
        for attachment in [a for a in session.attachments if only is None or only(a)]:
            peer: Peer = attachment.peer
            self._close(peer, [attachment.conn], code, reason)
            peer.attached.pop(attachment.conn, None)
            self._detach(user, attachment, True)

    def end_user(self, user: User, code: int, reason: str) -> None:
        """Close all connections of a user and end the session at once, without grace."""
        self.close_user(user, code, reason)
        if user.session is not None:
            user.session, user.last_seen_ms = None, None
            self.live -= 1
            self._presence_changed(user)

    def _detach(self, user: User, attachment: Attachment, clean: bool) -> None:
        session = attachment.session
        self.run(user, session.detach(attachment, clean, self._clock.monotonic(), self._clock.now_ms()))
        user.last_seen_ms = session.last_seen_ms
        if user.session is session:
            self._schedule(user)

    # -- effects ----------------------------------------------------------------------------------------

    def run(self, user: User, effects: list[Effect]) -> None:
        """Carry out effects in order."""
        for effect in effects:
            kind = type(effect)
            if kind is Send:
                self._send(effect)  # type: ignore[arg-type]
                if effect.epoch:  # type: ignore[union-attr]
                    self._welcomed(user, effect.to[0])  # type: ignore[union-attr]
            elif kind is Acknowledged:
                self._acks.acknowledged(user, effect)  # type: ignore[arg-type]
            elif kind is LoadNotifications or kind is LoadChanges:
                self._spawn(self._load(user, effect))  # type: ignore[arg-type]
            elif kind is Close:
                self._close_attachment(effect)  # type: ignore[arg-type]
            elif kind is PresenceChanged:
                self._presence_changed(user)
                if effect.status == "offline":  # type: ignore[union-attr]
                    self._acks.offline(user, user.last_seen_ms or self._clock.now_ms())
            elif kind is PushSignal:
                self._acks.signalled(user, effect)  # type: ignore[arg-type]
            elif kind is Wake:
                self._schedule(user)
            elif kind is AcknowledgedRange:
                self._acks.ranged(user, effect)  # type: ignore[arg-type]

    def _welcomed(self, user: User, attachment: Attachment) -> None:
        """WELCOME was written: what presents itself from here on does so as the user wants it."""
        frame = None if attachment.poll else self._presentation.welcome(user)
        if frame is not None:
            self._send(Send((attachment,), frame))

    def _close_attachment(self, effect: Close) -> None:
        peer: Peer = effect.to.peer
        self._close(peer, [effect.to.conn], effect.code, effect.reason)
        peer.attached.pop(effect.to.conn, None)

    def _send(self, effect: Send) -> None:
        to = effect.to
        if len(to) == 1:
            peers: Iterable[tuple[Peer, list[int]]] = ((to[0].peer, [to[0].conn]),)
        else:
            by_peer: dict[Peer, list[int]] = {}
            for attachment in to:
                by_peer.setdefault(attachment.peer, []).append(attachment.conn)
            peers = by_peer.items()
        for peer, conns in peers:
            peer.writes.append(
                Write(
                    conns,
                    effect.frame,
                    effect.seq,
                    effect.rev,
                    effect.replay,
                    effect.page_end,
                    effect.update,
                    effect.epoch,
                )
            )
            self._mark(peer)

    def _mark(self, peer: Peer) -> None:
        self._dirty[peer] = None
        if not self._flush_scheduled:
            self._flush_scheduled = True
            self._loop.call_soon(self.flush)

    def flush(self) -> None:
        """Send what was written this turn."""
        self._flush_scheduled = False
        dirty, self._dirty = self._dirty, {}
        for peer in dirty:
            self._flush_peer(peer)

    def _flush_peer(self, peer: Peer) -> None:
        writes, peer.writes = peer.writes, []
        if not writes or peer.link.closed:
            return
        try:
            peer.link.send_nowait(Deliver(self._shard, self._term(), writes))
        except (BusyError, LinkFrameError) as exc:
            # The gateway does not read, or this is more than one message holds. Drop the link: it comes back
            # with the positions it wrote, and the sessions replay from there; nothing is lost and nothing
            # piles up here.
            log.warning("%s: the link of gateway %s is reset: %s", self._shard, peer.link.peer, exc)
            peer.link.close()
        except LinkError as exc:
            log.info("%s: frames for %s were not sent: %s", self._shard, peer.link.peer, exc)

    def _close(self, peer: Peer, conns: list[int], code: int, reason: str) -> None:
        self._flush_peer(peer)  # what was written before the close goes first
        if not peer.link.closed:
            try:
                peer.link.send_nowait(CloseSocket(self._shard, self._term(), conns, code, reason))
            except CarillonError as exc:
                log.info("%s: close of %s not sent: %s", self._shard, conns, exc)

    def _refuse(self, peer: Peer, conns: list[int]) -> None:
        if not peer.link.closed:
            try:
                peer.link.send_nowait(AttachRefused(conns, self._map_version()))
            except CarillonError as exc:
                log.info("%s: refusal of %s not sent: %s", self._shard, conns, exc)

    async def _load(self, user: User, effect: LoadNotifications | LoadChanges) -> None:
        attachment = effect.to
        try:
            if type(effect) is LoadNotifications:
                rows = await self._store.notifications_after(user.stream_id, effect.after_seq, effect.limit)
                effects = attachment.session.notifications_loaded(
                    attachment, rows, effect, self._clock.now_ms()
                )
            else:
                assert isinstance(effect, LoadChanges)
                rows = await self._store.changes_after(
                    user.stream_id, effect.after_rev, effect.upto_seq, effect.or_after_rev, effect.limit
                )
                effects = attachment.session.changes_loaded(attachment, rows, effect, self._clock.now_ms())
        except CarillonError as exc:
            # The client resumes from what it has: reconnecting later is the whole repair.
            log.info("%s: replay stopped: %s", self._shard, exc)
            peer: Peer = attachment.peer
            if peer.attached.pop(attachment.conn, None) is not None:
                self._close(peer, [attachment.conn], 4213, "the store is not available: try later")
                self._detach(user, attachment, False)
            return
        self.run(user, effects)

    def _spawn(self, work: Any) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- timers -----------------------------------------------------------------------------------------

    def _schedule(self, user: User) -> None:
        session = user.session
        deadline = session.next_deadline() if session is not None else None
        if deadline is None:
            return
        heapq.heappush(self._deadlines, (deadline, next(self._order), user))
        self._arm()

    def _arm(self) -> None:
        if not self._deadlines:
            return
        wait_s = max(0.0, self._deadlines[0][0] - self._clock.monotonic())
        due = self._loop.time() + wait_s
        if self._timer is not None:
            if self._wakes_at <= due:
                return  # wakes early enough
            self._timer.cancel()
        self._wakes_at = due
        self._timer = self._loop.call_later(wait_s, self.tick)

    def tick(self) -> None:
        """Let due sessions know the time; drop those that ended."""
        self._timer = None
        now, now_ms = self._clock.monotonic(), self._clock.now_ms()
        while self._deadlines and self._deadlines[0][0] <= now:
            _, _, user = heapq.heappop(self._deadlines)
            session = user.session
            if session is None:
                continue
            self.run(user, session.tick(now, now_ms))
            if session.ended(now):
                user.session = None
                self.live -= 1
            else:
                deadline = session.next_deadline()
                if deadline is not None:
                    heapq.heappush(self._deadlines, (max(deadline, now + 0.001), next(self._order), user))
        self._arm()

    async def close(self) -> None:
        """Stop timers and loads."""
        if self._timer is not None:
            self._timer.cancel()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
