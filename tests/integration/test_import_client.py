"""The command `carillon import`, against the whole system."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

from tests.integration.client_world import ClientWorld

ROOT = Path(__file__).resolve().parent.parent.parent


async def run(world: ClientWorld, *arguments: str) -> tuple[int, str, str]:
    """Run the client's command line; its status, stdout and stderr."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CARILLON_")}
    environment |= {
        "CARILLON_URL": world.url,
        "CARILLON_API_KEY": world.key,
        "PYTHONPATH": str(ROOT / "clients/python/src"),
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "carillon_client", *arguments, env=environment,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, err = await asyncio.wait_for(process.communicate(), 60)
    return process.returncode or 0, out.decode(), err.decode()


async def test_a_file_sent_twice_is_stored_once(postgres_dsn: str, tmp_path: Path) -> None:
    """The lines are stored, those that are wrong are told, and the same file again changes nothing."""
    file = tmp_path / "events.ndjson"
    lines = [json.dumps({"userId": f"u{n % 7}", "type": "t", "title": f"n{n}"}) for n in range(1200)]
    lines[3] = "{"
    file.write_text("\n".join(lines))
    async with ClientWorld(postgres_dsn) as world:
        status, out, err = await run(world, "import", str(file))
        assert (status, out) == (3, "1,199 of 1,200 events accepted (1,199 stored)\n")
        assert err.startswith("carillon: line 4: the line is not JSON")
        assert await world.stored("u1") == [f"n{n}" for n in range(1200) if n % 7 == 1]
        status, out, _ = await run(world, "import", str(file), "--json")
        told = json.loads(out)
        assert (status, told["accepted"], told["replayed"], told["failed"]) == (3, 1199, 1199, 1)
        assert await world.count("true") == 1199
        world.http.swallow = 1
        other = tmp_path / "other.ndjson"
        other.write_text("\n".join(lines[4:20]))
        status, out, _ = await run(world, "import", str(other))
        assert (status, await world.count("true")) == (0, 1215)
