"""The command line as a process: output, exit status, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from client_kit import KEY, FakeServer, Socket, until

CLI = [sys.executable, "-m", "carillon_client"]


def environment(**more: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("CARILLON_")}
    return {**clean, "PYTHONUNBUFFERED": "1", **more}


def run(*arguments: str, folder: Path, stdin: str = "", **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*CLI, *arguments], cwd=folder, input=stdin, capture_output=True, text=True, timeout=120, check=False,
        env=environment(**more),
    )  # fmt: skip


@pytest.fixture
def given(fake: FakeServer) -> dict[str, str]:
    return {"CARILLON_URL": fake.url, "CARILLON_WS_URL": fake.ws_url, "CARILLON_API_KEY": KEY}


async def three(socket: Socket) -> None:
    await socket.welcome(0)
    for seq in (1, 2, 3):
        await socket.notify(seq)
    await socket.send({"type": "NOTIFICATION_ARCHIVED", "notificationId": "e1-1", "rev": 9})
    await socket.read()


@pytest.mark.parametrize("command", [[], ["send"], ["import"], ["tail"], ["presence"]])
def test_help_helps(command: list[str], tmp_path: Path) -> None:
    """Every --help has a description and at least one example or the exit status."""
    done = run(*command, "--help", folder=tmp_path)
    assert done.returncode == 0
    assert "Example" in done.stdout or "130 interrupted" in done.stdout


def test_send(fake: FakeServer, given: dict[str, str], tmp_path: Path) -> None:
    """One event with its options; the line says what became of it, --json in one object."""
    done = run("send", "ada", "Hi", "--priority", "high", "--data", '{"a": 1}', folder=tmp_path, **given)
    assert (done.returncode, done.stdout) == (0, "id-1 stored (seq 1, in_app)\n")
    assert fake.store.order == [
        {"userId": "ada", "type": "message", "title": "Hi", "priority": "high", "data": {"a": 1}}
    ]
    assert fake.requests[0][2]["authorization"] == f"Bearer {KEY}"
    done = run("send", "a,b", "Hi", "--json", folder=tmp_path, **given)
    assert [json.loads(line)["userId"] for line in done.stdout.splitlines()] == ["a", "b"]


def test_send_from_stdin(fake: FakeServer, given: dict[str, str], tmp_path: Path) -> None:
    """Lines of stdin are events; a bad one is told, fails no other, and makes the exit status 3."""
    lines = "".join(json.dumps({"userId": "u", "type": "t", "title": t}) + "\n" for t in ("a", 5, "c"))
    done = run("send", "-", "--json", folder=tmp_path, stdin=lines, **given)
    assert done.returncode == 3
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert ["error" in one for one in told] == [False, True, False]
    assert told[1]["error"]["code"] == "invalid"
    assert "not sent" in done.stderr


def test_wrong_command_lines(given: dict[str, str], tmp_path: Path) -> None:
    """Exit status 2 and a sentence, no traceback."""
    for arguments in (
        ("send", "ada"), ("send", "ada", "x", "--data", "5"), ("tail",), ("presence",), ("send", "-", "x"),
        ("tail", "u", "--count", "0"), ("presence", "u", "--timeout", "-1"),
    ):  # fmt: skip
        done = run(*arguments, folder=tmp_path, **given)
        assert done.returncode == 2, arguments
        assert "Traceback" not in done.stderr
        assert "expected" in done.stderr or "required" in done.stderr or "come from stdin" in done.stderr
    done = run("send", "-", folder=tmp_path, stdin="{", **given)
    assert done.returncode == 2
    assert "line 1" in done.stderr
    assert "no API key" in run("presence", "u", folder=tmp_path).stderr


def test_failures_are_one_sentence(fake: FakeServer, given: dict[str, str], tmp_path: Path) -> None:
    """Exit status 1: refused by the server, or nobody there."""
    done = run("presence", "u", folder=tmp_path, **given)
    assert (done.returncode, done.stdout) == (1, "")
    assert "404 not_found" in done.stderr
    done = run(
        "send",
        "u",
        "x",
        "--timeout",
        "0.2",
        folder=tmp_path,
        **{**given, "CARILLON_URL": "http://127.0.0.1:1"},
    )
    assert done.returncode == 1
    assert "gave up" in done.stderr
    assert "Traceback" not in done.stderr


def test_dev_json_is_found_and_its_key_stays_home(fake: FakeServer, tmp_path: Path) -> None:
    """In a folder below .carillon/dev.json nothing needs to be given; another URL does not get its key."""
    (tmp_path / ".carillon").mkdir()
    facts = {"httpUrl": fake.url, "wsUrl": fake.ws_url, "apiKey": KEY}
    (tmp_path / ".carillon" / "dev.json").write_text(json.dumps(facts))
    below = tmp_path / "below"
    below.mkdir()
    assert run("send", "ada", "Hi", folder=below).returncode == 0
    done = run("send", "ada", "Hi", "--url", fake.url, folder=below)
    assert done.returncode == 2
    assert len(fake.requests) == 1


def test_presence(fake: FakeServer, given: dict[str, str], tmp_path: Path) -> None:
    """A line for each user, in the order asked."""
    devices = [{"deviceId": "web\x1b[2J", "attention": "focused", "since": "x"}]
    users: list[Any] = [
        {"userId": "ada", "status": "active", "devices": devices, "lastSeenAt": None},
        {"userId": "bob", "status": "offline", "devices": [], "lastSeenAt": "2026-01-01T00:00:00.000Z"},
    ]
    fake.answers["POST", "/v1/presence/query"] = (200, {"users": users})
    done = run("presence", "ada", "bob", folder=tmp_path, **given)
    assert done.stdout.splitlines() == [
        "ada active (web�[2J focused)", "bob offline (last seen 2026-01-01T00:00:00.000Z)",
    ]  # fmt: skip
    done = run("presence", "ada", "bob", "--json", folder=tmp_path, **given)
    assert [json.loads(line)["status"] for line in done.stdout.splitlines()] == ["active", "offline"]


def test_tail_until_ctrl_c(fake: FakeServer, given: dict[str, str], tmp_path: Path) -> None:
    """Lines come as notifications do; Ctrl-C ends it with 0, without a traceback, everything acknowledged."""
    fake.sockets = [three]
    fake.answers["POST", "/v1/tokens"] = (201, {"token": "minted", "expiresAt": "x"})
    process = subprocess.Popen(
        [*CLI, "tail", "ada", "--changes"], cwd=tmp_path, env=environment(**given), text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(4)]
    assert lines[0] == "2026-01-01T00:00:00.000Z [t] n1\n"
    assert lines[3] == "NOTIFICATION_ARCHIVED e1-1\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out, err) == (0, "", "")
    assert fake.opened[0].headers["Authorization"] == "Bearer minted"
    # On whichever connection: a handshake that took too long is tried again.
    acked = {"e1-1", "e1-2", "e1-3"}
    until(lambda: {one for socket in fake.opened for one in socket.acked()} == acked)


def test_tail_keeps_its_position(fake: FakeServer, given: dict[str, str], tmp_path: Path) -> None:
    """--position-file: the second run asks for what follows the first."""
    fake.sockets = [three]
    arguments = ("tail", "--token", "t", "--json", "--position-file", "pos")
    done = run(*arguments, "--count", "2", folder=tmp_path, **given)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["notification"]["addedLater"] for line in done.stdout.splitlines()] == [1, 1]
    assert json.loads((tmp_path / "pos").read_text())["lastSeq"] == 2
    run(*arguments, "--count", "1", "--msgpack", folder=tmp_path, **given)
    assert "lastSeq=2" in fake.opened[1].path
    assert fake.opened[1].binary


def test_tail_that_is_refused_fails(fake: FakeServer, given: dict[str, str], tmp_path: Path) -> None:
    """A revoked token: exit status 1 and a sentence."""

    async def refuse(socket: Socket) -> None:
        await socket.close(4001)

    fake.sockets = [refuse]
    done = run("tail", "--token", "t", folder=tmp_path, **given)
    assert done.returncode == 1
    assert "not authenticated" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_closed_pipe_is_no_error(fake: FakeServer, given: dict[str, str], tmp_path: Path) -> None:
    """`carillon ... | head` ends without a traceback."""
    users = [{"userId": "u" * 200, "status": "offline"}] * 1000
    fake.answers["POST", "/v1/presence/query"] = (200, {"users": users})
    process = subprocess.Popen(
        [*CLI, "presence", "u"],
        cwd=tmp_path,
        env=environment(**given),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(10) == 0
