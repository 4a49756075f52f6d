"""`python -m cluster up`, run as a user runs it: a process, its ports, its files, its end.

The tests of this module share one data folder and run in order: a system that is used, killed, started
again, and stopped.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import jwt
import pytest
from websockets.sync.client import connect

from cluster.processes import free_port
from cluster.ray_env import ROOT

pytestmark = pytest.mark.timeout(900)

START_S = 200.0
"""A start takes 15 s alone on two cores; the machine may be busy with other suites."""


def related(folder: Path) -> dict[int, str]:
    """Every process that names `folder` in its command line, environment or working directory."""
    found: dict[int, str] = {}
    needle = str(folder).encode()
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        process = Path("/proc") / name
        try:
            state = (process / "stat").read_text().rpartition(")")[2].split()[0]
            command = (process / "cmdline").read_bytes()
            text = command + b"\n" + (process / "environ").read_bytes()
            text += b"\n" + os.fsencode(os.readlink(process / "cwd"))
        except OSError:
            continue
        if needle in text and state not in "ZX":
            found[int(name)] = command.replace(b"\0", b" ").decode(errors="replace")[:100]
    return found


def wait_until(check: Any, timeout_s: float, what: str) -> Any:
    """Poll `check` until it returns something true."""
    deadline = time.monotonic() + timeout_s
    while True:
        answer = check()
        if answer:
            return answer
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}; last: {answer!r}"
        time.sleep(0.05)


@dataclass
class Installation:
    """A data folder with the ports that its runs use."""

    folder: Path
    ports: list[int] = field(default_factory=lambda: [free_port() for _ in range(3)])
    process: subprocess.Popen[bytes] | None = None

    @property
    def dev_file(self) -> Path:
        return self.folder / "dev.json"

    def run(self) -> dict[str, Any]:
        """Start `up` without a terminal and with stdin closed; return dev.json once it is there."""
        http, direct, ws = self.ports
        with (self.folder / "out").open("ab") as out:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "cluster", "up", "--data-dir", str(self.folder)),
                    *("--http-port", str(http), "--direct-port", str(direct), "--ws-port", str(ws)),
                ],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

        def ready() -> bool:
            assert self.process is not None
            assert self.process.poll() is None, self.said()
            return self.dev_file.exists()

        wait_until(ready, START_S, "dev.json")
        return json.loads(self.dev_file.read_text())

    def stop(self) -> None:
        """End it as Ctrl-C does; by force if that takes too long."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.send_signal(signal.SIGTERM)
                self.process.wait(60)

    def said(self) -> str:
        return (self.folder / "out").read_text()


@pytest.fixture(scope="module")
def installation(service_folder: Path) -> Iterator[Installation]:
    folder = service_folder / "up"
    folder.mkdir()
    place = Installation(folder)
    yield place
    place.stop()


@pytest.fixture(scope="module")
def dev(installation: Installation) -> dict[str, Any]:
    """dev.json of the first run."""
    return installation.run()


