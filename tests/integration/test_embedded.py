"""The servers that `make up` brings along: started, stopped, killed, and put in difficult places."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest
import redis

from carillon.errors import ClusterError
from cluster.embedded import EmbeddedPostgres, EmbeddedValkey
from cluster.processes import alive, read_process
from cluster.ray_env import ROOT
from tests.support import eventually

pytestmark = pytest.mark.timeout(600)


async def value_of(dsn: str, query: str) -> object:
    connection = await asyncpg.connect(dsn)
    try:
        return await connection.fetchval(query)
    finally:
        await connection.close()


@pytest.fixture
def place(service_folder: Path) -> Iterator[Path]:
    """A folder that PostgreSQL's user can enter, removed afterwards."""
    folder = service_folder / f"place-{os.urandom(4).hex()}"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


async def test_each_test_has_a_migrated_database(postgres_dsn: str) -> None:
    """The fixture's database carries the whole schema and is empty."""
    assert await value_of(postgres_dsn, "select count(*) from streams") == 0
    assert str(await value_of(postgres_dsn, "show server_version")).startswith("18.")


def test_each_test_has_an_empty_valkey(redis_url: str) -> None:
    """The fixture's Valkey is empty."""
    with redis.Redis.from_url(redis_url) as client:
        assert client.dbsize() == 0


async def test_commits_are_durable_by_default(place: Path) -> None:
    """Outside fast mode a commit waits for the disk, and data survives SIGKILL and a new start."""
    server = EmbeddedPostgres(place / "pg")
    async with server:
        assert await value_of(server.dsn, "show synchronous_commit") == "on"
        assert await value_of(server.dsn, "show fsync") == "on"
        assert await value_of(server.dsn, "show full_page_writes") == "on"
        connection = await asyncpg.connect(server.dsn)
        await connection.execute("create table kept (n int)")
        await connection.execute("insert into kept values (7)")
        server.kill()
        connection.terminate()
        await server.restart_async()
        assert await value_of(server.dsn, "select n from kept") == 7


async def test_password_is_needed_and_private(place: Path) -> None:
    """Without the password nobody gets in, and only its owner can read it."""
    async with EmbeddedPostgres(place / "pg", fast=True) as server:
        assert stat.S_IMODE((place / "pg" / "password").stat().st_mode) == 0o600
        with pytest.raises(asyncpg.InvalidPasswordError):
            await value_of(server.dsn.replace(server.password, "guess"), "select 1")
        with socket.socket() as outside:
            outside.settimeout(2)
            address = outward_address()
            if address != "127.0.0.1":
                with pytest.raises(OSError):
                    outside.connect((address, server.port))


def outward_address() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


async def test_lost_password_file_is_replaced(place: Path) -> None:
    """If the password file is lost the data is not: a new password is set."""
    server = EmbeddedPostgres(place / "pg", fast=True)
    async with server:
        before = server.password
    (place / "pg" / "password").unlink()
    async with server:
        assert server.password != before
        assert await value_of(server.dsn, "select 1") == 1


async def test_server_never_runs_as_root(place: Path) -> None:
    """The postmaster belongs to an unprivileged user when we are root, else to us."""
    async with EmbeddedPostgres(place / "pg", fast=True) as server:
        owner = os.stat(f"/proc/{server.pid}").st_uid
        assert owner != 0
        if os.getuid() != 0:
            assert owner == os.getuid()


@pytest.mark.skipif(os.getuid() != 0, reason="only root has folders that PostgreSQL's user cannot enter")
async def test_closed_parent_folder(place: Path) -> None:
    """Below a folder that PostgreSQL's user cannot enter, the data goes elsewhere, and stays there."""
    closed = place / "closed"
    closed.mkdir(mode=0o700)
    server = EmbeddedPostgres(closed / "pg", fast=True)
    try:
        async with server:
            await value_of(server.dsn, "create table kept (n int)")
            assert server.data.parent == Path((closed / "pg" / "location").read_text().strip())
            assert server.data.parent.parent == Path("/var/tmp")
            assert stat.S_IMODE(closed.stat().st_mode) == 0o700, "the folder was opened"
        closed.chmod(0o755)  # no reason to leave the data behind
        async with server:
            assert await value_of(server.dsn, "select count(*) from kept") == 0
    finally:
        server.remove()
    assert not server.data.parent.exists()


