"""Every kind of actor is killed with -9 under load, one after the other: nothing acknowledged is lost.

One system as a user starts it (`python -m cluster up`), services that try again under the same idempotency
key, devices that reconnect and resume, and a user whose only device is a phone.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from benchmarks.wire import Door, HttpConnection, http_request
from cluster.processes import ProcessId, alive, command_of, descendants, free_port, read_process
from cluster.ray_env import ROOT
from tests.cluster.kill_load import ONLINE, PHONE, PHONE_TOKEN, TWO_DEVICES, DeviceClient, Load, Phone
from tests.cluster.test_up import related
from tests.support import eventually

START_S = 200.0
"""A start takes 15 s alone on two cores; the machine may be busy with other suites."""
RECOVERY_S = 180.0
"""Longest wait for anything: the slowest, an ingress replica, is back after 8 s on an idle machine."""
SAME_TIME_S = 5.0
"""A push that was on its way when the pool was killed may be received so much later."""
SLOW_PUSH_S = 5.0
DELIVERY_LEASE_S = 15.0
"""Shorter than the default: pushes that no pool took wait for it, and the test with them."""
TITLES = {
    "shard": "ray::ShardActor",
    "gateway": "ray::GatewayActor",
    "router": "ray::RouterActor",
    "pool": "ray::PoolActor",
    "coordinator": "ray::CoordinatorActor",
    "ingress": "ray::ServeReplica:carillon:ingress",
}
"""Process titles by kind of actor."""


@dataclass
class Running:
    """A running system."""

    process: subprocess.Popen[bytes]
    folder: Path
    dev: dict[str, Any]

    def processes(self, kind: str) -> list[ProcessId]:
        """Living actors of a kind, looked for among the descendants of `up` only."""
        found = [info.id for info in descendants(self.process.pid)]
        return [process for process in found if command_of(process.pid).startswith(TITLES[kind])]

    async def status(self) -> dict[str, Any]:
        """What `python -m cluster status --json` says; {} if it cannot tell."""
        asked = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "cluster", "status", "--json", "--data-dir", str(self.folder)),
            cwd=ROOT,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        out, _ = await asyncio.wait_for(asked.communicate(), RECOVERY_S)
        return json.loads(out) if asked.returncode == 0 else {}


@pytest.fixture(scope="module")
def running(service_folder: Path) -> Iterator[Running]:
    """A system with two shards on free ports; afterwards no process of it is left."""
    folder = service_folder / "kill"
    folder.mkdir()
    out = folder / "out"
    with out.open("ab") as said:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "cluster", "up", "--data-dir", str(folder), "--shards", "2"),
                *("--http-port", str(free_port()), "--direct-port", str(free_port())),
                *("--ws-port", str(free_port())),
            ],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "CARILLON_SHARD_DELIVERY_LEASE_S": str(DELIVERY_LEASE_S)},
        )
    try:
        deadline = time.monotonic() + START_S
        while not (folder / "dev.json").exists():
            assert process.poll() is None, out.read_text()
            assert time.monotonic() < deadline, f"not ready within {START_S} s: {out.read_text()}"
            time.sleep(0.05)
        yield Running(process, folder, json.loads((folder / "dev.json").read_text()))
    finally:
        for _ in range(2):  # a second signal ends by force
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(60)
    assert related(folder) == {}, "processes are left after the system was stopped"


# ---------------------------------------------------------------------------------------------------
# The test


@dataclass
class Kill:
    """One kill and what it cost."""

    actor: str
    kind: str
    at: float
    wall: float
    flowing_s: float = 0.0
    """Until every device received an event first sent after the kill, and the phone a push of one."""
    over_s: float = 0.0
    """Until there is another process, too."""


def longest_gap(times: list[float], began: float, ended: float) -> float:
    """Longest pause between neighbours that ended in [began, ended]."""
    return max((b - a for a, b in pairwise(sorted(times)) if began < b <= ended), default=float("nan"))


def table(kills: list[Kill], devices: list[DeviceClient], phone: Phone, load: Load) -> str:
    """Pauses by kill, then totals."""
    lines = [
        f"{'killed':<20}{'flowing again':>15}{'no delivery':>13}{'worst device':>14}{'no push':>9}{'back':>8}"
    ]
    each = [
        [at for connection in device.connections for at, _, _ in connection.receipts] for device in devices
    ]
    for kill in kills:
        ended = kill.at + kill.over_s
        gaps = (
            longest_gap([at for times in each for at in times], kill.at, ended),
            max(longest_gap(times, kill.at, ended) for times in each),
            longest_gap([at for at, _ in phone.receipts], kill.wall, kill.wall + kill.over_s),
        )
        lines.append(
            f"{kill.actor:<20}{kill.flowing_s:>13.1f} s{gaps[0]:>11.2f} s{gaps[1]:>12.2f} s"
            f"{gaps[2]:>7.2f} s{kill.over_s:>6.1f} s"
        )
    told = {key: entry.answered for key, entry in load.accepted.items()}
    slow = {key: at - told[key] for at, key in phone.receipts if key in told and at - told[key] > SLOW_PUSH_S}
    lines.append(f"{len(slow)} pushes took longer than {SLOW_PUSH_S:g} s")
    if slow and kills:
        times = sorted(told[key] for key in slow)
        lines[-1] += f", at most {max(slow.values()):.1f} s; their events were accepted " + ", ".join(
            f"{times[0] - kill.wall:+.1f} to {times[-1] - kill.wall:+.1f} s around the kill of {kill.actor}"
            for kill in kills
            if kill.kind in ("router", "pool")
        )
    return "\n".join(
        [
            *lines,
            f"{load.offered} offered, {len(load.accepted)} accepted; failed tries: {dict(load.retries)}",
            f"{sum(len(each.connections) - 1 for each in devices)} reconnects, {len(phone.receipts)} pushes",
        ]
    )


@contextlib.asynccontextmanager
async def background(*work: Any) -> AsyncIterator[list[asyncio.Task[None]]]:
    """Run coroutines while the block runs; what one of them raised is raised at the end."""
    tasks = [asyncio.create_task(coroutine) for coroutine in work]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome


def victims(status: dict[str, Any], running: Running) -> list[tuple[str, str, ProcessId]]:
    """(name, kind, process) of whom to kill, in order."""
    pids = {name: facts["pid"] for name, facts in status["actors"].items()}
    pids["coordinator"] = status["coordinator"]["pid"]
    (ingress,) = running.processes("ingress")
    pids["ingress"] = ingress.pid
    shards = sorted(name for name in pids if name.startswith("shard-"))
    names = list(shards)
    for prefix in ("gateway-", "router-", "ingress", "pool-fcm-", "coordinator"):
        names.append(next(name for name in pids if name.startswith(prefix)))
    found = []
    for name in names:
        kind = name.split("-")[0]
        process = next((each for each in running.processes(kind) if each.pid == pids[name]), None)
        assert process is not None, f"{name} says it is process {pids[name]}, which is none of {TITLES[kind]}"
        found.append((name, kind, process))
    return found


async def kill_and_wait(
    victim: tuple[str, str, ProcessId],
    running: Running,
    devices: list[DeviceClient],
    phone: Phone,
    load: Load,
) -> Kill:
    """Kill one actor; return once another process is there and events reach everybody again."""
    name, kind, process = victim
    info = read_process(process.pid)
    assert info is not None, f"{name} ended before it was killed"
    assert info.id == process, f"{name} was replaced before it was killed"
    before = running.processes(kind)
    kill = Kill(name, kind, time.monotonic(), time.time())
    os.kill(process.pid, signal.SIGKILL)

    def waiting() -> list[str]:
        fresh = {key for key, entry in load.accepted.items() if entry.began > kill.at}
        late = [device.name for device in devices if fresh.isdisjoint(device.seen)]
        return late if fresh & phone.ids() else [*late, PHONE]

    def flows() -> bool:
        assert running.process.poll() is None, "`up` ended"
        late = waiting()
        assert not late, (
            f"nothing new yet for {', '.join(late)}; {len(load.accepted)} accepted, {dict(load.retries)}"
        )
        return True

    await eventually(flows, RECOVERY_S, f"events reach everybody again after kill -9 of {name}")
    kill.flowing_s = time.monotonic() - kill.at
    await eventually(
        lambda: not alive(process) and set(running.processes(kind)) - set(before),
        RECOVERY_S,
        f"another process for {name} after its kill -9",
    )
    kill.over_s = time.monotonic() - kill.at
    assert not load.broken, f"after kill -9 of {name}: {load.broken[:5]}"
    broken = [(device.name, what) for device in devices for what in device.broken]
    assert not broken, f"after kill -9 of {name}: {broken[:5]}"
    return kill


async def register_phone(dev: dict[str, Any]) -> None:
    """Give the user without a socket a push target."""
    door = Door.of(dev["directUrl"])
    target = {"platform": "android", "provider": "fcm", "token": PHONE_TOKEN}
    connection = HttpConnection(door)
    request = http_request(
        door, "PUT", f"/v1/users/{PHONE}/devices/phone", json.dumps(target).encode(), dev["apiKey"]
    )
    try:
        response = await connection.request(request)
    finally:
        connection.close()
    assert response.status < 300, response


async def balanced(running: Running) -> dict[str, Any]:
    """The status, once both shards own slots: killing an idle one would prove nothing."""
    status = await running.status()
    assert status, "the coordinator does not answer"
    slots = {m["name"]: m["slots"] for m in status["coordinator"]["members"] if m["kind"] == "shard"}
    assert len(slots) == 2, f"two shards were asked for: {slots}"
    assert all(slots.values()), f"a shard owns nothing: {slots}"
    return status


async def complete(running: Running, doomed: list[tuple[str, str, ProcessId]]) -> bool:
    """Every actor answers from another process than at first, nobody is missing, every slot has an owner."""
    status = await running.status()
    assert status, "the coordinator does not answer"
    assert status["coordinator"]["missing"] == []
    assert status["coordinator"]["ownerless"] == 0
    pids = {name: facts.get("pid") for name, facts in status["actors"].items()}
    pids["coordinator"] = status["coordinator"]["pid"]
    pids["ingress"] = running.processes("ingress")[0].pid
    for name, _, process in doomed:
        assert pids.get(name) not in (None, process.pid), f"{name} is not back: {pids}"
    return True


def of_user(load: Load, user: str) -> set[str]:
    """Acknowledged events of a user."""
    return {key for key, entry in load.accepted.items() if entry.user == user}


async def quiet(dev: dict[str, Any], devices: list[DeviceClient], phone: Phone, load: Load) -> bool:
    """Nothing is under way any more."""
    for device in devices:
        missing = of_user(load, device.user) - device.seen.keys()
        assert not missing, (
            f"{device.name} has not received {len(missing)} acknowledged events: {sorted(missing)[:3]}"
        )
    missing = of_user(load, PHONE) - phone.ids()
    assert not missing, f"the phone has not got {len(missing)} pushes: {sorted(missing)[:3]}"
    connection = await asyncpg.connect(dev["postgresDsn"])
    try:
        pending = await connection.fetch(
            "select d.notification_id, d.state, d.due_at, d.attempts"
            " from deliveries d join streams s using (stream_id)"
            " where s.user_id like 'kill-%' and d.state in ('planned', 'sending', 'unknown', 'failed')"
        )
    finally:
        await connection.close()
    assert not pending, f"{len(pending)} rows of the outbox are not done: {pending[:3]}"
    await phone.look()
    return True


async def stored_rows(dev: dict[str, Any]) -> tuple[list[asyncpg.Record], list[asyncpg.Record]]:
    """Every notification of this test's users, and the heads of their streams."""
    connection = await asyncpg.connect(dev["postgresDsn"])
    try:
        rows = await connection.fetch(
            "select n.id::text, n.seq, s.user_id, ('{' || n.content || '}')::jsonb ->> 'title' as title"
            " from notifications n join streams s using (stream_id) where s.user_id like 'kill-%'"
        )
        heads = await connection.fetch(
            "select s.user_id, s.seq, count(n.id) as n, count(distinct n.seq) as d, min(n.seq) as low,"
            " max(n.seq) as high from streams s join notifications n using (stream_id)"
            " where s.user_id like 'kill-%' group by s.stream_id"
        )
    finally:
        await connection.close()
    return rows, heads


