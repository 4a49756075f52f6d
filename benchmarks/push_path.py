"""Pushes per second through the whole path: router, shard, outbox in PostgreSQL, pool, provider, and back.

    python -m benchmarks.push_path [--provider apns] [--rate 1000] [--seconds 20] [--late 0.002]

The provider answers after 200 ms and refuses 10 % of the requests with 500; a small share is accepted but
answered after the pool's timeout (unknown, hence tried again). Shard, router, pool and provider are a process
each, as in production; the driver plays ingress and coordinator. Events arrive at a fixed rate.

The verdict compares the provider's record with the outbox: every notification was accepted at least once
(none lost), and no more often than once plus the tries that the outbox knows as unknown.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from datetime import datetime
from pathlib import Path
from typing import Any

import asyncpg
import uvloop

from actors.config import ActorConfig
from actors.link import dial
from actors.push_pool import PushPool
from actors.router import Router
from actors.shard import Shard
from benchmarks.push_throughput import cpu_s
from benchmarks.stats import percentile
from carillon.ids import Uuid7Source, slot_of
from carillon.messages import Address, Event, Publish
from carillon.notification import encode_content
from carillon.settings import Settings
from carillon.testing.provider_credentials import write_demo_credentials
from cluster.embedded import EmbeddedPostgres
from stores.postgres.migrate import migrate
from tests.actors.fakes import SECRET, FakeCoordinator

IDS = Uuid7Source()
USERS = 2000
LATENCY_S = 0.2
ERRORS = {"apns": "InternalServerError", "fcm": "INTERNAL"}
TIMEOUT_S = 2.0
_ACTORS: dict[str, Any] = {"shard": Shard, "router": Router, "pool": PushPool}


def make(number: int) -> Event:
    """A typical event for a user who is offline and has a phone."""
    user = f"user{number % USERS}"
    now = time.time_ns() // 1_000_000
    content = encode_content(
        {
            "type": "comment",
            "title": "Ada commented on your post",
            "body": "This is how long the text of a usual notification is, a sentence or two of it.",
            "link": "https://example.com/posts/42#comment-7",
            "createdAt": "2026-01-01T00:00:00.000Z",
        }
    )
    return Event(IDS.next(now), "t", user, slot_of("t", user), "comment", None, 1, content, now)


# -- processes --------------------------------------------------------------------------------------


async def run_actor(facts: dict[str, Any]) -> None:
    """The child: one actor, until the parent closes its standard input."""
    settings = Settings().with_values(**facts["settings"])
    labels, kind = facts["labels"], facts["kind"]
    address = Address("127.0.0.1", facts["coordinator"])
    actor = _ACTORS[kind](ActorConfig(kind, facts["name"], "local", settings, SECRET, labels, address))
    await actor.start()
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    if kind == "pool":
        print(json.dumps(await actor.status()), flush=True)
    await actor.stop()


def start_actor(
    kind: str, name: str, labels: dict[str, str], common: dict[str, Any]
) -> subprocess.Popen[str]:
    """Start an actor's process and wait until it serves."""
    facts = json.dumps(common | {"kind": kind, "name": name, "labels": labels})
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.push_path", "--actor", facts],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert process.stdout is not None
    if process.stdout.readline().strip() != "ready":
        raise RuntimeError(f"{name} did not start")
    return process


def start_provider(provider: str, folder: Path, keep: int) -> tuple[subprocess.Popen[str], dict[str, Any]]:
    """Start a local provider; returns the process and its ready line."""
    command = [sys.executable, "-m", f"carillon.testing.{provider}_server", "--dir", str(folder)]
    process = subprocess.Popen(
        [*command, "--keep", str(keep), "--exit-with-parent"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert process.stdout is not None
    return process, json.loads(process.stdout.readline())


def call(url: str, document: Any = None) -> Any:
    """GET, or POST a document, at a control port."""
    data = None if document is None else json.dumps(document).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data)) as answer:  # noqa: S310  loopback
        return json.load(answer)


