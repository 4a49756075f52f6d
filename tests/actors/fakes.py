"""Stand-ins of cluster members for in-process tests: a coordinator and shards on real links.

```python
coordinator = await FakeCoordinator.start()
config = actor_config("router", "router-1", coordinator)      # or settings=..., labels=...
shard = await FakeShard.start(coordinator, "shard-a")
coordinator.spread()                                          # slots evenly over the joined shards
...
await shard.stop(); await coordinator.stop()
```
"""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from collections.abc import Callable, Iterable
from typing import Any

from actors.config import ActorConfig
from actors.link import Link, LinkServer
from actors.member import Membership
from carillon.errors import NotFoundError, NotOwnerError
from carillon.ids import SLOTS
from carillon.messages import (
    Address,
    ClusterMap,
    Done,
    Join,
    Leave,
    Member,
    MemberStats,
    Outcome,
    Outcomes,
    PresenceQuery,
    PresenceReply,
    Publish,
    Renew,
    StatsQuery,
    StatsReply,
    UserPresence,
)
from carillon.metrics import Stats
from carillon.settings import Settings

SECRET = b"secret of the tests, 32 bytes long"


@functools.cache
def _runtime_dir() -> str:
    """One folder per test process: runs beside each other must not take each other's sockets."""
    folder = tempfile.mkdtemp(prefix="carillon-run-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def fast_settings(**sections: dict[str, Any]) -> Settings:
    """Settings with short durations. `sections` go on top: `fast_settings(gateway={"port": 0})`."""
    base: dict[str, dict[str, Any]] = {
        "cluster": {
            "lease_renew_s": 0.05,
            "lease_timeout_s": 0.5,
            "rebalance_delay_s": 0.02,
            "node_poll_s": 0.1,
            "runtime_dir": _runtime_dir(),
        },
        "link": {"reconnect_min_s": 0.01, "reconnect_max_s": 0.1, "request_timeout_s": 5.0},
        "gateway": {"port": 0},
        "ingress": {"direct_port": 0},
    }
    for name, values in sections.items():
        base[name] = {**base.get(name, {}), **values}
    return Settings().with_values(**base)


def actor_config(
    kind: str,
    name: str,
    coordinator: FakeCoordinator,
    *,
    settings: Settings | None = None,
    labels: dict[str, str] | None = None,
    node: str = "local",
) -> ActorConfig:
    """A config of an actor that joins `coordinator`."""
    settings = settings or coordinator.settings
    return ActorConfig(kind, name, node, settings, coordinator.secret, labels or {}, coordinator.address)


class FakeCoordinator:
    """Takes joins, hands out maps; slots move only when the test says so.

    A member that is no shard leaves the map when its link closes; a shard stays until `forget`.
    """

    def __init__(self, settings: Settings | None = None, secret: bytes = SECRET) -> None:
        self.settings = settings or fast_settings()
        self.secret = secret
        self.version = 1
        self.owners: dict[int, str] = {}
        self.joined: dict[str, Member] = {}
        self.joins: list[Member] = []
        self.renewals: dict[str, Renew] = {}
        self.left: list[str] = []
        self.address = Address("127.0.0.1", 0)
        self.on_leave: Callable[[str], None] | None = None
        self._server = LinkServer(self, self.settings.link, "coordinator", secret)
        self._links: dict[Link, str] = {}
        self._terms: dict[str, int] = {}

    @classmethod
    async def start(cls, settings: Settings | None = None, *, port: int = 0) -> FakeCoordinator:
        """Listen on a free port."""
        self = cls(settings)
        await self.listen(port)
        return self

    async def listen(self, port: int = 0) -> None:
        """Listen (again, after `stop`)."""
        host, bound = await self._server.start("127.0.0.1", port)
        self.address = Address(host, bound)

    async def stop(self) -> None:
        """Close the listener and all links, as a crash would."""
        await self._server.close()
        self._links.clear()

    # -- what the test turns ------------------------------------------------------------------------

    def set_owner(self, slots: int | Iterable[int], shard: str | None) -> None:
        """Give slots to a shard (None: to nobody) and publish. The shard need not have joined yet."""
        for slot in (slots,) if isinstance(slots, int) else slots:
            if shard is None:
                self.owners.pop(slot, None)
            else:
                self.owners[slot] = shard
        self.publish_map()

    def spread(self) -> None:
        """Give all slots evenly to the joined shards and publish."""
        shards = [member.name for member in self.joined.values() if member.kind == "shard"]
        self.owners = {slot: shards[slot % len(shards)] for slot in range(SLOTS)} if shards else {}
        self.publish_map()

    def bump_term(self, shard: str) -> int:
        """Raise a shard's term and publish; returns the new term."""
        self._terms[shard] = self._terms.get(shard, 1) + 1
        self.publish_map()
        return self._terms[shard]

    def forget(self, name: str) -> None:
        """Drop a member (its slots have no owner then) and publish."""
        self.joined.pop(name, None)
        self.owners = {slot: owner for slot, owner in self.owners.items() if owner != name}
        self.publish_map()

    def add(self, member: Member) -> None:
        """Put a member into the map that never joins (a made-up address) and publish."""
        self.joined[member.name] = member
        self.publish_map()

    def map(self) -> ClusterMap:
        """The present map."""
        shards = [
            Member(
                m.kind,
                m.name,
                m.node,
                m.incarnation,
                m.address,
                m.public,
                m.labels,
                self._terms.get(m.name, 1),
            )
            for m in self.joined.values()
            if m.kind == "shard"
        ]
        index = {member.name: i for i, member in enumerate(shards)}
        owners = [index.get(self.owners.get(slot, ""), -1) for slot in range(SLOTS)]
        others = [member for member in self.joined.values() if member.kind != "shard"]
        return ClusterMap(self.version, owners, shards, others)

    def publish_map(self) -> None:
        """Raise the version and push the map to every joined member."""
        self.version += 1
        new = self.map()
        for link in list(self._links):
            if not link.closed:
                link.send_nowait(new)

    # -- LinkHandler --------------------------------------------------------------------------------

    def link_opened(self, link: Link) -> None:
        """Nothing until it joins."""

    def link_closed(self, link: Link) -> None:
        """A member that is no shard is gone."""
        name = self._links.pop(link, None)
        if name is None or name in self._links.values():
            return
        member = self.joined.get(name)
        if member is not None and member.kind != "shard":
            self.forget(name)

    def receive(self, link: Link, message: Any, request: int) -> None:
        """Answer as the real one does."""
        if type(message) is Join:
            self.joins.append(message.member)
            self.joined[message.member.name] = message.member
            self._links[link] = message.member.name
            self.version += 1
            new = self.map()
            link.reply_nowait(request, new)
            for other in list(self._links):
                if other is not link and not other.closed:
                    other.send_nowait(new)
        elif type(message) is Renew:
            self.renewals[message.name] = message
        elif type(message) is Leave:
            self.left.append(message.name)
            if self.on_leave is not None:
                self.on_leave(message.name)
            self.forget(message.name)
            link.reply_nowait(request, Done())
        elif type(message) is StatsQuery:
            members = []
            for member in self.joined.values():
                renew = self.renewals.get(member.name)
                if renew is not None:
                    members.append(MemberStats(member, 0.0, renew.counters, renew.gauges, renew.histograms))
            slots: dict[str, int] = {}
            for owner in self.owners.values():
                slots[owner] = slots.get(owner, 0) + 1
            link.reply_nowait(request, StatsReply(self.version, slots, members))
        else:
            link.fail_nowait(request, NotFoundError(f"no answer to {type(message).__name__}"))

    def read_finished(self, link: Link) -> None:
        """Nothing to batch."""


class FakeShard:
    """A shard without a database: numbers events per user, remembers everything, moves when told.

    Attributes:
        owned: slots it answers for; None means all. Others get outcome or failure "moved".
        answer: replaces the default answer: called with (link, message, request); return True if handled.
        stored: outcomes by event id (a retry of a known event gets the first outcome again).
        events: events in the order they were stored.
        received: (message, request number) of everything else, in order.
        presence: status by user; the others are offline.
    """

    def __init__(self, coordinator: FakeCoordinator, name: str, *, settings: Settings | None = None) -> None:
        self.name = name
        self.config = actor_config("shard", name, coordinator, settings=settings)
        self.membership = Membership(self.config, self, stats=Stats())
        self.owned: set[int] | None = None
        self.answer: Callable[[Link, Any, int], bool] | None = None
        self.stored: dict[bytes, Outcome] = {}
        self.events: list[Any] = []
        self.batches: list[int] = []
        self.received: list[tuple[Any, int]] = []
        self.presence: dict[str, str] = {}
        self.links: list[Link] = []
        self._seqs: dict[tuple[str, str], int] = {}

    @classmethod
    async def start(cls, coordinator: FakeCoordinator, name: str, **more: Any) -> FakeShard:
        """Join the coordinator."""
        self = cls(coordinator, name, **more)
        await self.membership.start()
        return self

    async def stop(self) -> None:
        """Close all links, as a crash would."""
        await self.membership.close()

    def owns(self, slot: int) -> bool:
        """Whether this shard answers for `slot`."""
        return self.owned is None or slot in self.owned

    def publish(self, message: Publish) -> Outcomes:
        """The default answer to a batch."""
        self.batches.append(len(message.events))
        outcomes = []
        for event in message.events:
            if not self.owns(event.slot):
                outcomes.append(Outcome(event.id, status="moved"))
                continue
            known = self.stored.get(event.id)
            if known is None:
                key = (event.tenant, event.user)
                self._seqs[key] = self._seqs.get(key, 0) + 1
                known = self.stored[event.id] = Outcome(event.id, self._seqs[key], "delivered", ["in_app"])
                self.events.append(event)
            outcomes.append(known)
        return Outcomes(outcomes)

    # -- LinkHandler --------------------------------------------------------------------------------

    def link_opened(self, link: Link) -> None:
        """Remember it."""
        self.links.append(link)

    def link_closed(self, link: Link) -> None:
        """Forget it."""
        self.links.remove(link)

    def receive(self, link: Link, message: Any, request: int) -> None:
        """Answer as a shard does."""
        if self.answer is not None and self.answer(link, message, request):
            return
        if type(message) is Publish:
            link.reply_nowait(request, self.publish(message))
            return
        self.received.append((message, request))
        if type(message) is PresenceQuery:
            users = [UserPresence(user, self.presence.get(user, "offline")) for user in message.users]
            link.reply_nowait(request, PresenceReply(users))
        elif request > 0:
            if not self.owns(message.slot):
                link.fail_nowait(request, NotOwnerError(f"{self.name} does not own {message.slot}"))
            else:
                link.reply_nowait(request, Done())

    def read_finished(self, link: Link) -> None:
        """Answers go out one by one."""
