"""What operators do to a running system, and what happens to one, under load: nothing acknowledged is lost.

One system as a user starts it, one load over the whole story: every actor is replaced one by one, Valkey is
killed, PostgreSQL is killed and stays away for a while, and the power fails. At the end every event that was
answered with 202 is stored once and has reached every device, in order.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import asyncpg
import pytest

from benchmarks.wire import Door, HttpConnection, http_request
from cluster.processes import descendants
from cluster.ray_env import ROOT
from tests.cluster.kill_load import ONLINE, PHONE, TWO_DEVICES, DeviceClient, Load
from tests.cluster.test_kill_actors import (
    Running,
    background,
    balanced,
    judge_devices,
    judge_store,
    longest_gap,
    of_user,
    register_phone,
    stored_rows,
)
from tests.cluster.test_up import Installation, postmaster, related
from tests.support import eventually

WAIT_S = 180.0
"""Longest wait for anything; the slowest, a whole start, takes 15 s on an idle machine."""
AWAY_S = 4.0
"""PostgreSQL stays away for longer than the ingress tries by itself (`ingress.store_retry_s`)."""


@pytest.fixture(scope="module")
def installation(service_folder: Path) -> Iterator[Installation]:
    """A place to run in; afterwards no process of it is left."""
    folder = service_folder / "operations"
    folder.mkdir()
    place = Installation(folder)
    yield place
    for _ in range(2):  # a second signal ends by force
        if place.process is not None and place.process.poll() is None:
            place.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                place.process.wait(60)
    assert related(folder) == {}, "processes are left after the system was stopped"


class Story:
    """The load, the devices, and what each chapter cost."""

    def __init__(self, installation: Installation) -> None:
        self.installation = installation
        self.dev = installation.run()
        assert installation.process is not None
        self.running = Running(installation.process, installation.folder, self.dev)
        self.load = Load(self.dev)
        self.devices = [
            DeviceClient(self.dev, user, f"{user}-{index}")
            for user in ONLINE
            for index in range(2 if user in TWO_DEVICES else 1)
        ]
        self.lines: list[str] = []

    async def flows(self) -> None:
        """Return once every device has received an event first sent after now."""
        began = time.monotonic()

        def all_have() -> bool:
            fresh = {key for key, entry in self.load.accepted.items() if entry.began > began}
            late = [device.name for device in self.devices if fresh.isdisjoint(device.seen)]
            assert not late, f"nothing new for {late}; failed tries: {dict(self.load.retries)}"
            return True

        await eventually(all_have, WAIT_S, "events reach every device")

    def tell(self, chapter: str, began: float, retries: collections.Counter[str]) -> float:
        """Note the longest pause of deliveries since `began`; returns it."""
        ended = time.monotonic()
        each = [
            [at for connection in device.connections for at, _, _ in connection.receipts]
            for device in self.devices
        ]
        pause_s = longest_gap([at for times in each for at in times], began, ended)
        worst_s = max(longest_gap(times, began, ended) for times in each)
        failed = dict(self.load.retries - retries)
        self.lines.append(
            f"{chapter:<10} {ended - began:5.1f} s  no delivery at all {pause_s:5.2f} s  "
            f"worst device {worst_s:5.2f} s  failed tries {failed}"
        )
        return pause_s


async def run_command(story: Story, *words: str) -> tuple[int, str, str]:
    """`python -m cluster WORDS` on the running system."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "cluster", *words, "--data-dir", str(story.installation.folder)),
        cwd=ROOT,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(), 240)
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def replace_all_actors(story: Story) -> None:
    """T10: `restart` replaces every process; no event is refused, no device sees a gap."""
    before = await story.running.status()
    pids = {name: facts["pid"] for name, facts in before["actors"].items()}
    pids["coordinator"] = before["coordinator"]["pid"]
    ingress = {process.pid for process in story.running.processes("ingress")}
    began, retries = time.monotonic(), collections.Counter(story.load.retries)
    code, out, err = await run_command(story, "restart")
    story.lines.append(out)
    assert code == 0, out + err
    assert f"{len(pids) + 1} actors were replaced" in out
    await story.flows()
    story.tell("restart", began, retries)
    after = await story.running.status()
    assert after["coordinator"]["pid"] != pids.pop("coordinator")
    for name, pid in pids.items():
        assert after["actors"][name]["pid"] != pid, f"{name} was not replaced"
    assert ingress.isdisjoint(process.pid for process in story.running.processes("ingress"))
    refused = {
        what: count
        for what, count in (story.load.retries - retries).items()
        if what.isdigit()  # a status: whatever the ingress could not settle by itself inside its deadline
    }
    assert refused == {}, "an event was refused instead of being tried again inside its deadline"


async def refuse_what_cannot_be_drained(story: Story) -> None:
    """An unknown node and the only node are refused with a sentence, and nothing happens to them."""
    code, _, err = await run_command(story, "drain", "nowhere")
    assert code == 1
    assert re.fullmatch(r"carillon: there is no live node 'nowhere'; nodes: [0-9a-f]{8}\n", err), err
    code, _, err = await run_command(story, "drain", err.strip()[-8:])
    assert code == 1
    assert "is the head, where the coordinator is" in err
    await story.flows()