def postgres_cpu_s(folder: Path) -> float:
    """CPU seconds of a PostgreSQL with all its children, also those that ended."""
    data = next(folder.rglob("postmaster.pid"), None)
    if data is None:
        return 0.0
    head = int(data.read_text().split()[0])
    total = 0.0
    for path in Path("/proc").glob("[0-9]*"):
        try:
            fields = (path / "stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(path.name) == head:
            total += sum(map(int, fields[11:15])) / 100
        elif int(fields[1]) == head:
            total += (int(fields[11]) + int(fields[12])) / 100
    return total


# -- the measurement --------------------------------------------------------------------------------


class _Client:
    def link_opened(self, link: object) -> None: ...
    def link_closed(self, link: object) -> None: ...
    def receive(self, link: object, message: object, request: int) -> None: ...
    def read_finished(self, link: object) -> None: ...


async def prepare(db: asyncpg.Connection, provider: str) -> None:
    """A shard to be and users with a phone each."""
    await db.execute("insert into shards (shard, term, node, incarnation) values ('shard-a', 1, 'n', 'i')")
    await db.execute(
        "insert into devices (tenant, user_id, device_id, platform, provider, token_kind, token)"
        " select 't', 'user' || n, 'phone', 'phone', $1, 'token', lpad(to_hex(n), 64, '0')"
        " from generate_series(0, $2::int - 1) n",
        provider,
        USERS,
    )


async def offer(link: Any, rate: float, seconds: float) -> tuple[int, float]:
    """Publish at a rate; returns how many were accepted and how late the last one was."""
    total = round(rate * seconds)
    step = max(1, round(rate / 100))
    began = time.perf_counter()
    tasks: set[asyncio.Task[Any]] = set()
    accepted = late_s = 0.0

    async def publish(first: int, last: int) -> None:
        nonlocal accepted
        answer = await link.request(Publish([make(n) for n in range(first, last)]))
        accepted += sum(outcome.status == "queued" for outcome in answer.outcomes)

    for first in range(0, total, step):
        due = began + first / rate
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        late_s = max(late_s, time.perf_counter() - due)
        task = asyncio.ensure_future(publish(first, min(first + step, total)))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)
    return int(accepted), late_s


async def settled(db: asyncpg.Connection, timeout_s: float) -> dict[str, int]:
    """Wait until no outbox row is on its way; returns rows by state."""
    deadline = time.perf_counter() + timeout_s
    while True:
        rows = await db.fetch("select state, count(*) from deliveries group by state")
        states: dict[str, int] = {row["state"]: row["count"] for row in rows}
        if not {"planned", "sending", "failed", "unknown"} & set(states) or time.perf_counter() > deadline:
            return states
        await asyncio.sleep(0.25)


async def watch(coordinator: FakeCoordinator, seen: list[dict[str, float]]) -> None:
    """Note once a second what the pool tells of itself: jobs held, limit, requests in flight."""
    while True:
        await asyncio.sleep(1.0)
        renewal = coordinator.renewals.get("pool-1")
        if renewal is not None:
            wanted = ("pool_queue", "push_concurrency", "push_in_flight")
            seen.append({k.split("{")[0]: v for k, v in renewal.gauges.items() if k.startswith(wanted)})


async def judge(db: asyncpg.Connection, provider: str, tally: dict[str, Any]) -> dict[str, Any]:
    """Hold the provider's record against the outbox."""
    rows = await db.fetch(
        "select n.id, x.token, d.state, (select count(*) from delivery_attempts a"
        "  where a.delivery_id = d.id and a.outcome = 'unknown') as unknown, d.attempts"
        " from deliveries d join notifications n on n.id = d.notification_id"
        " join streams s on s.stream_id = d.stream_id"
        " join devices x on x.tenant = s.tenant and x.user_id = s.user_id and x.provider = $1",
        provider,
    )
    lost = excess = repeated = 0
    attempts = unknown = dead = 0
    for row in rows:
        times = tally.pop(f"{row['token']} {row['id']}", (0, ""))[0]
        attempts += row["attempts"]
        unknown += row["unknown"]
        dead += row["state"] == "dead"
        lost += row["state"] == "sent" and times == 0
        excess += times > 1 + row["unknown"]
        repeated += max(0, times - 1)
    return {
        "lost": lost,
        "beyondUnknowns": excess,
        "repeated": repeated,
        "unknown": unknown,
        "dead": dead,
        "attempts": attempts,
        "strangers": len(tally),
        "rows": len(rows),
    }