def judge_store(load: Load, rows: list[asyncpg.Record], heads: list[asyncpg.Record]) -> None:
    """G1, G2, G3 in Postgres."""
    assert not load.broken, load.broken[:5]
    assert len(load.accepted) == load.offered, "an event that was offered never got its 202"
    ids = collections.Counter(row["id"] for row in rows)
    twice = [key for key, count in ids.items() if count > 1]
    assert not twice, f"{len(twice)} ids are stored more than once: {twice[:3]}"
    events = collections.Counter(row["title"] for row in rows)
    again = [title for title, count in events.items() if count > 1]
    assert not again, f"{len(again)} events are stored more than once, under other ids: {again[:3]}"
    stored = {row["id"]: (row["user_id"], row["seq"], row["title"]) for row in rows}
    told = {key: (entry.user, entry.seq, str(entry.number)) for key, entry in load.accepted.items()}
    lost = {key: value for key, value in told.items() if key not in stored}
    assert not lost, f"{len(lost)} acknowledged events are not stored: {list(lost.items())[:3]}"
    other = {key: (value, stored[key]) for key, value in told.items() if stored[key] != value}
    assert not other, f"{len(other)} events are stored otherwise than answered: {list(other.items())[:3]}"
    unknown = stored.keys() - told.keys()
    assert not unknown, (
        f"{len(unknown)} rows were never answered, though every event was: {sorted(unknown)[:3]}"
    )
    for head in heads:
        assert head["low"] == 1, f"the first seq of {head['user_id']} is {head['low']}"
        assert head["seq"] == head["n"] == head["d"] == head["high"], f"a gap in seq: {head}"
    assert {head["user_id"] for head in heads} == {*ONLINE, PHONE}