def post(url: str, dev: dict[str, Any], body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        f"{url}/v1/events",
        data=json.dumps(body).encode(),
        headers={"Authorization": f"Bearer {dev['apiKey']}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert answer.status == 202
        return json.loads(answer.read())


def token(dev: dict[str, Any], user: str) -> str:
    claims = {"sub": user, "tenant": dev["tenant"], "exp": int(time.time()) + 600}
    return jwt.encode(claims, dev["clientSecret"], algorithm="HS256")


def feed(dev: dict[str, Any], user: str) -> list[dict[str, Any]]:
    request = urllib.request.Request(
        f"{dev['directUrl']}/v1/users/{user}/notifications",
        headers={"Authorization": f"Bearer {dev['apiKey']}"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())["notifications"]


def test_dev_json_names_everything(installation: Installation, dev: dict[str, Any]) -> None:
    """dev.json has every promised name, in the promised form, and is for its owner only."""
    assert set(dev) == {
        *("httpUrl", "directUrl", "wsUrl", "apiKey", "tenant", "clientSecret", "postgresDsn", "redisUrl"),
        *("fcmUrl", "apnsUrl", "fcmReceivedUrl", "apnsReceivedUrl", "demoUrl"),
    }
    assert all(dev.values())
    http, direct, ws = installation.ports
    assert dev["httpUrl"] == f"http://127.0.0.1:{http}"
    assert dev["directUrl"] == f"http://127.0.0.1:{direct}"
    assert dev["wsUrl"] == f"ws://127.0.0.1:{ws}/ws"
    assert dev["tenant"] == "demo"
    assert stat.S_IMODE(installation.dev_file.stat().st_mode) == 0o600


def test_secrets_are_for_their_owner_only(installation: Installation, dev: dict[str, Any]) -> None:
    """No file with a key, token or password can be read by others."""
    folder = installation.folder
    files = [folder / name for name in ("secret", "ray_token", "api_key", "run.json")]
    files += [
        folder / "postgres" / "password",
        folder / "valkey" / "password",
        folder / "valkey" / "valkey.conf",
    ]
    files += list((folder / "credentials").iterdir())
    for path in files:
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


@pytest.mark.parametrize("door", ["httpUrl", "directUrl"])
def test_event_reaches_the_websocket(dev: dict[str, Any], door: str) -> None:
    """An event posted through either door arrives at the user's open socket."""
    user = f"socket-{door}"
    with connect(f"{dev['wsUrl']}?token={token(dev, user)}", open_timeout=60) as socket_:
        assert json.loads(socket_.recv(timeout=60))["type"] == "WELCOME"
        socket_.send('{"type":"PING"}')
        assert json.loads(socket_.recv(timeout=60))["type"] == "PONG"
        answer = post(dev[door], dev, {"userId": user, "type": "t", "title": "to the socket"})
        assert answer["status"] == "delivered"
        frame = json.loads(socket_.recv(timeout=60))
        assert frame["type"] == "NEW_NOTIFICATION"
        assert frame["notification"]["id"] == answer["id"]


def test_event_reaches_a_stream_and_a_poll(dev: dict[str, Any]) -> None:
    """The own door streams and holds polls; Serve's route says that this is where they are."""

    def get(url: str, path: str) -> Any:
        headers = {"Authorization": f"Bearer {token(dev, 'streamer')}"}
        return urllib.request.urlopen(urllib.request.Request(url + path, headers=headers), timeout=60)

    def frame(stream: Any) -> dict[str, Any]:
        while not (line := stream.readline()).startswith(b"data: "):
            assert line, "the stream has ended"
        return json.loads(line[6:])

    with get(dev["directUrl"], "/api/stream") as stream:
        welcome = frame(stream)
        assert welcome["type"] == "WELCOME"
        answer = post(dev["httpUrl"], dev, {"userId": "streamer", "type": "t", "title": "to the stream"})
        assert answer["status"] == "delivered"
        assert frame(stream)["notification"]["id"] == answer["id"]
        path = f"/api/sync?epoch={welcome['epoch']}&since=1&rev=1&waitS=30"
        with ThreadPoolExecutor(1) as pool:
            poll = pool.submit(lambda: json.loads(get(dev["directUrl"], path).read()))
            answer = post(dev["httpUrl"], dev, {"userId": "streamer", "type": "t", "title": "to both"})
            assert [one["id"] for one in poll.result(20)["notifications"]] == [answer["id"]]
    for path in ("/api/stream", "/api/sync?since=0&waitS=5"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            get(dev["httpUrl"], path)
        assert refused.value.code == 404
        assert dev["directUrl"] in json.loads(refused.value.read())["detail"]
        refused.value.close()


@pytest.mark.parametrize("door", ["httpUrl", "directUrl"])
def test_an_import_is_stored_while_it_is_read(dev: dict[str, Any], door: str) -> None:
    """Through either door: what was sent first is in the feed before the stream has ended."""

    def line(n: int) -> bytes:
        return json.dumps({"userId": f"{door}-{n}", "type": "t", "title": "imported"}).encode() + b"\n"

    def lines() -> Iterator[bytes]:
        for n in range(3000):
            yield line(n)
        wait_until(lambda: feed(dev, f"{door}-0"), 60, "the first line in the feed")
        yield json.dumps({"userIds": [f"{door}-0", f"{door}-1"], "type": "t", "title": "last"}).encode()

    headers = {"Authorization": f"Bearer {dev['apiKey']}", "X-Request-Disconnect-Disabled": "?1"}
    with httpx.Client(trust_env=False, timeout=120) as http:
        answer = http.post(f"{dev[door]}/v1/events/import", content=lines(), headers=headers)
    told = answer.json()
    assert (told["complete"], told["lines"], told["accepted"]) == (True, 3001, 3002), told
    assert [one["title"] for one in feed(dev, f"{door}-0")] == ["last", "imported"]


@pytest.mark.parametrize(("user", "received"), [("alice", "fcmReceivedUrl"), ("bob", "apnsReceivedUrl")])
def test_offline_user_gets_a_push(dev: dict[str, Any], user: str, received: str) -> None:
    """An event for a demo user without a socket arrives at the local provider of the user's phone."""
    answer = post(dev["httpUrl"], dev, {"userId": user, "type": "t", "title": "to the phone"})
    assert answer["status"] == "queued"

    def pushed() -> bool:
        with urllib.request.urlopen(dev[received], timeout=60) as reply:
            pushes = json.loads(reply.read())["pushes"]
        return any(push["notificationId"] == answer["id"] for push in pushes)

    wait_until(pushed, 20, f"the push at {received}")


def test_the_clients_command_line_needs_no_arguments(
    installation: Installation, dev: dict[str, Any], tmp_path: Path
) -> None:
    """Beside .carillon/dev.json `carillon` sends, tails and asks for presence without URLs or keys."""
    (tmp_path / ".carillon").symlink_to(installation.folder)
    cli = [sys.executable, "-m", "carillon_client"]
    tail = subprocess.Popen([*cli, "tail", "cleo", "--json"], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    try:

        def run(*arguments: str) -> str:
            done = subprocess.run(
                [*cli, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=180, check=False
            )
            assert done.returncode == 0, done.stderr
            return done.stdout

        wait_until(lambda: run("presence", "cleo").startswith("cleo active"), 30, "cleo's presence")
        sent = json.loads(run("send", "cleo", "to the terminal", "--json"))
        assert sent["status"] == "delivered"
        assert tail.stdout is not None
        assert json.loads(tail.stdout.readline())["notification"]["id"] == sent["id"]
        tail.send_signal(signal.SIGINT)
        assert tail.wait(20) == 0
    finally:
        if tail.poll() is None:
            tail.kill()
        tail.communicate()


def test_no_log_and_no_command_line_has_a_secret(installation: Installation, dev: dict[str, Any]) -> None:
    """After all that was done here: nothing that Carillon, Ray or the stores wrote names a credential."""
    leaky = token(dev, "leaky")
    with connect(f"{dev['wsUrl']}?token={leaky}", open_timeout=60) as socket_:
        socket_.recv(timeout=60)
    for door in ("httpUrl", "directUrl"):
        for path in (f"/api/notifications?token={leaky}", f"/nowhere?ticket={leaky}"):
            for credential in (leaky, leaky[:-4], dev["apiKey"], dev["apiKey"][:-1]):
                asked = urllib.request.Request(
                    dev[door] + path, headers={"Authorization": f"Bearer {credential}"}
                )
                try:
                    urllib.request.urlopen(asked, timeout=60).close()
                except urllib.error.HTTPError as refused:
                    refused.close()
    secrets = {
        "API key": dev["apiKey"],
        "client secret": dev["clientSecret"],
        "client token": leaky,
        "signature": leaky.rsplit(".", 1)[1],
        "Postgres password": urlsplit(dev["postgresDsn"]).password,
        "Valkey password": urlsplit(dev["redisUrl"]).password,
        "cluster secret": (installation.folder / "secret").read_text().strip(),
        "Ray token": (installation.folder / "ray_token").read_text().strip(),
    }
    logs = [installation.folder / "out", *installation.folder.rglob("*.log")]
    for top in ("logs", "ray-logs"):
        for folder, _, names in os.walk(installation.folder / top, followlinks=True):
            logs += [Path(folder) / name for name in names]
    assert len(logs) > 20, "Ray's logs are found"
    for path in logs:
        if not path.is_file():
            continue
        said = path.read_bytes()
        for name, secret in secrets.items():
            assert secret, name
            assert secret.encode() not in said, f"{name} in {path}"
    for pid, command in related(installation.folder).items():
        try:
            line = (Path("/proc") / str(pid) / "cmdline").read_bytes()
        except OSError:
            continue
        for name, secret in secrets.items():
            assert secret is not None
            assert secret.encode() not in line, f"{name} in the command line of {command}"


def test_second_up_is_refused(installation: Installation, dev: dict[str, Any]) -> None:
    """Another `up` in the same folder ends with a sentence that names the process that has it."""
    assert installation.process is not None
    done = subprocess.run(
        [sys.executable, "-m", "cluster", "up", "--data-dir", str(installation.folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 1
    assert f"process {installation.process.pid}" in done.stderr
    assert installation.dev_file.exists(), "the refused run removed the running one's dev.json"


def listening(folder: Path) -> dict[int, str]:
    """The TCP ports on which processes of an installation listen, with who does."""
    inodes: dict[str, int] = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                inodes[f"socket:[{fields[9]}]"] = int(fields[1].rsplit(":", 1)[1], 16)
    found: dict[int, str] = {}
    for pid, command in related(folder).items():
        try:
            for fd in os.listdir(f"/proc/{pid}/fd"):
                port = inodes.get(os.readlink(f"/proc/{pid}/fd/{fd}"))
                if port is not None:
                    found[port] = command
        except OSError:
            continue
    return found


def test_two_systems_on_one_machine(
    installation: Installation, dev: dict[str, Any], service_folder: Path
) -> None:
    """Another `up` whose ports are 0 starts beside one that runs: they share no port, and each has its own
    events only."""
    other = Installation(service_folder / "beside", ports=[0, 0, 0])
    other.folder.mkdir()
    try:
        beside = other.run()
        for door in ("httpUrl", "directUrl"):
            assert beside[door] != dev[door]
            for mine, title in ((dev, "here"), (beside, "there")):
                post(mine[door], mine, {"userId": "between", "type": "t", "title": title})
        assert [one["title"] for one in feed(dev, "between")] == ["here", "here"]
        assert [one["title"] for one in feed(beside, "between")] == ["there", "there"]
        ours, theirs = listening(installation.folder), listening(other.folder)
        assert len(ours) > 10
        assert {port: (ours[port], theirs[port]) for port in ours.keys() & theirs.keys()} == {}
    finally:
        other.stop()
    assert related(other.folder) == {}


def test_status_lists_the_actors(installation: Installation, dev: dict[str, Any]) -> None:
    """`status` sees the running system: every slot has an owner and nothing is missing."""
    done = subprocess.run(
        [sys.executable, "-m", "cluster", "status", "--json", "--data-dir", str(installation.folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    shards = [m for m in facts["coordinator"]["members"] if m["kind"] == "shard"]
    assert sum(shard["slots"] for shard in shards) == 1024
    assert facts["coordinator"]["missing"] == []
    assert not [name for name, actor in facts["actors"].items() if "error" in actor]


def test_postgres_that_is_killed_comes_back(installation: Installation, dev: dict[str, Any]) -> None:
    """SIGKILL of PostgreSQL is survived: what was accepted is there, and events are taken again."""
    before = post(dev["directUrl"], dev, {"userId": "carol", "type": "t", "title": "before"})
    killed = postmaster(installation)
    assert killed is not None
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: postmaster(installation) not in (None, killed), 60, "another PostgreSQL")

    def accepted() -> dict[str, Any] | None:
        try:
            return post(dev["directUrl"], dev, {"userId": "carol", "type": "t", "title": "after"})
        except OSError:  # 503 with Retry-After until the pools have connected again
            return None

    def stored() -> list[str]:
        try:
            return [item["id"] for item in feed(dev, "carol")]
        except OSError:
            return []

    after = wait_until(accepted, 60, "an accepted event")
    ids = wait_until(stored, 60, "the feed")
    assert before["id"] in ids
    assert after["id"] in ids


def postmaster(installation: Installation) -> int | None:
    """Process id of the PostgreSQL that is ready, if one is."""
    try:
        lines = (Path(data_folder(installation)) / "postmaster.pid").read_text().splitlines()
    except FileNotFoundError:
        return None
    return int(lines[0]) if len(lines) >= 8 and lines[7].strip() == "ready" else None


def data_folder(installation: Installation) -> str:
    marker = installation.folder / "postgres" / "location"
    home = marker.read_text().strip() if marker.exists() else str(installation.folder / "postgres")
    return f"{home}/data"


def test_killed_run_does_not_hinder_the_next(installation: Installation, dev: dict[str, Any]) -> None:
    """After kill -9 of `up`, the next one starts, has the same key, and everything that was accepted."""
    assert installation.process is not None
    installation.process.kill()
    installation.process.wait()
    installation.dev_file.unlink()  # the killed one could not: wait for that of the next
    again = installation.run()
    assert again["apiKey"] == dev["apiKey"]
    assert again["clientSecret"] == dev["clientSecret"]
    assert {item["title"] for item in feed(again, "carol")} == {"before", "after"}
    assert post(again["httpUrl"], again, {"userId": "carol", "type": "t", "title": "third"})["seq"] >= 3


def test_ctrl_c_leaves_nothing_behind(installation: Installation) -> None:
    """SIGINT ends everything: status 0, no process, no dev.json, ports free."""
    assert installation.process is not None
    assert len(related(installation.folder)) > 10, "the search finds the running system"
    installation.process.send_signal(signal.SIGINT)
    assert installation.process.wait(90) == 0, installation.said()
    assert related(installation.folder) == {}
    assert not installation.dev_file.exists()
    for port in installation.ports:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))


def test_sigterm_while_starting(service_folder: Path) -> None:
    """SIGTERM in the middle of a start ends what runs by then: status 0, no process, no trace of an error."""
    installation = Installation(service_folder / "interrupted")
    installation.folder.mkdir()
    with (installation.folder / "out").open("ab") as out:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "cluster", "up", "--data-dir", str(installation.folder)),
                *("--http-port", "0", "--direct-port", "0", "--ws-port", "0"),
            ],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_until(lambda: "connected to Ray" in installation.said(), START_S, "Ray")
        process.terminate()
        assert process.wait(90) == 0, installation.said()
    finally:
        process.kill()
        process.wait()
    assert "Traceback" not in installation.said()
    assert related(installation.folder) == {}
    assert not installation.dev_file.exists()


def test_taken_port_is_named(service_folder: Path) -> None:
    """A port in use ends `up` at once with a sentence that names the port, its holder and the way out."""
    folder = service_folder / "taken"
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        done = subprocess.run(
            [
                *(sys.executable, "-m", "cluster", "up", "--data-dir", str(folder)),
                *("--http-port", "0", "--direct-port", "0", "--ws-port", str(port)),
            ],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
    assert done.returncode == 1
    assert f"port {port} for WebSockets is taken by process {os.getpid()}" in done.stdout + done.stderr
    assert "--ws-port" in done.stdout + done.stderr
    assert related(folder) == {}
