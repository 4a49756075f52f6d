"""The faults, by name: what each does to the system, and how it is undone.

A fault is injected, held for some seconds, and healed. `hold` says how long by default: (shortest, longest)
of a short run, and of a long one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from carillon.testing.provider_server import Behaviour, Script
from tests.chaos.plant import TITLES, Plant
from tests.chaos.proxy import NetworkFault, Proxy

KINDS = tuple(TITLES)


@dataclass
class Injected:
    """A fault that is under way."""

    detail: str
    heal: Callable[[], Awaitable[None]]
    """Undoes it; returns once that is done (a restarted server answers)."""
    whole: Callable[[], Awaitable[bool]] = field(default_factory=lambda: _at_once)
    """After healing: waits until what was killed runs again; False if it does not."""


@dataclass(frozen=True)
class FaultKind:
    """A named fault."""

    name: str
    says: str
    inject: Callable[[Plant], Awaitable[Injected | None]]
    """None: there is nothing to break (no such process at the moment)."""
    short_s: tuple[float, float] = (0.0, 0.0)
    long_s: tuple[float, float] = (0.0, 0.0)


async def _at_once() -> bool:
    return True


async def _quiet(plant: Plant) -> Injected | None:
    return None


async def _nothing() -> None:
    return None


def _kill(kind: str) -> Callable[[Plant], Awaitable[Injected | None]]:
    async def inject(plant: Plant) -> Injected | None:
        victim = plant.victim(kind)
        if victim is None:
            return None
        before = len(plant.actors(kind))
        os.kill(victim.pid, signal.SIGKILL)
        return Injected(
            f"process {victim.pid}", _nothing, lambda: plant.wait_for_actors(kind, before, victim)
        )

    return inject


def _stop(kind: str) -> Callable[[Plant], Awaitable[Injected | None]]:
    async def inject(plant: Plant) -> Injected | None:
        victim = plant.victim(kind)
        if victim is None:
            return None
        before = len(plant.actors(kind))
        os.kill(victim.pid, signal.SIGSTOP)

        async def heal() -> None:
            with contextlib.suppress(ProcessLookupError):  # it was replaced meanwhile
                os.kill(victim.pid, signal.SIGCONT)

        async def whole() -> bool:
            for _ in range(360):
                if len(plant.actors(kind)) >= before:
                    return True
                await asyncio.sleep(0.25)
            return False

        return Injected(f"process {victim.pid}", heal, whole)

    return inject


def _network(
    which: Callable[[Plant], Proxy], fault: NetworkFault, delays_s: tuple[float, ...] = (0.0,)
) -> Callable[[Plant], Awaitable[Injected | None]]:
    async def inject(plant: Plant) -> Injected | None:
        proxy = which(plant)
        delay_s = plant.rng.choice(delays_s)
        met = proxy.inject(fault, delay_s)

        async def heal() -> None:
            proxy.heal()

        detail = f"{met} connections" + (f", {delay_s:g} s" if delay_s else "")
        return Injected(detail, heal)

    return inject


def _front(plant: Plant) -> Proxy:
    return plant.front


def _database(plant: Plant) -> Proxy:
    return plant.database


async def _kill_postgres(plant: Plant) -> Injected | None:
    await plant.kill_postgres()
    return Injected("SIGKILL of the postmaster", plant.postgres.restart_async)


async def _kill_valkey(plant: Plant) -> Injected | None:
    await asyncio.to_thread(plant.valkey.kill)
    return Injected("SIGKILL", plant.valkey.restart_async)


async def _kill_node(plant: Plant) -> Injected | None:
    if not await plant.join_worker():
        plant.kill_worker()
        raise RuntimeError(f"the second node did not join; see {plant.folder}/worker.log")
    # Long enough for slots to move to it and for clients to come to its gateway.
    await asyncio.sleep(5.0)
    return Injected(f"kill -9 of {plant.kill_worker()} processes", _nothing)


async def _power_loss(plant: Plant) -> Injected | None:
    count = await plant.power_loss()
    return Injected(f"SIGKILL of {count} processes", plant.power_on)


def _script(plant: Plant, **members: Any) -> None:
    for provider in plant.providers.values():
        provider.server.script(Script(**members))


async def _providers_recover(plant: Plant) -> None:
    _script(plant, reset=True, shares=[], stall=False)
    # What hangs would hang for ever: these connections are over.
    _script(plant, disconnect=True)


def _provider(detail: str, **members: Any) -> Callable[[Plant], Awaitable[Injected | None]]:
    async def inject(plant: Plant) -> Injected | None:
        _script(plant, seed=plant.rng.randrange(1 << 30), **members)
        return Injected(detail, lambda: _providers_recover(plant))

    return inject


async def _goaway(plant: Plant) -> Injected | None:
    _script(
        plant,
        goaway=True,
        shares=[Behaviour(fault="goaway", share=0.2), Behaviour(fault="refuse", share=0.1)],
    )
    return Injected("GOAWAY now and on a fifth of the answers", lambda: _providers_recover(plant))


def _all() -> dict[str, FaultKind]:
    found = [FaultKind("quiet", "no fault: presence is judged", _quiet, (1.0, 2.0), (3.0, 6.0))]
    for kind in KINDS:
        found.append(FaultKind(f"kill-{kind}", f"kill -9 of a {kind}", _kill(kind)))
    for kind in KINDS:
        found.append(
            FaultKind(
                f"stop-{kind}", f"SIGSTOP of a {kind}, later SIGCONT", _stop(kind), (1.0, 6.0), (2.0, 30.0)
            )
        )
    # Long enough for everything about it to lapse: lease, term, links, Ray's own patience.
    found.append(
        FaultKind("freeze-shard", "SIGSTOP of a shard for a minute", _stop("shard"), (8.0, 8.0), (60.0, 60.0))
    )
    held = ((0.5, 3.0), (2.0, 15.0))
    for name, which, title in (
        ("clients", _front, "clients and gateway"),
        ("postgres", _database, "actors and PostgreSQL"),
    ):
        for fault in NetworkFault:
            if fault is NetworkFault.NONE:
                continue
            long_s = held[1]
            if fault is NetworkFault.HALF_OPEN:
                long_s = (30.0, 40.0) if name == "clients" else (5.0, 20.0)
            found.append(
                FaultKind(
                    f"net-{name}-{fault.value}",
                    f"network between {title}: {fault.value}",
                    _network(which, fault, (0.05, 0.2, 0.5) if fault is NetworkFault.DELAY else (0.0,)),
                    held[0],
                    long_s,
                )
            )
    found += [
        FaultKind(
            "kill-postgres",
            "SIGKILL of PostgreSQL, restart on its data",
            _kill_postgres,
            (0.0, 1.0),
            (0.0, 10.0),
        ),
        FaultKind("kill-valkey", "SIGKILL of Valkey, restart", _kill_valkey, (0.0, 1.0), (0.0, 10.0)),
        FaultKind(
            "provider-500",
            "both providers answer 500 to everything",
            _provider("all", shares=[Behaviour(status=500, share=1.0)]),
            (1.0, 3.0),
            (5.0, 20.0),
        ),
        FaultKind(
            "provider-errors",
            "500, RST_STREAM and dropped connections, each in a tenth of the cases",
            _provider(
                "a tenth each",
                shares=[
                    Behaviour(status=500, share=0.1),
                    Behaviour(fault="reset", share=0.1),
                    Behaviour(fault="disconnect", share=0.1),
                ],
            ),
            (1.0, 3.0),
            (5.0, 20.0),
        ),
        FaultKind(
            "provider-hang",
            "half of the requests are never answered",
            _provider("half", shares=[Behaviour(fault="silent", share=0.5)]),
            (1.0, 3.0),
            (5.0, 20.0),
        ),
        FaultKind(
            "provider-429",
            "429 with Retry-After: 2",
            _provider("all", shares=[Behaviour(status=429, retry_after="2", share=1.0)]),
            (1.0, 3.0),
            (5.0, 20.0),
        ),
        FaultKind("provider-goaway", "GOAWAY and REFUSED_STREAM", _goaway, (1.0, 3.0), (5.0, 20.0)),
        FaultKind("kill-node", "a second Ray node joins, works, and is killed with -9", _kill_node),
        FaultKind(
            "power-loss",
            "kill -9 of everything, PostgreSQL too; start on the same data",
            _power_loss,
        ),
    ]
    return {kind.name: kind for kind in found}


FAULTS = _all()
GROUPS = {
    "kill": [name for name in FAULTS if name.startswith("kill-")],
    "stop": [name for name in FAULTS if name.startswith(("stop-", "freeze-"))],
    "net": [name for name in FAULTS if name.startswith("net-")],
    "stores": ["kill-postgres", "kill-valkey"],
    "provider": [name for name in FAULTS if name.startswith("provider-")],
    "all": list(FAULTS),
}


ALONE = frozenset(("quiet", "power-loss", "kill-node", "freeze-shard"))


def go_together(one: FaultKind, other: FaultKind) -> bool:
    """Whether two faults may be under way at once: of different groups, none that needs all the rest."""
    if {one.name, other.name} & ALONE:
        return False
    part = [kind.name.split("-")[0] + ("-" + kind.name.split("-")[1] if "net" in kind.name else "")
            for kind in (one, other)]  # fmt: skip
    # Two faults of one database tell no more than the worse of them.
    database = [kind.name.startswith("net-postgres") or kind.name == "kill-postgres" for kind in (one, other)]
    return part[0] != part[1] and not all(database)


def chosen(names: str) -> list[FaultKind]:
    """Faults by comma-separated names or groups; "-name" leaves one out. Raises ValueError."""
    found: list[str] = []
    for name in filter(None, (part.strip() for part in names.split(","))):
        out = name.startswith("-")
        plain = name.removeprefix("-")
        if plain not in FAULTS and plain not in GROUPS:
            raise ValueError(f"unknown fault {plain!r}; known: {', '.join([*GROUPS, *FAULTS])}")
        these = GROUPS.get(plain, [plain])
        if out:
            found = [one for one in (found or list(FAULTS)) if one not in these]
        else:
            found += [one for one in these if one not in found]
    return [FAULTS[name] for name in found]