def judge_devices(load: Load, devices: list[DeviceClient], rows: list[asyncpg.Record]) -> None:
    """G3, G4, G5 at every device."""
    stored = {row["id"]: (row["user_id"], row["seq"]) for row in rows}
    for device in devices:
        assert not device.broken, f"{device.name}: {device.broken[:5]}"
        missing = of_user(load, device.user) - device.seen.keys()
        assert not missing, (
            f"{device.name} never received {len(missing)} acknowledged events: {sorted(missing)[:3]}"
        )
        for number, connection in enumerate(device.connections):
            last = 0
            for _, notification, seq in connection.receipts:
                where = f"connection {number} of {device.name}"
                known = stored.get(notification)
                assert known is not None, f"{where} received {notification}, which was never stored"
                assert known == (device.user, seq), (
                    f"{where} received {notification} as seq {seq}, stored: {known}"
                )
                assert seq > last, f"{where} received seq {seq} after {last}"
                last = seq


def judge_phone(load: Load, phone: Phone, kills: list[Kill]) -> None:
    """G6, G7: every event is pushed, and twice only if the pool's end hid its first outcome."""
    own = of_user(load, PHONE)
    missing = own - phone.ids()
    assert not missing, (
        f"{len(missing)} acknowledged events of {PHONE} were never pushed: {sorted(missing)[:3]}"
    )
    foreign = phone.ids() - own
    assert not foreign, f"{len(foreign)} pushes are for no event of {PHONE}: {sorted(foreign)[:3]}"
    times: dict[str, list[float]] = collections.defaultdict(list)
    for at, notification in phone.receipts:
        times[notification].append(at)
    killed = [kill.wall for kill in kills if kill.kind == "pool"]
    for notification, each in times.items():
        allowed = any(each[0] - SAME_TIME_S < at < each[-1] for at in killed)
        assert len(each) == 1 or (len(each) == 2 and allowed), (
            f"{notification} was pushed {len(each)} times, at {each}, though the pool was killed at {killed}"
        )