async def measure(options: argparse.Namespace, dsn: str, folder: Path) -> dict[str, Any]:
    """One run."""
    provider = options.provider
    total = round(options.rate * options.seconds)
    server, ready = start_provider(provider, folder / provider, 2 * total + 10_000)
    processes: dict[str, subprocess.Popen[str]] = {"provider": server}
    try:
        both = {provider: ready}
        push = dict(write_demo_credentials(folder, both.get("fcm"), both.get("apns")))
        push |= {"timeout_s": TIMEOUT_S, "max_senders": 1}
        values = {"postgres": {"dsn": dsn}, "push": push, "cluster": {"runtime_dir": str(folder / "run")}}
        coordinator = await FakeCoordinator.start(Settings().with_values(**values))
        common = {"coordinator": coordinator.address.port, "settings": values}
        db = await asyncpg.connect(dsn)
        await prepare(db, provider)
        for kind, name in (("shard", "shard-a"), ("router", "router-1"), ("pool", "pool-1")):
            labels = {"provider": provider} if kind == "pool" else {}
            processes[kind] = await asyncio.to_thread(start_actor, kind, name, labels, common)
        coordinator.set_owner(range(1024), "shard-a")
        address = coordinator.joined["router-1"].address
        link = await dial(address, _Client(), coordinator.settings.link, "bench", SECRET)  # type: ignore[arg-type]
        await asyncio.sleep(1.0)
        shares = [{"error": ERRORS[provider], "share": 0.1}]
        if options.late:
            shares.append({"delayS": 1.5 * TIMEOUT_S, "share": options.late / 0.9})
        call(ready["controlUrl"] + "/script", {"delayS": LATENCY_S, "shares": shares, "seed": options.seed})

        def used() -> dict[str, float]:
            cpu = {name: cpu_s(process.pid) for name, process in processes.items()}
            own = os.times()
            return cpu | {"postgres": postgres_cpu_s(folder), "driver": own.user + own.system}

        seen: list[dict[str, float]] = []
        watching = asyncio.ensure_future(watch(coordinator, seen))
        before, began, began_ms = used(), time.perf_counter(), time.time_ns() // 1_000_000
        accepted, late_s = await offer(link, options.rate, options.seconds)
        offered_s = time.perf_counter() - began
        states = await settled(db, options.seconds + 90)
        wall_s = time.perf_counter() - began
        watching.cancel()
        after = used()
        record = await asyncio.to_thread(call, ready["controlUrl"] + "/tally")
        times = sorted(
            datetime.fromisoformat(first).timestamp() * 1000 - began_ms
            for _, first in record["pushes"].values()
        )
        # Latency from the id of the notification (its first 48 bits are ms) to the first acceptance.
        delays = sorted(
            datetime.fromisoformat(first).timestamp() * 1000 - int(key.split()[1].replace("-", "")[:12], 16)
            for key, (_, first) in record["pushes"].items()
        )
        window = [at for at in times if 5000 <= at <= options.seconds * 1000]
        pool = processes["pool"]
        assert pool.stdin is not None
        assert pool.stdout is not None
        pool.stdin.write("\n")
        pool.stdin.flush()
        status = json.loads(await asyncio.to_thread(pool.stdout.readline))
        verdict = await judge(db, provider, record["pushes"])
        link.close()
        await db.close()
        await coordinator.stop()
        cpu = {name: round(after[name] - before[name], 2) for name in before}
        return {
            "provider": provider,
            "offered_per_s": options.rate,
            "offered_for_s": round(offered_s, 1),
            "driver_late_ms": round(late_s * 1000),
            "accepted": accepted,
            "states": states,
            "settled_after_s": round(wall_s, 1),
            "pushes_per_s": round(len(window) / (options.seconds - 5)),
            "requests": record["count"] + sum(record["rejected"].values()),
            "refused": record["rejected"],
            "delay_p50_ms": round(percentile(delays, 0.5)),
            "delay_p99_ms": round(percentile(delays, 0.99)),
            "cpu_s": cpu,
            "app": status["apps"],
            "each_second": seen,
        } | verdict
    finally:
        for process in processes.values():
            process.terminate()
        for process in processes.values():
            process.wait(10)


def show(result: dict[str, Any]) -> bool:
    """Print a run; returns whether its verdict is good."""
    good = (
        not result["lost"]
        and not result["beyondUnknowns"]
        and not result["strangers"]
        and result["rows"] == result["accepted"] == sum(result["states"].values())
        and set(result["states"]) <= {"sent", "dead"}
    )
    cpu = result["cpu_s"]
    path = sum(cpu[name] for name in ("shard", "router", "pool", "postgres"))
    print(json.dumps(result))
    print(
        f"{result['provider']}: {result['pushes_per_s']} pushes/s accepted at "
        f"{result['offered_per_s']:.0f}/s offered, "
        f"first acceptance p50 {result['delay_p50_ms']} ms, p99 {result['delay_p99_ms']} ms; "
        f"{result['requests'] / cpu['pool']:.0f} requests per CPU s of the pool, "
        f"{result['accepted'] / path:.0f} pushes per CPU s of the whole path; "
        f"{'ok' if good else 'FAILED'}: {result['states']}, lost {result['lost']}, "
        f"repeated {result['repeated']} of {result['unknown']} unknown, "
        f"beyond that {result['beyondUnknowns']}"
    )
    return good


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--provider", choices=("apns", "fcm"), default="apns")
    parser.add_argument("--rate", type=float, default=1000.0, help="events per second")
    parser.add_argument("--seconds", type=float, default=20.0, help="at least 6")
    parser.add_argument("--late", type=float, default=0.002, help="share of answers after the timeout")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--actor", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.actor:
        uvloop.run(run_actor(json.loads(options.actor)))
        return 0
    folder = Path(tempfile.mkdtemp(prefix="carillon-bench-"))
    folder.chmod(0o711)
    with EmbeddedPostgres(folder / "pg") as server:
        asyncio.run(migrate(server.dsn))
        result = uvloop.run(measure(options, server.dsn, folder))
    return 0 if show(result) else 1


if __name__ == "__main__":
    sys.exit(main())
