"""Who owns what: the coordinator's decisions, without a clock, a socket, Ray or a database.

Slots go to shards fairly (counts differ by at most one) and move as little as possible. A member that does
not renew its lease is *lapsed*; what follows from that is decided here and carried out by
actors/coordinator.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from carillon.ids import SLOTS
from carillon.messages import ClusterMap, Member
from carillon.settings import Settings

EPOCH_STRIDE: Final = 1_000_000_000
"""Map versions of one coordinator epoch. A version is `epoch * EPOCH_STRIDE + n`: a coordinator started
later always has the higher versions, even if it never reached Postgres again after taking its epoch, and the
number stays below 2^53 for the first nine million starts."""


# ---------------------------------------------------------------------------------------------------
# Slots


def assign_slots(
    owners: Sequence[str | None], shards: Collection[str], absent: Collection[str] = ()
) -> list[str | None]:
    """The fair assignment of all slots to `shards` that moves the fewest of them.

    Args:
        owners: the present owner of each slot; None, or a name in neither `shards` nor `absent`, means
            ownerless.
        shards: the shards that may own slots. Empty: every slot keeps its owner (there is nobody better).
        absent: shards that keep what they own and get nothing: restarting, and still within their lease.

    Returns:
        The owner of each slot. Counts of `shards` differ by at most one. Deterministic: the same input gives
        the same output whatever the order of `shards`.
    """
    if not shards:
        return list(owners)
    if absent:
        open_slots = [slot for slot, owner in enumerate(owners) if owner is None or owner not in absent]
        result = list(owners)
        for slot, owner in zip(
            open_slots, assign_slots([owners[s] for s in open_slots], shards), strict=True
        ):
            result[slot] = owner
        return result
    held: Counter[str] = Counter(owner for owner in owners if owner is not None and owner in shards)
    # The shards that hold most get the odd slots: any other choice would move more.
    ranked = sorted(shards, key=lambda name: (-held[name], name))
    base, odd = divmod(len(owners), len(ranked))
    target = {name: base + (1 if rank < odd else 0) for rank, name in enumerate(ranked)}

    order = sorted(range(len(owners)), key=_scattered)
    kept: Counter[str] = Counter()
    result: list[str | None] = [None] * len(owners)
    for slot in order:
        owner = owners[slot]
        if owner is not None and owner in target and kept[owner] < target[owner]:
            kept[owner] += 1
            result[slot] = owner
    free = iter([name for name in sorted(ranked) for _ in range(target[name] - kept[name])])
    for slot in order:
        if result[slot] is None:
            result[slot] = next(free)
    return result


def _scattered(slot: int) -> int:
    """Rank of a slot in an order that jumps about: the bits of its number reversed.

    CRC-32 puts ids that differ in their last digits into neighbouring slots; with contiguous halves all of
    user-0 to user-9 would be on one of two shards.
    """
    return int(f"{slot:032b}"[::-1], 2)


def moved_slots(before: Sequence[str | None], after: Sequence[str | None]) -> dict[int, str | None]:
    """The slots whose owner differs, with their new owner."""
    return {slot: new for slot, (old, new) in enumerate(zip(before, after, strict=True)) if old != new}


def ownerless(owners: Sequence[str | None], shards: Collection[str]) -> int:
    """How many slots have no owner among `shards`."""
    return sum(1 for owner in owners if owner is None or owner not in shards)


def map_version(epoch: int, change: int) -> int:
    """The version of change number `change` of coordinator epoch `epoch`."""
    return epoch * EPOCH_STRIDE + change


def build_map(
    version: int, owners: Sequence[str | None], shards: Mapping[str, Member], members: Iterable[Member]
) -> ClusterMap:
    """The map that members get.

    Args:
        version: higher than that of every map before.
        owners: owner of each slot by name; a name that is not in `shards` becomes -1 (no owner).
        shards: every shard that owns or may own slots, by name, with its term.
        members: all other live members.
    """
    names = sorted(shards)
    index = {name: at for at, name in enumerate(names)}
    return ClusterMap(
        version=version,
        owners=[-1 if owner is None else index.get(owner, -1) for owner in owners],
        shards=[shards[name] for name in names],
        members=sorted(members, key=lambda member: (member.kind, member.name)),
    )


def empty_owners() -> list[str | None]:
    """No slot has an owner: the state of a new cluster."""
    return [None] * SLOTS


# ---------------------------------------------------------------------------------------------------
# Leases


@dataclass
class LeaseTable:
    """When each member was last heard of, and whether the listener itself was awake.

    A lease says nothing if the one who reads it was not running: the kernel keeps renewals that arrive
    during a stall, and the tick that follows may be processed before them. So a tick that comes later than
    `tick_s + stall_s` after the one before gives everyone a fresh lease.

    Args:
        timeout_s: a lease ends so long after its last renewal.
        tick_s: how far apart `tick` is meant to be called.
        stall_s: how late a tick may be before it counts as a stall of this process.
    """

    timeout_s: float
    tick_s: float
    stall_s: float
    _renewed: dict[str, float] = field(default_factory=dict[str, float])
    _last_tick: float | None = None

    def grant(self, name: str, now: float) -> None:
        """Start (or renew) the lease of `name`; `now` is monotonic, in seconds."""
        self._renewed[name] = now

    def renew(self, name: str, now: float) -> bool:
        """Renew a lease; False if `name` has none (it was dropped and has to join again)."""
        if name not in self._renewed:
            return False
        self._renewed[name] = now
        return True

    def drop(self, name: str) -> None:
        """Forget `name`."""
        self._renewed.pop(name, None)

    def age_s(self, name: str, now: float) -> float:
        """Seconds since the last renewal; infinite without a lease."""
        renewed = self._renewed.get(name)
        return float("inf") if renewed is None else now - renewed

    def is_lapsed(self, name: str, now: float) -> bool:
        """True if `name` has no lease or did not renew it within `timeout_s`."""
        return self.age_s(name, now) > self.timeout_s

    def tick(self, now: float) -> TickResult:
        """Note that the coordinator is awake, and say whose lease is over.

        If this tick is late, or if all leases (of at least two members) are over at once, the fault is ours
        or the whole machine's: everyone gets a fresh lease and nobody is lapsed.
        """
        last, self._last_tick = self._last_tick, now
        late_s = 0.0 if last is None else now - last - self.tick_s
        stalled = late_s > self.stall_s
        lapsed = {name for name, renewed in self._renewed.items() if now - renewed > self.timeout_s}
        together = len(lapsed) > 1 and len(lapsed) == len(self._renewed)
        if stalled or together:
            for name in self._renewed:
                self._renewed[name] = now
            return TickResult(stalled_s=max(0.0, late_s) if stalled else 0.0, all_together=together)
        return TickResult(lapsed=frozenset(lapsed))


@dataclass(frozen=True)
class TickResult:
    """What one tick of the lease table found."""

    lapsed: frozenset[str] = frozenset()
    """Members whose lease is over."""
    stalled_s: float = 0.0
    """How late the tick came, if that was a stall; else 0."""
    all_together: bool = False
    """True if all leases were over at once and were renewed for that."""


def node_suspects(lapsed: Collection[str], members: Iterable[tuple[str, str, bool]]) -> frozenset[str]:
    """All members of the nodes that are as good as gone, so that their slots move once and not twice.

    A node is that if one of its members is lapsed and none of them has an open link. A killed process alone
    never makes it one: its neighbours' links are open.

    Args:
        lapsed: members whose lease is over.
        members: (name, node, link is open) of every member.
    """
    nodes: dict[str, list[tuple[str, bool]]] = {}
    for name, node, is_open in members:
        nodes.setdefault(node, []).append((name, is_open))
    gone: set[str] = set()
    for present in nodes.values():
        if any(name in lapsed for name, _ in present) and not any(is_open for _, is_open in present):
            gone.update(name for name, _ in present)
    return frozenset(gone)


@dataclass(frozen=True)
class Losses:
    """Which members are lost."""

    shards: frozenset[str] = frozenset()
    """Shards to be dropped once their slots have moved."""
    others: frozenset[str] = frozenset()
    """Members without slots: dropped at once."""


def decide_losses(suspects: Collection[str], shards: Collection[str], live_shards: Collection[str]) -> Losses:
    """Turn suspects (lapsed leases, members of dead nodes) into losses.

    A shard is lost only if another one lives that can take its slots: without one, dropping it would only
    turn "slow" into "ownerless". That Postgres answers is the other half of the rule; the move itself proves
    it, and a move that fails changes nothing.

    Args:
        suspects: names of members that are lapsed or gone.
        shards: names of all shards of the map.
        live_shards: shards that have joined and whose lease is good; suspects among them do not count.
    """
    alive = set(live_shards) - set(suspects)
    others = frozenset(name for name in suspects if name not in shards)
    lost = frozenset(name for name in suspects if name in shards) if alive else frozenset[str]()
    return Losses(shards=lost, others=others)


@dataclass
class RebalanceTimer:
    """Waits after joins, so that several joins move slots once.

    Each join starts the wait again, but no longer than `MOST_WAITS` of them after the first.
    """

    delay_s: float
    MOST_WAITS: Final = 5
    _first: float | None = None
    _due: float = 0.0

    def joined(self, now: float) -> None:
        """A shard joined at `now` (monotonic seconds)."""
        if self._first is None:
            self._first = now
        self._due = min(now + self.delay_s, self._first + self.MOST_WAITS * self.delay_s)

    def is_due(self, now: float) -> bool:
        """True once the wait after the last join is over."""
        return self._first is not None and now >= self._due

    def done(self) -> None:
        """The rebalance ran."""
        self._first = None


# ---------------------------------------------------------------------------------------------------
# Which actors should exist


@dataclass(frozen=True)
class NodeInfo:
    """One live node of the cluster."""

    node: str
    """Ray node id, hex."""
    host: str = ""
    is_head: bool = False


@dataclass(frozen=True, order=True)
class ActorSpec:
    """One actor that should exist."""

    node: str
    kind: str
    """router | shard | gateway | pool."""
    index: int = 0
    provider: str = ""
    """Of a pool."""


def push_providers(settings: Settings) -> tuple[str, ...]:
    """The providers with credentials: each gets a pool. Without any, push rows wait in the outbox."""
    push = settings.push
    configured = {"fcm": bool(push.fcm_credentials), "apns": bool(push.apns_key_file)}
    return tuple(name for name, present in configured.items() if present)


def wanted_actors(settings: Settings, nodes: Iterable[NodeInfo]) -> list[ActorSpec]:
    """The actors that should exist on `nodes`, in the order in which to start them.

    Per node: one router, `cluster.shards_per_node` shards, one gateway. One pool per configured provider on
    the head node: a pool grows by senders, and its provider's rate limit is one for the whole cluster.
    Without a head among the nodes the least node id has them.
    """
    ordered = sorted(nodes, key=lambda info: (not info.is_head, info.node))
    specs: list[ActorSpec] = []
    for info in ordered:
        specs += [ActorSpec(info.node, "shard", index) for index in range(settings.cluster.shards_per_node)]
        specs.append(ActorSpec(info.node, "router"))
        specs.append(ActorSpec(info.node, "gateway"))
    if ordered:
        specs += [ActorSpec(ordered[0].node, "pool", 0, provider) for provider in push_providers(settings)]
    return specs


def add_totals(base: Mapping[str, float], more: Mapping[str, float]) -> dict[str, float]:
    """Sum of two sets of counters."""
    total = dict(base)
    for name, value in more.items():
        total[name] = total.get(name, 0.0) + value
    return total


def add_histograms(
    base: Mapping[str, list[float]], more: Mapping[str, list[float]]
) -> dict[str, list[float]]:
    """Sum of two sets of histograms, bucket by bucket. A change of the number of buckets keeps the newer."""
    total = {name: list(values) for name, values in base.items()}
    for name, values in more.items():
        known = total.get(name)
        if known is None or len(known) != len(values):
            total[name] = list(values)
        else:
            total[name] = [a + b for a, b in zip(known, values, strict=True)]
    return total
