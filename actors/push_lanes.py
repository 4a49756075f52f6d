"""The jobs of a push pool, by app: a queue and a gate each, so that one app's trouble stays its own."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any, Final

import msgspec

from carillon.clock import Clock
from carillon.messages import LEFT, PushJob, PushResult, PushTarget
from carillon.metrics import Stats
from carillon.provider_gate import ProviderGate
from carillon.settings import PushSettings
from channels.ports import AUTH_ERRORS, PushChannel

_ODD: Final = re.compile(r"[^A-Za-z0-9._:/-]")
_LONGEST_NAME: Final = 100
_OTHERS: Final = "others"
_ACTIVE_S: Final = 60.0
"""An app that had a job within so long counts as one to share with."""
_BREAKER_VALUES: Final = {"closed": 0, "half_open": 1, "open": 2}


class HeldJob:
    """One job in the pool: as many parts as it has apps, nearly always one."""

    __slots__ = ("arrived", "job", "open", "results", "waiting")

    def __init__(self, job: PushJob, arrived: float) -> None:
        self.job = job
        self.arrived = arrived
        self.open = 0
        """Parts that have not ended."""
        self.waiting: list[Lane] = []
        """Lanes in which a part waits."""
        self.results: list[PushResult] = []

    @property
    def key(self) -> tuple[int, int]:
        """(delivery, attempt)."""
        return self.job.delivery, self.job.attempt


class Lane:
    """One app: what waits for it, and what protects it."""

    def __init__(self, name: str, gate: ProviderGate, provider: str, now: float) -> None:
        self.name = name
        self.gate = gate
        self.queue: dict[int, tuple[HeldJob, PushJob]] = {}
        """By delivery, oldest first."""
        self.sending = 0
        """Jobs in flight."""
        self.used_at = now
        labels = f'provider="{provider}",app="{name}"'
        self.gauges = {
            kind: f"{kind}{{{labels}}}"
            for kind in ("push_breaker", "push_paused", "push_concurrency", "push_in_flight")
        }
        self.changes = {to: f'breaker_changes{{{labels},to="{to}"}}' for to in ("opened", "closed")}

    @property
    def held(self) -> int:
        """Jobs of this app."""
        return len(self.queue) + self.sending

    def publish(self, stats: Stats) -> None:
        """Write the gauges."""
        gauges, gate = self.gauges, self.gate
        stats.gauge(gauges["push_breaker"], _BREAKER_VALUES[gate.breaker.state])
        stats.gauge(gauges["push_paused"], float(gate.pause_s() > 0))
        stats.gauge(gauges["push_concurrency"], gate.limit.limit)
        stats.gauge(gauges["push_in_flight"], gate.in_flight)

    def status(self) -> dict[str, Any]:
        """Facts for the command line."""
        gate = self.gate
        return {
            "app": self.name,
            "state": gate.state,
            "queued": len(self.queue),
            "inFlight": gate.in_flight,
            "limit": gate.limit.limit,
            "usualMs": round(gate.limit.usual_s * 1000, 1),
            "waitS": round(max(gate.breaker.wait_s(), gate.pause_s()), 1),
        }


class Lanes:
    """All apps of one provider.

    Names of apps come from devices, so their number is bounded: beyond `push.max_apps` the one that is idle
    for longest makes room, and if none is idle further apps share one lane.

    Args:
        channel: says which app a target belongs to.
        stats: gets a few gauges per app.
    """

    def __init__(
        self, provider: str, channel: PushChannel, settings: PushSettings, clock: Clock, stats: Stats
    ) -> None:
        self._provider = provider
        self._channel = channel
        self._settings = settings
        self._clock = clock
        self._stats = stats
        self._rate = settings.fcm_rate_per_s if provider == "fcm" else settings.apns_rate_per_s
        self._by_app: dict[str, Lane] = {}
        self._active = 0

    def __iter__(self) -> Iterator[Lane]:
        return iter(self._by_app.values())

    @property
    def queued(self) -> int:
        """Parts of jobs that wait."""
        return sum(len(lane.queue) for lane in self)

    @property
    def state(self) -> str:
        """The worst breaker state of all apps."""
        states = {lane.gate.breaker.state for lane in self}
        return next((state for state in ("open", "half_open") if state in states), "closed")

    @property
    def shared(self) -> bool:
        """Whether several apps were active of late."""
        return self._active > 1

    def split(self, job: PushJob) -> list[tuple[Lane, PushJob]]:
        """The parts of a job, one per app of its targets."""
        app_of, targets = self._channel.app_of, job.targets
        if not targets:
            return []
        first = app_of(targets[0])
        if len(targets) == 1 or all(app_of(target) == first for target in targets[1:]):
            return [(self._lane(first), job)]
        by_lane: dict[str, tuple[Lane, list[PushTarget]]] = {}
        for target in targets:
            lane = self._lane(app_of(target))
            by_lane.setdefault(lane.name, (lane, []))[1].append(target)
        return [(lane, msgspec.structs.replace(job, targets=some)) for lane, some in by_lane.values()]

    def fair(self, mine: int, all_: int, limit: int) -> bool:
        """Whether an app that has `mine` of the `all_` places in use may take another.

        With one app active it may take all. With several none takes more than it leaves free, so that there
        is always room for the others (dynamic thresholds: Choudhury and Hahne, 1998, with factor 1).
        """
        if self._active <= 1:
            return all_ < limit
        return mine < limit - all_

    def tick(self) -> None:
        """Write gauges and see which apps are active; called every quarter of a second or so."""
        now = self._clock.monotonic()
        self._active = 0
        for lane in self:
            if lane.held:
                lane.used_at = now
            self._active += now - lane.used_at <= _ACTIVE_S
            lane.publish(self._stats)

    def _lane(self, app: str) -> Lane:
        lane = self._by_app.get(app)
        if lane is not None:
            return lane
        name = _ODD.sub("_", app)[:_LONGEST_NAME] or _OTHERS
        if name != app:
            return self._lane(name)
        if len(self._by_app) >= self._settings.max_apps and not self._make_room():
            shared = self._by_app.get(_OTHERS)
            if shared is not None:
                return shared
            name = _OTHERS
        now = self._clock.monotonic()
        gate = ProviderGate(self._settings, self._rate, AUTH_ERRORS, self._clock)
        lane = self._by_app[name] = Lane(name, gate, self._provider, now)
        self._active += 1
        return lane

    def _make_room(self) -> bool:
        idle = [
            lane
            for lane in self
            if not lane.held
            and not lane.gate.in_flight
            and lane.gate.state == "closed"
            and lane.name != _OTHERS
        ]
        if not idle:
            return False
        lane = min(idle, key=lambda lane: lane.used_at)
        del self._by_app[lane.name]
        for name in lane.gauges.values():
            self._stats.gauges.pop(name, None)
        for name in lane.changes.values():
            self._stats.counters.pop(name, None)
        return True


def not_tried(targets: Iterable[PushTarget], lane: Lane, why: str, now_ms: int) -> list[PushResult]:
    """Results of targets whose app takes no job now, in a job whose other targets are tried."""
    wait_s = max(lane.gate.breaker.wait_s(), lane.gate.pause_s())
    return [PushResult(target.device, LEFT, "", 0, why, wait_s, now_ms) for target in targets]