async def kill_valkey(story: Story) -> None:
    """G12: Valkey is killed and comes back: deliveries go on as if nothing had happened."""
    began, retries = time.monotonic(), collections.Counter(story.load.retries)
    (valkey,) = [
        info.id.pid
        for info in descendants(story.running.process.pid)
        if os.path.basename(os.readlink(f"/proc/{info.id.pid}/exe")) == "valkey-server"
    ]
    os.kill(valkey, signal.SIGKILL)
    await eventually(
        lambda: "Valkey ended; starting it again" in story.installation.said(), WAIT_S, "Valkey is back"
    )
    await story.flows()
    pause_s = story.tell("Valkey", began, retries)
    assert story.load.retries == retries, "losing Valkey cost a request"
    assert pause_s < 10.0, "losing Valkey held deliveries up"


async def kill_postgres(story: Story) -> None:
    """T15: while PostgreSQL is away, 503 with Retry-After; then all goes on by itself."""
    began, retries = time.monotonic(), collections.Counter(story.load.retries)
    killed = postmaster(story.installation)
    assert killed is not None
    up = story.running.process.pid
    os.kill(up, signal.SIGSTOP)  # it would have another one up within a second
    try:
        os.kill(killed, signal.SIGKILL)
        door = Door.of(story.dev["directUrl"])
        body = json.dumps({"userId": "while-postgres-is-away", "type": "t", "title": "t"}).encode()
        connection = HttpConnection(door)
        try:
            answer = await connection.request(
                http_request(door, "POST", "/v1/events", body, story.dev["apiKey"])
            )
        finally:
            connection.close()
        assert answer.status == 503, answer
        assert re.search(rb"(?i)\r\nretry-after: [1-9]", answer.headers), answer
        await asyncio.sleep(max(0.0, began + AWAY_S - time.monotonic()))
    finally:
        os.kill(up, signal.SIGCONT)
    await eventually(
        lambda: postmaster(story.installation) not in (None, killed), WAIT_S, "another PostgreSQL"
    )
    await story.flows()
    story.tell("PostgreSQL", began, retries)
    assert "PostgreSQL ended; starting it again" in story.installation.said()


async def lose_power(story: Story) -> None:
    """Every process is killed at once, PostgreSQL's too; the next start has everything."""
    began, retries = time.monotonic(), collections.Counter(story.load.retries)
    up = story.running.process.pid
    everything = [up, *(info.id.pid for info in descendants(up))]
    for number in (signal.SIGSTOP, signal.SIGKILL):  # stopped first: nobody sees another die and tidies up
        for pid in everything:
            os.kill(pid, number)
    story.running.process.wait()
    await eventually(lambda: related(story.installation.folder) == {}, WAIT_S, "all of it has ended")
    story.installation.dev_file.unlink()  # the killed one could not: wait for that of the next
    again = await asyncio.to_thread(story.installation.run)
    for name in ("apiKey", "clientSecret", "directUrl", "wsUrl"):
        assert again[name] == story.dev[name]
    assert story.installation.process is not None
    story.running.process = story.installation.process
    story.dev["postgresDsn"] = again["postgresDsn"]
    await story.flows()
    story.tell("power", began, retries)


async def settled(story: Story) -> bool:
    """Every device has what was accepted for it, and every push was taken by the provider."""
    for device in story.devices:
        missing = of_user(story.load, device.user) - device.seen.keys()
        assert not missing, f"{device.name} has not received {len(missing)}: {sorted(missing)[:3]}"
    connection = await asyncpg.connect(story.dev["postgresDsn"])
    try:
        states = await connection.fetch(
            "select s.user_id = $1 as phone, d.state, count(*) as n, count(distinct d.notification_id) as d"
            " from deliveries d join streams s using (stream_id) where s.user_id like 'kill-%' group by 1, 2",
            PHONE,
        )
    finally:
        await connection.close()
    open_ = [row for row in states if row["state"] in ("planned", "sending", "unknown", "failed")]
    assert not open_, f"rows of the outbox are not done: {open_}"
    pushed = len(of_user(story.load, PHONE))
    assert [tuple(row) for row in states if row["phone"]] == [(True, "sent", pushed, pushed)]
    return True


@pytest.mark.timeout(1200)
async def test_nothing_acknowledged_is_lost_whatever_an_operator_meets(installation: Installation) -> None:
    """Restart of all actors, Valkey killed, PostgreSQL killed, power lost: all stored once, all delivered."""
    story = await asyncio.to_thread(Story, installation)
    await register_phone(story.dev)
    await eventually(lambda: balanced(story.running), WAIT_S, "both shards own slots")
    try:
        async with background(*(device.run() for device in story.devices)):
            await eventually(
                lambda: all(device.connected for device in story.devices), WAIT_S, "every device is connected"
            )
            async with background(story.load.run()) as (sending,):
                await story.flows()
                await refuse_what_cannot_be_drained(story)
                await replace_all_actors(story)
                await kill_valkey(story)
                await kill_postgres(story)
                await lose_power(story)
                story.load.stop()
                await asyncio.wait_for(sending, WAIT_S)
            await eventually(
                lambda: settled(story), WAIT_S, "every event is where it belongs, the outbox is empty"
            )
    finally:
        print("\n" + "\n".join(story.lines))
        print(f"{story.load.offered} offered, {len(story.load.accepted)} accepted")
    rows, heads = await stored_rows(story.dev)
    judge_store(story.load, rows, heads)
    judge_devices(story.load, story.devices, rows)
    for device in story.devices:
        last = 0
        for connection in device.connections:
            seqs = [seq for _, _, seq in connection.receipts]
            assert not seqs or seqs[0] == last + 1, f"{device.name} resumed at {seqs[0]} after {last}"
            assert all(b == a + 1 for a, b in pairwise(seqs)), f"{device.name} has a gap"
            last = seqs[-1] if seqs else last