@pytest.mark.timeout(1500)
async def test_nothing_acknowledged_is_lost_when_actors_are_killed(running: Running) -> None:
    """Whoever is killed, events flow again, each is stored once and reaches every device and the phone."""
    dev = running.dev
    await register_phone(dev)
    devices = [
        DeviceClient(dev, user, f"{user}-{index}")
        for user in ONLINE
        for index in range(2 if user in TWO_DEVICES else 1)
    ]
    load, phone = Load(dev), Phone(dev)
    kills: list[Kill] = []
    status = await eventually(lambda: balanced(running), RECOVERY_S, "both shards own slots")
    doomed = victims(status, running)
    try:
        async with background(*(device.run() for device in devices), phone.run()):
            await eventually(
                lambda: all(device.connected for device in devices), RECOVERY_S, "every device is connected"
            )
            async with background(load.run()) as (sending,):
                await eventually(
                    lambda: phone.receipts and all(device.seen for device in devices),
                    RECOVERY_S,
                    "everybody received something before the first kill",
                )
                for victim in doomed:
                    kills.append(await kill_and_wait(victim, running, devices, phone, load))
                await eventually(lambda: complete(running, doomed), RECOVERY_S, "all actors are back")
                load.stop()
                await asyncio.wait_for(sending, RECOVERY_S)
            await eventually(
                lambda: quiet(dev, devices, phone, load),
                RECOVERY_S,
                "every event is where it belongs, the outbox is empty",
            )
    finally:
        print("\n" + table(kills, devices, phone, load))
    rows, heads = await stored_rows(dev)
    judge_store(load, rows, heads)
    judge_devices(load, devices, rows)
    judge_phone(load, phone, kills)
