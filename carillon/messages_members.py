"""Messages between members and the coordinator."""

from __future__ import annotations

from msgspec import Struct


class Address(Struct, array_like=True, frozen=True):
    """Where a member listens."""

    host: str
    port: int
    unix_path: str = ""
    """Socket path, usable by peers with the same `machine`; empty if there is none."""
    machine: str = ""
    """Identity of the machine (boot id): only peers with the same one can use `unix_path`."""


class Member(Struct, array_like=True, frozen=True):
    """One actor of the cluster."""

    kind: str
    """coordinator | router | shard | gateway | pool | ingress | other."""
    name: str
    """Unique and stable over restarts, e.g. "shard-<node>-0"."""
    node: str
    """Ray node id (hex) the actor runs on."""
    incarnation: str
    """New at each start of the process."""
    address: Address
    public: str = ""
    """What clients dial: a gateway's ws:// URL, an ingress replica's http:// URL; else empty."""
    labels: dict[str, str] = {}
    """A pool's {"provider": "fcm"}."""
    term: int = 0
    """A shard's fencing number, set by the coordinator; 0 for the others."""


class Join(Struct, array_like=True, tag=50):
    """Request, first message of a member on its link to the coordinator. Reply: `ClusterMap`."""

    member: Member


class Renew(Struct, array_like=True, tag=51):
    """One-way, every `cluster.lease_renew_s`: the lease, and the member's statistics."""

    name: str
    incarnation: str
    counters: dict[str, float] = {}
    """Growing since the process started, e.g. "events_accepted"."""
    gauges: dict[str, float] = {}
    histograms: dict[str, list[float]] = {}
    """Per name: counts per bucket of carillon.metrics.BUCKETS_MS, then the sum in ms."""


class ClusterMap(Struct, array_like=True, tag=52):
    """Reply to `Join` and pushed one-way at every change. A higher `version` replaces a lower one."""

    version: int
    owners: list[int]
    """1,024 entries: index into `shards` of each slot's owner, -1 while it has none."""
    shards: list[Member]
    """Every shard that owns or may own slots, with its term."""
    members: list[Member]
    """All other live members."""


class Leave(Struct, array_like=True, tag=53):
    """Request: graceful departure (drain); slots are moved first. Reply: `Done`."""

    name: str
    incarnation: str


class StatsQuery(Struct, array_like=True, tag=54):
    """Request to the coordinator. Reply: `StatsReply`."""


class MemberStats(Struct, array_like=True):
    """Latest statistics of one member, totals carried over its restarts."""

    member: Member
    age_s: float
    counters: dict[str, float]
    gauges: dict[str, float]
    histograms: dict[str, list[float]]


class StatsReply(Struct, array_like=True, tag=55):
    """Reply to `StatsQuery`."""

    version: int
    slots: dict[str, int]
    """Slots per shard name; "" counts the ownerless."""
    members: list[MemberStats]
