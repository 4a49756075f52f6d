"""One run: start the system, load it, break it again and again, let it heal, write down what is left."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg

from carillon.kept_push import history as kept_history
from tests.chaos.devices import Device
from tests.chaos.faults import FaultKind, Injected, go_together
from tests.chaos.history import History
from tests.chaos.load import Load
from tests.chaos.plant import Plant
from tests.chaos.population import Person, people
from tests.chaos.stream_devices import StreamDevice

SHORT = {
    "CARILLON_SHARD_ACK_WINDOW_S": "1.5",
    "CARILLON_SHARD_GRACE_S": "1.0",
    "CARILLON_SHARD_HOLD_S": "2",
    "CARILLON_SHARD_WHEN_AWAY_DELAY_S": "3",
    "CARILLON_SHARD_SWEEP_S": "0.5",
    "CARILLON_SHARD_DELIVERY_LEASE_S": "6",
    "CARILLON_GATEWAY_HEARTBEAT_S": "3",
    "CARILLON_GATEWAY_PONG_TIMEOUT_S": "2",
    "CARILLON_INGRESS_STREAM_LIFE_S": "10",
    "CARILLON_PUSH_TIMEOUT_S": "2",
    "CARILLON_PUSH_BACKOFF_S": "0.3",
    "CARILLON_PUSH_BREAKER_OPEN_S": "0.5",
}
"""Durations of a short run; a long one has the defaults."""
KEPT = "n.kept is not null and not exists (select from deliveries d where d.notification_id = n.id)"
"""Of a notification n: its push never became a row of the outbox."""

RECOVERY_S = 90.0
"""Longest wait for events to flow again after a fault was healed."""
SETTLE_S = 240.0
"""Longest wait at the end for the outbox to empty."""


@dataclass(frozen=True)
class Options:
    """What a run is told."""

    seed: int
    duration_s: float
    faults: list[FaultKind]
    rate: float
    folder: Path
    short: bool = False
    calm_s: tuple[float, float] = (1.0, 4.0)
    pairs: float = 0.0
    """Share of faults that come two at once."""
    count: int = 0
    """Stop after so many faults; 0: only the time counts."""


class Run:
    """See the module.

    Args:
        options: what to do.
        say: progress, one line at a time.
        data: folder for the system's data.
    """

    def __init__(self, options: Options, data: Path, say: Callable[[str], None]) -> None:
        self.options = options
        self.say = say
        options.folder.mkdir(parents=True, exist_ok=True)
        self.history = History(options.folder / "history.jsonl")
        rng = random.Random(options.seed)
        self.persons: list[Person] = people(rng)
        # One generator per part: what one draws must not depend on how fast another is.
        self.schedule = random.Random(rng.randrange(1 << 62))
        self.plant = Plant(
            data, self.history, random.Random(rng.randrange(1 << 62)), SHORT if options.short else {}
        )
        self.load = Load(
            self.plant, self.history, self.persons, random.Random(rng.randrange(1 << 62)), options.rate
        )
        gateway, shard, push = (getattr(self.plant.settings, name) for name in ("gateway", "shard", "push"))
        silence_s = gateway.heartbeat_s + gateway.pong_timeout_s
        self.devices = [
            (StreamDevice if person.habit.streams else Device)(
                self.plant, self.history, person.user, name, person.habit,
                random.Random(rng.randrange(1 << 62)), silence_s,
            )
            for person in self.persons
            for name in person.devices
        ]  # fmt: skip
        backoffs_s = sum(push.backoff_s * 2**index for index in range(push.max_attempts))
        wait_s = max(shard.ack_window_s, shard.when_away_delay_s) + shard.grace_s + 3 * shard.sweep_s
        self.bounds = {
            "push_s": wait_s + shard.delivery_lease_s + push.timeout_s + backoffs_s + 5.0,
            # A socket that is gone without a word is found by a ping; then the grace period.
            "presence_s": silence_s + shard.grace_s + 3.0,
        }  # fmt: skip

    async def run(self) -> None:
        """Everything, from start to stop."""
        history, options = self.history, self.options
        history.add(
            "run", seed=options.seed, wall0=history.wall0, bounds=self.bounds, rate=options.rate,
            short=options.short, duration=options.duration_s, faults=[kind.name for kind in options.faults],
            targets={person.user: person.targets for person in self.persons}, **self.plant.facts(),
        )  # fmt: skip
        try:
            self.say("starting the system")
            await self.plant.start()
            self.say(f"ready after {history.now():.0f} s; the history is in {options.folder}")
            await self.load.register(self.persons)
            devices = [asyncio.ensure_future(device.run()) for device in self.devices]
            load = asyncio.ensure_future(self.load.run())
            flusher = asyncio.ensure_future(self._flush())
            try:
                if not await self._flowing(history.now(), RECOVERY_S):
                    raise RuntimeError("events do not flow, and nothing was broken yet")
                await self._break_things([load, *devices])
                await self._finish(load)
            finally:
                for task in (load, flusher, *devices):
                    task.cancel()
                ended = await asyncio.gather(load, flusher, *devices, return_exceptions=True)
            for outcome in ended:
                if isinstance(outcome, Exception):
                    raise outcome
        finally:
            self.say("stopping the system")
            history.flush()
            await self.plant.stop()
            history.close()

    async def _flush(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            self.history.flush()

    # -- faults -------------------------------------------------------------------------------------------

    async def _break_things(self, watched: list[asyncio.Future[None]]) -> None:
        """Faults in an order of the seed, some two at once: until the time is over and each was there."""
        options, schedule = self.options, self.schedule
        deadline = time.monotonic() + options.duration_s
        deck: list[FaultKind] = []
        number, decks = 0, 0
        while options.faults:
            if not deck:
                if decks and time.monotonic() >= deadline:
                    return
                deck, decks = list(options.faults), decks + 1
                schedule.shuffle(deck)
            if decks > 1 and time.monotonic() >= deadline:
                return
            kinds = [deck.pop()]
            if schedule.random() < options.pairs:
                other = next((kind for kind in reversed(deck) if go_together(kinds[0], kind)), None)
                if other is not None:
                    deck.remove(other)
                    kinds.append(other)
            await self._faults(number + 1, kinds)
            number += len(kinds)
            for task in watched:
                if task.done() and not task.cancelled() and task.exception() is not None:
                    raise RuntimeError("the load ended") from task.exception()
            if options.count and number >= options.count:
                return
            await asyncio.sleep(schedule.uniform(*options.calm_s))
        await asyncio.sleep(options.duration_s)

    async def _faults(self, number: int, kinds: list[FaultKind]) -> None:
        """Inject, hold and heal, one fault or two at once; then wait until everything flows again."""
        history = self.history
        holds_s = [self._hold_s(kind) for kind in kinds]
        if kinds[0].name == "quiet":  # no fault, but what the others are measured against
            self.say(f"{history.now():7.1f} s quiet")
            await asyncio.sleep(holds_s[0] + self.bounds["presence_s"])
            return
        active: list[tuple[int, FaultKind, Injected, float]] = []
        for kind, hold_s in zip(kinds, holds_s, strict=True):
            began = history.now()
            injected = await kind.inject(self.plant)
            if injected is None:
                self.say(f"{kind.name}: nothing there to break")
                continue
            here = number + len(active)
            detail = f"{injected.detail}; held {hold_s:.1f} s"
            history.add("fault", number=here, name=kind.name, detail=detail, t=began)
            self.say(f"{began:7.1f} s {kind.name} ({detail})")
            active.append((here, kind, injected, hold_s))
        if not active:
            return

        async def heal(here: int, kind: FaultKind, injected: Injected, hold_s: float) -> None:
            await asyncio.sleep(hold_s)
            await injected.heal()
            history.add("healed", number=here, name=kind.name)

        await asyncio.gather(*(heal(*each) for each in active))
        healed = history.now()
        flowing = await self._flowing(healed, RECOVERY_S)
        flowed = history.now()
        whole = flowing and all([await injected.whole() for _, _, injected, _ in active])
        for here, kind, _, _ in active:
            if flowing and whole:
                history.add("recovered", number=here, name=kind.name, flowing=flowed)
        self.say(
            (f"          flowing {flowed - healed:.1f} s after healing" if flowing else "DOES NOT FLOW AGAIN")
            + ("" if whole else "; WHAT WAS KILLED IS NOT BACK")
        )

    def _hold_s(self, kind: FaultKind) -> float:
        low, high = kind.short_s if self.options.short else kind.long_s
        if low > 0 and high > 5 * low:  # short holds are as interesting as long ones
            return low * (high / low) ** self.schedule.random()
        return self.schedule.uniform(low, high)

    async def _flowing(self, since: float, timeout_s: float) -> bool:
        """Wait until every steady device got an event first sent after `since`, and a push of one arrived
        at each provider."""
        steady = [d for d in self.devices if not d.habit.leaves and d.stopped is None]
        pending = {device.name for device in steady}
        providers = {"fcm", "apns"}
        looked = len(self.history.records)
        deadline = time.monotonic() + timeout_s
        pushed: list[tuple[str, str]] = []
        while time.monotonic() < deadline:
            for record in self.history.records[looked:]:
                if record["op"] == "push":
                    pushed.append((record["provider"], record["id"]))
            looked = len(self.history.records)
            for device in steady:
                if device.name in pending and any(
                    at > since and self.load.began_at.get(f"{label}|{device.user}", 0.0) > since
                    for label, at in reversed(device.labels.items())
                    if at > since
                ):
                    pending.discard(device.name)
            fresh = {self.load.ids[label] for label, at in self.load.accepted_at.items() if at > since}
            fresh &= {self.load.ids[label] for label in self.load.ids if self.load.began_at[label] > since}
            providers -= {provider for provider, one in pushed if one in fresh}
            if not pending and not providers:
                return True
            await asyncio.sleep(0.1)
        self.say(f"still waiting for {sorted(pending)} {sorted(providers)}")
        return False

    # -- the end --------------------------------------------------------------------------------------------

    async def _finish(self, load: asyncio.Future[None]) -> None:
        self.say("healed; the load ends, everything settles")
        self.load.stop(30.0)
        for device in self.devices:
            device.settling = True
        await asyncio.wait({load}, timeout=90)
        settled_at = time.monotonic()
        problem = await self._settle()
        self.say(
            f"settled after {time.monotonic() - settled_at:.1f} s"
            if problem is None
            else f"not settled: {problem}"
        )
        await self._repeat_until_ok(lambda: self.load.ask_presence(final=True))
        # Presence has to be right after quiet: wait for it, then ask.
        await asyncio.sleep(self.bounds["presence_s"])
        await self._repeat_until_ok(lambda: self.load.ask_presence(final=True))
        for person in self.persons:
            await self._repeat_until_ok(lambda user=person.user: self.load.read_feed(user, whole=True))
        for device in self.devices:
            self.history.add(
                "device",
                device=device.name,
                user=device.user,
                connected=device.connected,
                stopped=device.stopped,
            )
        await self._snapshot()

    async def _repeat_until_ok(self, work: Callable[[], Any], timeout_s: float = 30.0) -> None:
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                await work()
                return
            except (OSError, TimeoutError):
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.2)

    async def _settle(self) -> str | None:
        """Wait until nothing is under way; the sentence that says what still is after SETTLE_S."""
        deadline = time.monotonic() + SETTLE_S
        quiet_since: float | None = None
        while True:
            problem = await self._unfinished()
            if problem is None:
                # A reconnect or an acknowledgement may still be on its way: quiet must last.
                quiet_since = quiet_since or time.monotonic()
                if time.monotonic() - quiet_since > 1.0:
                    return None
            else:
                quiet_since = None
            if time.monotonic() > deadline:
                return problem
            await asyncio.sleep(0.25)

    async def _unfinished(self) -> str | None:
        connection = await asyncpg.connect(self.plant.dsn)
        try:
            pending = await connection.fetchval(
                "select count(*) from deliveries where state in ('planned', 'sending', 'unknown', 'failed')"
            )
            if pending:
                return f"{pending} rows of the outbox are not done"
            kept = await connection.fetchval(
                f"select count(*) from notifications n where {KEPT} and n.kept ~ '^\\['"
            )
            if kept:
                return f"{kept} pushes are kept for an acknowledgement"
            heads = dict(
                await connection.fetch("select s.user_id, n.id::text from streams s"
                " join notifications n on n.stream_id = s.stream_id and n.seq = s.seq")
            )  # fmt: skip
        finally:
            await connection.close()
        for device in self.devices:
            if device.stopped is not None or device.gone:
                continue
            if not device.connected:
                return f"{device.name} is not connected"
            head = heads.get(device.user)
            if head is not None and head not in device.received:
                return f"{device.name} lacks the newest notification"
        return None

    async def _snapshot(self) -> None:
        """What PostgreSQL holds."""
        history = self.history
        connection = await asyncpg.connect(self.plant.dsn)
        try:
            for row in await connection.fetch("select user_id, epoch, seq, rev, unread from streams"):
                history.add(
                    "stream", user=row["user_id"], epoch=row["epoch"], seq=row["seq"], rev=row["rev"],
                    unread=row["unread"],
                )  # fmt: skip
            for row in await connection.fetch(
                "select n.id::text, s.user_id, n.seq, n.rev, n.read_at is not null as read,"
                " extract(epoch from n.created_at)::float8 as created,"
                " extract(epoch from n.delivered_at)::float8 as delivered,"
                " ('{' || n.content || '}')::jsonb ->> 'title' as title"
                " from notifications n join streams s using (stream_id) order by n.stream_id, n.seq"
            ):
                delivered = row["delivered"]
                history.add(
                    "row", id=row["id"], user=row["user_id"], seq=row["seq"], rev=row["rev"],
                    read=row["read"],
                    label=f"{row['title']}|{row['user_id']}", t=history.at_wall(row["created"]),
                    delivered=None if delivered is None else history.at_wall(delivered),
                )  # fmt: skip
            for row in await connection.fetch(
                "select id, notification_id::text, channel, state, attempts, reason,"
                " extract(epoch from due_at)::float8 as due,"
                " extract(epoch from updated_at)::float8 as updated"
                " from deliveries order by id"
            ):
                history.add(
                    "delivery", delivery=row["id"], notification=row["notification_id"],
                    channel=row["channel"],
                    state=row["state"], attempts=row["attempts"], reason=row["reason"],
                    due=history.at_wall(row["due"]), t=history.at_wall(row["updated"]),
                )  # fmt: skip
            for row in await connection.fetch(
                "select n.id::text, n.kept, extract(epoch from n.created_at)::float8 as created,"
                f" extract(epoch from n.delivered_at)::float8 as delivered from notifications n where {KEPT}"
            ):
                delivered = None if row["delivered"] is None else round(row["delivered"] * 1000)
                for told in kept_history(row["kept"], round(row["created"] * 1000), delivered):
                    history.add(
                        "delivery", delivery=0, notification=row["id"], channel=told["channel"],
                        state=told["state"], attempts=0, reason=told["reason"],
                        due=history.at_wall(told["due_ms"] / 1000),
                        t=history.at_wall(told["updated_ms"] / 1000),
                    )  # fmt: skip
            for row in await connection.fetch(
                "select delivery_id, attempt, device_id, provider, outcome, status, error,"
                " extract(epoch from started_at)::float8 as started from delivery_attempts"
            ):
                history.add(
                    "attempt", delivery=row["delivery_id"], attempt=row["attempt"], device=row["device_id"],
                    provider=row["provider"], outcome=row["outcome"], status=row["status"],
                    error=row["error"],
                    t=history.at_wall(row["started"]),
                )  # fmt: skip
        finally:
            await connection.close()
        (self.options.folder / "run.json").write_text(
            json.dumps(
                {"seed": self.options.seed, "offered": self.load.offered, "answered": self.load.answered,
                 "unanswered": self.load.unanswered}
            )
        )  # fmt: skip