async def test_taken_port_is_named(place: Path) -> None:
    """A fixed port in use is refused with a sentence that names it, its holder, and the setting."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        for server, setting in (
            (EmbeddedPostgres(place / "pg", port=port, fast=True), "CARILLON_POSTGRES_EMBEDDED_PORT"),
            (EmbeddedValkey(place / "valkey", port=port, fast=True), "CARILLON_REDIS_EMBEDDED_PORT"),
        ):
            with pytest.raises(ClusterError) as refused:
                await server.start_async()
            assert f"port {port}" in str(refused.value)
            assert f"process {os.getpid()}" in str(refused.value)
            assert setting in str(refused.value)


async def test_one_run_per_folder(place: Path) -> None:
    """A second server on the same folder is refused; after the first has ended it is not."""
    first, second = EmbeddedValkey(place / "v", fast=True), EmbeddedValkey(place / "v", fast=True)
    async with first:
        with pytest.raises(ClusterError, match="another run uses"):
            await second.start_async()
    async with second:
        pass


async def test_stale_pid_file_of_a_stranger(place: Path) -> None:
    """A postmaster.pid whose number now belongs to another process does not hinder the start."""
    server = EmbeddedPostgres(place / "pg", fast=True)
    async with server:
        pass
    sleeper = subprocess.Popen(
        ["sleep", "600"], user=os.stat(server.data).st_uid if os.getuid() == 0 else None
    )
    try:
        (server.data / "postmaster.pid").write_text(f"{sleeper.pid}\n{server.data}\n1\n5432\n\n127.0.0.1\n")
        async with server:
            assert await value_of(server.dsn, "select 1") == 1
        assert sleeper.poll() is None, "the stranger was ended"
    finally:
        sleeper.kill()
        sleeper.wait()


def test_interrupted_initialisation_is_repeated(place: Path) -> None:
    """What a crash in the middle of the first start leaves behind counts as nothing."""
    (place / "pg" / "data.new").mkdir(parents=True)
    (place / "pg" / "data.new" / "PG_VERSION").write_text("18\n")
    with EmbeddedPostgres(place / "pg", fast=True) as server:
        assert server.pid is not None


OWNER = """
import sys, time
from cluster.embedded import EmbeddedPostgres, EmbeddedValkey
pg, kv = EmbeddedPostgres(sys.argv[1] + "/pg", fast=True).start(), EmbeddedValkey(sys.argv[1] + "/kv").start()
print(pg.pid, kv.pid, flush=True)
time.sleep(600)
"""


async def test_servers_do_not_outlive_their_owner(place: Path) -> None:
    """After SIGKILL of the process that started them, both servers end by themselves."""
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(place)], cwd=ROOT, stdout=subprocess.PIPE)
    assert owner.stdout is not None
    try:
        line = await asyncio.to_thread(owner.stdout.readline)
        servers = [info.id for word in line.split() if (info := read_process(int(word)))]
        assert len(servers) == 2
        assert all(alive(server) for server in servers)
    finally:
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        owner.stdout.close()
    await eventually(lambda: not any(alive(server) for server in servers), 60, "both servers end")


async def test_valkey_keeps_its_data(place: Path) -> None:
    """Outside fast mode what was written is there after a stop and a start; the password is needed."""
    server = EmbeddedValkey(place / "v")
    async with server:
        with redis.Redis.from_url(server.url) as client:
            client.set("kept", "7")
        with redis.Redis(port=server.port) as stranger, pytest.raises(redis.AuthenticationError):
            stranger.get("kept")
        command = Path(f"/proc/{server.pid}/cmdline").read_bytes()
        assert server.password.encode() not in command
    async with server:
        with redis.Redis.from_url(server.url) as client:
            assert client.get("kept") == b"7"


async def test_both_servers_stop_quickly(place: Path) -> None:
    """A stop ends the process and gives the port back, with a client still connected."""
    server = EmbeddedPostgres(place / "pg", fast=True)
    await server.start_async()
    connection = await asyncpg.connect(server.dsn)
    pid = server.pid
    assert pid is not None
    await asyncio.wait_for(server.stop_async(), 15)
    assert read_process(pid) is None
    connection.terminate()
