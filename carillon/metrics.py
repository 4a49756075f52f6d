"""Numbers that members keep about themselves, and their text form for Prometheus.

A member counts into a `Stats`; its lease renewal carries the snapshot to the coordinator
(`messages.Renew`), and the ingress renders everybody's with `render_prometheus`. Names may end in labels:
`pushes_sent{provider="fcm"}`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Final

from carillon.messages import StatsReply

BUCKETS_MS: Final[tuple[float, ...]] = (
    0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 50.0, 75.0, 100.0, 150.0, 200.0, 300.0,
    500.0, 750.0, 1000.0, 2000.0, 5000.0, 10_000.0, 30_000.0, float("inf"),
)  # fmt: skip
"""Upper bounds (inclusive) of the histogram buckets in ms; the last one takes everything else. They are
wire format between members of one version: a change needs all members restarted."""

HELP: Final[dict[str, str]] = {
    "events_accepted": "Events committed and answered.",
    "events_delivered": "Events handed to a live session.",
    "events_acknowledged": "Events acknowledged by a device.",
    "events_rerouted": "Events sent again because their slot had moved or its shard was lost.",
    "events_limited": "Events refused (429), or of an import held up, by a rate limit, by whose it is.",
    "events_refused": "Events answered busy or unavailable by a router.",
    "pushes_sent": "Pushes accepted by a provider.",
    "pushes_failed": "Pushes that a provider refused or did not answer.",
    "pushes_left": "Push jobs left to the outbox because no pool had room.",
    "pushes_handed_back": "Claimed pushes given back to the outbox untried.",
    "pushes_fell_back": "Outbox rows made because the channel before ended without success.",
    "feed_reads": "Pages of feeds, by where they came from.",
    "count_reads": "Unread counts, by where they came from.",
    "feed_stale": "Cached pages that were no longer true and were read anew.",
    "broadcasts_running": "Broadcasts that run, as a shard sees them.",
    "broadcast_users": "Users a broadcast was stored for.",
    "broadcast_failures": "Users a broadcast could not be stored for.",
    "broadcast_fenced": "Chunks of broadcasts that a shard could not write because its term was over.",
    "broadcast_rest_s": "Time that broadcasts rested for single events.",
    "connections": "Open client connections.",
    "sessions": "Session actors in memory.",
    "outbox_due": "Outbox rows whose time has come.",
    "pushes_kept": "Pushes that wait for an acknowledgement and are no outbox rows yet.",
    "append_queue": "Events waiting for a group commit.",
    "pool_queue": "Jobs waiting in push pools.",
    "breaker_changes": "Openings and closings of circuit breakers, by provider and app.",
    "push_breaker": "Circuit breaker of an app at a provider: 0 closed, 1 half open, 2 open.",
    "push_paused": "1 while an app waits because its provider asked for it (Retry-After).",
    "push_concurrency": "Requests that an app may have in flight at its provider now.",
    "push_in_flight": "Requests of an app in flight at its provider.",
    "router_outstanding": "Events a router sent to shards and has no outcome of yet.",
    "ingress_request_ms": "Time from request to answer at the ingress.",
    "append_ms": "Time of a group commit.",
    "broadcast_chunk_ms": "Time of one page of a broadcast.",
    "deliver_ms": "Time from an event's creation to its hand-over to gateways.",
    "push_ms": "Time of one request to a push provider.",
}
"""What the names used across the system mean."""


class Stats:
    """Counters, gauges and histograms of one member; cheap enough for the hot path.

    Not thread-safe: one event loop owns it.
    """

    __slots__ = ("counters", "gauges", "histograms")

    def __init__(self) -> None:
        self.counters: defaultdict[str, float] = defaultdict(float)
        self.gauges: dict[str, float] = {}
        self.histograms: dict[str, list[float]] = {}

    def count(self, name: str, n: float = 1) -> None:
        """Add `n` to a counter."""
        self.counters[name] += n

    def gauge(self, name: str, value: float) -> None:
        """Set a gauge."""
        self.gauges[name] = value

    def observe_ms(self, name: str, ms: float, n: int = 1) -> None:
        """Put a duration in milliseconds into a histogram, `n` times (a batch that took `ms`)."""
        row = self.histograms.get(name)
        if row is None:
            row = self.histograms[name] = [0.0] * (len(BUCKETS_MS) + 1)
        row[bisect_left(BUCKETS_MS, ms)] += n
        row[-1] += ms * n

    def snapshot(self) -> tuple[dict[str, float], dict[str, float], dict[str, list[float]]]:
        """Copies of (counters, gauges, histograms), as `messages.Renew` carries them.

        A histogram is its counts per bucket of `BUCKETS_MS` followed by the sum in ms.
        """
        histograms = {name: list(row) for name, row in self.histograms.items()}
        return dict(self.counters), dict(self.gauges), histograms


def merge_histograms(rows: Sequence[Sequence[float]]) -> list[float]:
    """Add histograms element by element; rows of another length (another version's) are left out."""
    total = [0.0] * (len(BUCKETS_MS) + 1)
    for row in rows:
        if len(row) == len(total):
            for index, value in enumerate(row):
                total[index] += value
    return total


def quantile_ms(row: Sequence[float], q: float) -> float:
    """Estimate a quantile of a histogram, in ms.

    Args:
        row: counts per bucket, then the sum, as `Stats.snapshot` gives it.
        q: 0..1.

    Returns:
        Linear interpolation within the bucket; the last finite bound if it falls into the open bucket;
        0.0 for an empty histogram.
    """
    counts = row[: len(BUCKETS_MS)]
    total = sum(counts)
    if total <= 0:
        return 0.0
    wanted = min(max(q, 0.0), 1.0) * total
    seen = 0.0
    for index, count in enumerate(counts):
        if count > 0 and seen + count >= wanted:
            low = BUCKETS_MS[index - 1] if index else 0.0
            high = BUCKETS_MS[index]
            if high == float("inf"):
                return low
            return low + (high - low) * (wanted - seen) / count
        seen += count
    return BUCKETS_MS[-2]


def split_name(name: str) -> tuple[str, str]:
    """Split `pushes_sent{provider="fcm"}` into ("pushes_sent", 'provider="fcm"')."""
    base, brace, rest = name.partition("{")
    return base, rest.rstrip("}") if brace else ""


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(value)


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


class _Families:
    """Samples grouped by metric, so that each gets one HELP and one TYPE line."""

    def __init__(self) -> None:
        self._rows: dict[str, tuple[str, str, list[str]]] = {}

    def rows(self, metric: str, kind: str, doc: str) -> list[str]:
        return self._rows.setdefault(metric, (kind, doc, []))[2]

    def text(self) -> str:
        lines: list[str] = []
        for metric, (kind, doc, rows) in sorted(self._rows.items()):
            if doc:
                lines.append(f"# HELP {metric} {doc}")
            lines.append(f"# TYPE {metric} {kind}")
            lines += rows
        return "\n".join(lines) + "\n"


def render_prometheus(reply: StatsReply, own: Mapping[str, float] | None = None) -> str:
    """The Prometheus text format (version 0.0.4) of the whole cluster.

    Counters, gauges and histograms are summed over the members of one kind and labelled with it, so that
    the number of series does not grow with the cluster; what differs per member is its lease age.
    Durations become seconds, Prometheus' base unit: `append_ms` is `carillon_append_seconds`.

    Args:
        reply: the coordinator's answer to `StatsQuery`.
        own: further gauges of the caller, by name.
    """
    families = _Families()
    counters: defaultdict[tuple[str, str], float] = defaultdict(float)
    gauges: defaultdict[tuple[str, str], float] = defaultdict(float)
    histograms: defaultdict[tuple[str, str], list[Sequence[float]]] = defaultdict(list)
    up = families.rows("carillon_member_up", "gauge", "1 for each live member.")
    age = families.rows("carillon_member_lease_age_seconds", "gauge", "Time since the last renewal.")
    for stats in reply.members:
        member = stats.member
        who = f'kind="{_escape(member.kind)}",member="{_escape(member.name)}",node="{_escape(member.node)}"'
        up.append(f"carillon_member_up{{{who}}} 1")
        age.append(f"carillon_member_lease_age_seconds{{{who}}} {stats.age_s:.3f}")
        for name, value in stats.counters.items():
            counters[name, member.kind] += value
        for name, value in stats.gauges.items():
            gauges[name, member.kind] += value
        for name, row in stats.histograms.items():
            histograms[name, member.kind].append(row)
    for (name, kind), value in counters.items():
        base, labels = split_name(name)
        metric = f"carillon_{base}_total"
        rows = families.rows(metric, "counter", HELP.get(base, ""))
        rows.append(f"{metric}{{{_labels(kind, labels)}}} {_number(value)}")
    for (name, kind), value in gauges.items():
        base, labels = split_name(name)
        metric = f"carillon_{base}"
        rows = families.rows(metric, "gauge", HELP.get(base, ""))
        rows.append(f"{metric}{{{_labels(kind, labels)}}} {_number(value)}")
    for (name, kind), parts in histograms.items():
        base, labels = split_name(name)
        metric = f"carillon_{base.removesuffix('_ms')}_seconds"
        rows = families.rows(metric, "histogram", HELP.get(base, ""))
        total = merge_histograms(parts)
        tags = _labels(kind, labels)
        seen = 0.0
        for bound, count in zip(BUCKETS_MS, total, strict=False):
            seen += count
            le = "+Inf" if bound == float("inf") else repr(bound / 1000)
            rows.append(f'{metric}_bucket{{{tags},le="{le}"}} {_number(seen)}')
        rows.append(f"{metric}_sum{{{tags}}} {_number(total[-1] / 1000)}")
        rows.append(f"{metric}_count{{{tags}}} {_number(seen)}")
    slots = families.rows("carillon_slots", "gauge", 'Slots per shard; shard="" has no owner.')
    slots += [f'carillon_slots{{shard="{_escape(shard)}"}} {count}' for shard, count in reply.slots.items()]
    families.rows("carillon_map_version", "gauge", "Version of the cluster map.").append(
        f"carillon_map_version {reply.version}"
    )
    for name, value in (own or {}).items():
        base, labels = split_name(name)
        metric = f"carillon_{base}"
        tags = f"{{{labels}}}" if labels else ""
        families.rows(metric, "gauge", HELP.get(base, "")).append(f"{metric}{tags} {_number(value)}")
    return families.text()


def _labels(kind: str, labels: str) -> str:
    return f'kind="{_escape(kind)}",{labels}' if labels else f'kind="{_escape(kind)}"'
