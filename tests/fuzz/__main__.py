"""`python -m tests.fuzz`: attack gateway, door and frames for a time, or repeat one seed of the gateway's.

Half of the time goes to the gateway's sockets; then pytest runs what hypothesis and schemathesis generate,
with as many examples as fit into about the other half.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz.arena import Arena, Finding, rss_bytes

BATCH = 400
"""Attacks of one seed; after each the system is judged."""
EXAMPLES_PER_S = 1.0
GENERATED = (
    "tests/integration/test_fuzz.py", "tests/integration/test_door_abuse.py",
    "tests/integration/test_http_schema.py", "tests/integration/test_every_door.py",
)  # fmt: skip
GROWTH_BYTES = 48 * 2**20
"""What memory may grow by over a whole run, however long, after the first batches."""


def main() -> int:
    """Parse arguments and run."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long (default 60)")
    parser.add_argument("--sockets-only", action="store_true", help="leave the HTTP door and hypothesis out")
    parser.add_argument("--seed", type=int, help="run this one seed only")
    parser.add_argument("--seed-from", type=int, default=1, metavar="N", help="the first seed (default 1)")
    args = parser.parse_args()
    # Imported late: the tests' fixtures build their servers with it, too.
    from cluster.embedded import EmbeddedPostgres
    from stores.postgres.migrate import migrate

    folder = Path(tempfile.mkdtemp(prefix="carillon-fuzz-"))
    folder.chmod(0o711)
    with EmbeddedPostgres(folder / "postgres", fast=True) as server:
        asyncio.run(migrate(server.dsn))
        try:
            asyncio.run(attack(server.dsn, args))
        except Finding as found:
            print(found)
            print("repeat: python -m tests.fuzz --seed N")
            return 1
    if args.sockets_only or args.seed is not None:
        return 0
    examples = max(60, int(args.seconds * EXAMPLES_PER_S))
    print(f"{examples} examples of each kind for frames, the HTTP door and its routes")
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--timeout=0", *GENERATED],
        env={**os.environ, "FUZZ_EXAMPLES": str(examples)},
        check=False,
    ).returncode


async def attack(dsn: str, args: argparse.Namespace) -> None:
    """Run seeds until the time is over."""
    async with Arena(dsn) as arena:
        began = time.monotonic()
        seed = args.seed if args.seed is not None else args.seed_from
        sizes: list[int] = []
        while True:
            await arena.run(seed, BATCH)
            sizes.append(rss_bytes())
            seed += 1
            if args.seed is not None or time.monotonic() - began > args.seconds / 2:
                break
        took_s = time.monotonic() - began
        print(f"{arena.done.total()} attacks in {took_s:.1f} s, {len(sizes)} seeds, nothing found")
        print("attacks:", ", ".join(f"{name} {n}" for name, n in sorted(arena.done.items())))
        print("ended by:", ", ".join(f"{code} {n}" for code, n in arena.codes.most_common()))
        print(
            f"memory: {sizes[0] / 2**20:.1f} MiB after the first seed, {sizes[-1] / 2**20:.1f} after the last"
        )
        if len(sizes) > 3 and sizes[-1] - sizes[2] > GROWTH_BYTES:
            raise Finding(f"memory grew from {sizes[2]} to {sizes[-1]} bytes")


if __name__ == "__main__":
    sys.exit(main())
