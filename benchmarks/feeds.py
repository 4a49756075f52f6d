"""F1 to F3: feeds, counts and searches over many stored notifications, and a read on its way between devices.

F1 and F2 read what `benchmarks.stored` put into Postgres; every answer of a sample is compared with it.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
from typing import Any, Final
from urllib.parse import quote

import asyncpg

from benchmarks.bench import Measurement, Options, Progress, opened
from benchmarks.ledger import Verdict
from benchmarks.procs import cpu_between, snapshot
from benchmarks.stats import summary_ms
from benchmarks.stored import Population, contents, filled, word
from benchmarks.target import Target, TargetError
from benchmarks.wire import HttpConnection, Receiver, http_request, masked_frame, now

FEED: Final = "/api/notifications"
COUNT: Final = "/api/notifications/unread-count"
_LIMIT: Final = 20
_AT_REST_S: Final = 2.0


class _Reads:
    """Requests of one scenario, one at a time or many at once, with their answers judged."""

    def __init__(self, target: Target, options: Options, name: str) -> None:
        if not target.postgres_dsn:
            raise TargetError(f"{name} needs postgresDsn in dev.json: it fills the database itself")
        self.target = target
        self.dsn = target.postgres_dsn
        self.options = options
        self.door = target.http_door(options.door)
        self.rng = random.Random(f"{options.seed}:{name}")
        self.verdict = Verdict(not_stored=None, wrong=0)
        self._requests: dict[tuple[str, str], bytes] = {}

    def request(self, user: str, path: str) -> bytes:
        """The bytes of a GET."""
        key = (user, path)
        data = self._requests.get(key)
        if data is None:
            token = self.target.token(user)
            data = self._requests[key] = http_request(self.door, "GET", path, bearer=token)
        return data

    async def get(self, connection: HttpConnection, user: str, path: str) -> tuple[float, bytes]:
        """(seconds, body); an answer other than 200 is counted as refused."""
        data = self.request(user, path)
        began = now()
        response = await connection.request(data)
        if response.status != 200:
            code = str(response.status)
            self.verdict.refused[code] = self.verdict.refused.get(code, 0) + 1
            return response.at - began, b"{}"
        self.verdict.accepted += 1
        return response.at - began, response.body

    def compare(self, what: str, got: Any, expected: Any) -> None:
        """Judge one answer."""
        if got == expected:
            self.verdict.received += 1
            return
        self.verdict.wrong = (self.verdict.wrong or 0) + 1
        if len(self.verdict.examples) < 5:
            self.verdict.examples.append(f"{what}: got {got!r:.200}, expected {expected!r:.200}")

    async def statements(self) -> int:
        """Statements that Postgres has run (each a transaction of its own, but for a few)."""
        await asyncio.sleep(1.5)  # sessions report at most once a second
        connection = await asyncpg.connect(self.dsn)
        try:
            return await connection.fetchval(
                "select xact_commit from pg_stat_database where datname = current_database()"
            )
        finally:
            await connection.close()


async def feed_and_count(target: Target, options: Options, progress: Progress) -> Measurement:
    """F1: first page and unread count at 1,000,000 stored notifications: first reads, repeated ones, many."""
    reads = _Reads(target, options, "F1")
    population = await filled(reads.dsn, target.tenant, options.stored_notifications, progress)
    # Whose page is asked for is drawn by notification: those who have many look more often.
    users = sorted({population.draw(reads.rng)[1] for _ in range(max(10, options.sequential_events // 4))})
    connection = HttpConnection(reads.door, options.request_timeout_s)
    metrics: dict[str, Any] = {}
    answers: dict[tuple[str, str], bytes] = {}
    for user in users:
        for path in (FEED, COUNT):
            reads.request(user, path)
    for name, rounds in (("first", 1), ("", 3)):
        times: dict[str, list[float]] = {FEED: [], COUNT: []}
        for _ in range(rounds):
            reads.rng.shuffle(users)
            for user in users:
                for path in (FEED, COUNT):
                    seconds, answers[user, path] = await reads.get(connection, user, path)
                    times[path].append(seconds)
            progress.line(f"F1: {len(users)} users read")
        for path, key in ((FEED, "feed"), (COUNT, "count")):
            metrics["_".join(filter(None, (name, key, "ms")))] = summary_ms(times[path])
    metrics |= await _many(reads, users)
    truth = await contents(reads.dsn, target.tenant, users)
    for user, rows in truth.items():
        for answer in (answers[user, FEED], (await reads.get(connection, user, FEED))[1]):
            notes = json.loads(answer).get("notifications", [])
            reads.compare(
                f"feed of {user}",
                [(note["seq"], note["id"], note["read"]) for note in notes],
                [row[:3] for row in rows[:_LIMIT]],
            )
        for answer in (answers[user, COUNT], (await reads.get(connection, user, COUNT))[1]):
            reads.compare(
                f"count of {user}", json.loads(answer),
                {"count": sum(not row[2] for row in rows), "rev": len(rows)},
            )  # fmt: skip
    connection.close()
    title = f"feed and count at {population.total():,} stored"
    return Measurement("F1", title, metrics, reads.verdict)


async def _many(reads: _Reads, users: list[str]) -> dict[str, Any]:
    """Closed loop of many connections over a part of the users, as often as the replica answers."""
    options = reads.options
    hot = users[:200]
    connections = [HttpConnection(reads.door, options.request_timeout_s) for _ in range(options.concurrency)]
    times: dict[str, list[float]] = {FEED: [], COUNT: []}
    own = {os.getpid()}

    async def worker(connection: HttpConnection, until: float, kept: dict[str, list[float]] | None) -> None:
        rng = random.Random(reads.rng.random())
        while now() < until:
            path = rng.choice((FEED, COUNT))
            seconds, _ = await reads.get(connection, rng.choice(hot), path)
            if kept is not None:
                kept[path].append(seconds)

    async def run(seconds: float, kept: dict[str, list[float]] | None) -> None:
        until = now() + seconds
        await asyncio.gather(*(worker(connection, until, kept) for connection in connections))

    await run(min(2.0, options.duration_s), None)
    rest_from, began = await reads.statements(), now()
    await asyncio.sleep(min(_AT_REST_S, options.duration_s))
    before = await reads.statements()
    at_rest = (before - rest_from) / (now() - began)
    processes, began = snapshot(reads.target.pids, exclude=own), now()
    await run(options.duration_s, times)
    seconds, count = now() - began, len(times[FEED]) + len(times[COUNT])
    spent = cpu_between(processes, snapshot(reads.target.pids, exclude=own))
    statements = await reads.statements() - before - at_rest * (now() - began)
    for connection in connections:
        connection.close()
    per_thousand = {group: cpu * 1000 / count for group, cpu in spent.items()}
    return {
        "reads_per_s": count / seconds,
        "many_feed_ms": summary_ms(times[FEED]),
        "many_count_ms": summary_ms(times[COUNT]),
        "statements_per_read": statements / count,
        "cpu_s_per_1000_reads": {"total": sum(per_thousand.values()), **per_thousand},
    }


async def searches(target: Target, options: Options, progress: Progress) -> Measurement:
    """F2: search at 1,000,000 stored notifications, by users with 5, 45 and 10,000 of them."""
    reads = _Reads(target, options, "F2")
    population = await filled(reads.dsn, target.tenant, options.stored_notifications, progress)
    connection = HttpConnection(reads.door, options.request_timeout_s)
    long = population.kinds[0]
    first: list[float] = []
    for number in range(long.users):
        user = f"{population.prefix}{long.first + number}"
        seconds, _ = await reads.get(connection, user, _search(f"nothinglikethis{number}"))
        first.append(seconds)
        progress.line(f"F2: words of {number + 1} long feeds indexed")
    times: dict[str, list[float]] = {"": [], **{kind.name: [] for kind in population.kinds}}
    asked: list[tuple[str, str, bytes]] = []
    count = options.sequential_events
    for number in range(count + count // 2):
        # Two thirds are drawn by notification, the rest are of long feeds, to have enough of these, too.
        kind, user = (
            population.draw(reads.rng) if number < count else (long, population.user(long, reads.rng))
        )
        q = word(reads.rng) if reads.rng.random() < 0.7 else f"{word(reads.rng)} {word(reads.rng)[:3]}"
        seconds, body = await reads.get(connection, user, _search(q))
        times[kind.name].append(seconds)
        if number < count:
            times[""].append(seconds)
        if number % (10 if kind is not long else 5) == 0:
            asked.append((user, q, body))
        if number % 200 == 0:
            progress.line(f"F2: {number:,} searches")
    await _compare_searches(reads, asked, population)
    connection.close()
    metrics: dict[str, Any] = {
        "first_search_ms": summary_ms(first),
        "search_ms": summary_ms(times[""]),
        **{f"search_{kind.name}_ms": summary_ms(times[kind.name]) for kind in population.kinds},
    }
    title = f"search at {population.total():,} stored"
    measurement = Measurement("F2", title, metrics, reads.verdict)
    measurement.notes.append(
        "feeds: " + ", ".join(f"{kind.users:,} {kind.name} of {kind.each:,}" for kind in population.kinds)
    )
    return measurement


def _search(q: str) -> str:
    return f"{FEED}?q={quote(q)}"


async def _compare_searches(
    reads: _Reads, asked: list[tuple[str, str, bytes]], population: Population
) -> None:
    """Hold answers against every notification of their user."""
    users = sorted({user for user, _, _ in asked})
    for at in range(0, len(users), 20):
        truth = await contents(reads.dsn, reads.target.tenant, users[at : at + 20])
        words = {user: [(row[0], set(_words(row[3]))) for row in rows] for user, rows in truth.items()}
        for user, q, body in asked:
            if user in words:
                expected = [
                    seq
                    for seq, present in words[user]
                    if all(any(one.startswith(part) for one in present) for part in q.split())
                ]
                got = [note["seq"] for note in json.loads(body).get("notifications", [])]
                reads.compare(f"{q!r} of {user}", got, expected[:_LIMIT])


def _words(content: str) -> list[str]:
    members = json.loads(f"{{{content}}}")
    return re.findall(r"[a-z0-9]+", f"{members['title']} {members['body']}".lower())


# ---------------------------------------------------------------------------------------------------
# F3


class _Watching(Receiver):
    """A device that tells when it hears of a read."""

    heard: asyncio.Future[float] | None = None

    def _text(self, at: float, text: bytes) -> None:
        if text.startswith(b'{"type":"NOTIFICATIONS_READ"') and self.heard is not None:
            if not self.heard.done():
                self.heard.set_result(at)
        else:
            super()._text(at, text)

    def send(self, text: bytes) -> None:
        """Send a frame."""
        assert self._transport is not None
        self._transport.write(masked_frame(1, text))


async def read_elsewhere(target: Target, options: Options, progress: Progress) -> Measurement:
    """F3: read on one device to frame on another: sent as MARK_READ, and as POST /api/notifications/read."""
    users = min(10, options.users)
    each = max(2, options.sequential_events // users)
    async with (
        opened(target, _quiet(options), "F3", users=users, connections=1, online=0) as bench,
        progress.watch(bench),
    ):
        gateway = target.ws_door()
        pairs: list[tuple[_Watching, _Watching]] = []
        for user in bench.users:
            token = target.token(user)
            pair = tuple(_Watching(gateway, user, token, name) for name in ("phone", "desk"))
            for device in pair:
                await device.connect()
            bench.receivers.extend(pair)
            pairs.append(pair)  # type: ignore[arg-type]
        unread: dict[int, list[bytes]] = {}
        for number in range(users):
            for at in range(0, each, options.batch):
                batch = [number] * min(options.batch, each - at)
                await bench.post_batch(bench.connections[0], batch, bench.batch_request(batch))
            await bench.settle()
            unread[number] = [note for _, note, _ in pairs[number][0].device.receipts]
        times: dict[str, list[float]] = {"frame": [], "post": []}
        missed = 0
        loop = asyncio.get_running_loop()
        tokens = [target.token(user) for user in bench.users]
        for turn in range(each):
            for number, (one, other) in enumerate(pairs):
                if turn >= len(unread[number]):
                    continue
                body = b'{"notificationIds":["%s"]}' % unread[number][turn]
                other.heard = loop.create_future()
                how = "post" if turn % 2 else "frame"
                data = http_request(bench.door, "POST", "/api/notifications/read", body, tokens[number])
                began = now()
                if how == "frame":
                    one.send(b'{"type":"MARK_READ",' + body[1:])
                else:
                    answer = asyncio.ensure_future(bench.connections[0].request(data))
                    await asyncio.wait([answer, other.heard], return_when=asyncio.ALL_COMPLETED, timeout=5)
                try:
                    at = await asyncio.wait_for(other.heard, options.receipt_timeout_s)
                except TimeoutError:
                    missed += 1
                else:
                    times[how].append(at - began)
        measurement = await bench.finish(
            "read on one device to frame on another",
            {"read_frame_ms": summary_ms(times["frame"]), "read_post_ms": summary_ms(times["post"])},
        )
        measurement.metrics.pop("end_to_end_ms", None)  # of the events: nobody measured these
        measurement.metrics.pop("post_ms", None)
        measurement.verdict.wrong = missed
        if missed:
            measurement.verdict.examples.append(f"{missed} reads were not told to the other device")
        return measurement


def _quiet(options: Options) -> Options:
    """No events beyond those that are read."""
    return Options(**{**options.__dict__, "warmup_events": 0})
