"""`python -m tests.chaos`: break the whole system on purpose and judge what it did meanwhile.

Exit status: 0 no promise was broken, 1 one was (the folder says which), 2 the run itself failed.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

from tests.chaos.checker import judge, violations
from tests.chaos.faults import FAULTS, GROUPS, chosen
from tests.chaos.history import load
from tests.chaos.report import write_report


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    commands = top.add_subparsers(dest="command", metavar="COMMAND")
    run = commands.add_parser("run", help="start a system, break it, judge it")
    run.add_argument("--seed", type=int, default=None, help="of every choice; default: drawn and printed")
    run.add_argument("--duration", type=float, default=600.0, help="seconds of faults (default 600)")
    run.add_argument(
        "--faults",
        default="all",
        help="names and groups, comma-separated; -name leaves one out (default all)",
    )
    run.add_argument("--rate", type=float, default=50.0, help="operations offered a second (default 50)")
    run.add_argument("--report", type=Path, default=None, help="folder for history and report")
    run.add_argument("--short", action="store_true", help="shrunk timeouts, short faults")
    run.add_argument("--pairs", type=float, default=0.25, help="share of faults two at once (default 0.25)")
    run.add_argument("--count", type=int, default=0, help="stop after so many faults")
    run.add_argument("--keep-data", action="store_true", help="leave databases and logs of the system there")
    check = commands.add_parser("check", help="judge a history again")
    check.add_argument("folder", type=Path, help="folder of a run")
    commands.add_parser("list", help="names of the faults")
    return top


def main(argv: list[str]) -> int:
    """Do what the command line says."""
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        argv = ["run", *argv]
    options = parser().parse_args(argv)
    if options.command == "list":
        for kind in FAULTS.values():
            print(f"{kind.name:<26} {kind.says}")
        print(f"groups: {', '.join(GROUPS)}")
        return 0
    if options.command == "check":
        return verdict(options.folder)
    try:
        kinds = chosen(options.faults)
    except ValueError as exc:
        print(f"chaos: {exc}", file=sys.stderr)
        return 2
    import uvloop

    from tests.chaos.runner import Options, Run

    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(1_000_000)
    folder = options.report or Path(".carillon/chaos") / f"{time.strftime('%Y%m%d-%H%M%S')}-{seed}"
    print(f"chaos: seed {seed}, {len(kinds)} kinds of faults, {options.duration:g} s", flush=True)
    # PostgreSQL's unprivileged user must be able to enter it, and Ray's sockets have long names.
    data = Path(tempfile.mkdtemp(prefix="chaos-"))
    run = Run(
        Options(
            seed, options.duration, kinds, options.rate, folder.absolute(), options.short,
            (0.3, 1.0) if options.short else (1.0, 4.0), options.pairs, options.count,
        ),
        data,
        lambda text: print(f"chaos: {text}", flush=True),
    )  # fmt: skip
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(run.run())
    except Exception:
        traceback.print_exc()
        print(f"chaos: the run failed; seed {seed}, data in {data}", file=sys.stderr)
        return 2
    code = verdict(folder)
    if code or options.keep_data:
        logs = folder / "logs"
        logs.mkdir(exist_ok=True)
        for log in [data / "up.log", *data.glob("up/*/*.log"), *data.glob("up/*.log")]:
            shutil.copy(log, logs / log.name)
    if options.keep_data:
        print(f"chaos: data in {data}")
    else:
        run.plant.postgres.remove()
        shutil.rmtree(data, ignore_errors=True)
    return code


def verdict(folder: Path) -> int:
    """Judge a folder's history, write the report, print the summary."""
    facts, verdicts = judge(load(folder / "history.jsonl"))
    summary = write_report(folder, facts, verdicts)
    print(summary)
    found = violations(verdicts)
    print(f"chaos: {len(found)} violations; report: {folder / 'report.md'}", flush=True)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
