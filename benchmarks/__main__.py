"""`python -m benchmarks`: measures a Carillon that runs, or one that it starts itself.

Exit codes: 0 measured and correct; 1 a promise was broken (lost, duplicated, out of order, not stored, ...)
or a scenario failed; 2 wrong usage or no system; 3 slower than --fail-if-worse allows; 130 interrupted.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import uvloop

from benchmarks import report
from benchmarks.bench import Measurement, Options, Progress
from benchmarks.scenarios import DESTRUCTIVE, SCENARIOS
from benchmarks.target import ROOT, OwnSystem, Target, TargetError
from benchmarks.wire import get_json

BASELINE = Path(__file__).with_name("baseline.json")
QUICK: dict[str, Any] = {
    "users": 50,
    "duration_s": 2.0,
    "sequential_events": 200,
    "offline_events": 200,
    "storm_connections": 500,
    "presence_users": 200,
    "presence_queries": 30,
    "stored_notifications": 20_000,
    "kills": 2,
    "broadcast_users": 5_000,
    "schedules": 200,
    "warmup_events": 50,
}
"""--quick: shows that everything works; the figures of so short a run mean little."""


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    what = "\n".join(
        f"  {name}  {(run.__doc__ or '').split(': ', 1)[1].splitlines()[0]}"
        for name, run in SCENARIOS.items()
    )
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure Carillon and check, event by event, that what was measured was also correct.",
        epilog=f"scenarios:\n{what}\n\n{(__doc__ or '').split(chr(10) * 2, 1)[1]}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "scenarios",
        nargs="*",
        metavar="SCENARIO",
        type=str.upper,
        help="S1 ... S10, B1, C1, D1, R1, F1 ... F3; none: all but B, F and those that kill without --start",
    )
    where = parser.add_argument_group("the system")
    where.add_argument(
        "--dev-json", type=Path, default=ROOT / ".carillon/dev.json", help="of a running system"
    )
    where.add_argument("--start", action="store_true", help="start a system of our own, stop it at the end")
    where.add_argument(
        "--door", choices=("direct", "serve"), default="direct", help="HTTP entrance (default: direct)"
    )
    load = parser.add_argument_group("the load (defaults in brackets)")
    default = Options()
    load.add_argument("--seed", type=int, default=default.seed, help=f"[{default.seed}]")
    load.add_argument(
        "--repeat", type=int, default=1, metavar="N", help="runs of each scenario; medians are shown [1]"
    )
    load.add_argument("--quick", action="store_true", help="a few seconds each; does it work?")
    for name, kind, text in (
        ("users", int, "users that events go to"),
        ("devices", int, "sockets of each online user"),
        ("duration-s", float, "seconds of S2, S3; S4 and S7 take twice, S10 18 times as long"),
        ("concurrency", int, "HTTP connections"),
        ("batch", int, "events of a batch"),
        ("rate-per-s", float, "events per second of S4, S7, S9, S10 and D1"),
        ("ack-s", float, "seconds between a device's acknowledgements; 0 never acknowledges"),
        ("sequential-events", int, "events of S1"),
        ("offline-events", int, "events of S5"),
        ("idle-s", float, "seconds that the connections of S6 rest, to measure what heart-beats cost"),
        ("storm-connections", int, "connections of S6 and S8"),
        ("kills", int, "shards that S9 kills, one after the other"),
        ("broadcast-users", int, "users that B1 puts into Postgres and sends to"),
        ("schedules", int, "schedules of D1"),
        ("stored-notifications", int, "notifications that F1 and F2 put into Postgres"),
    ):
        now = getattr(default, name.replace("-", "_"))
        load.add_argument(f"--{name}", type=kind, default=None, metavar="N", help=f"{text} [{now}]")
    load.add_argument(
        "--no-stored-check", action="store_true", help="do not look every id up in Postgres or the feed"
    )
    out = parser.add_argument_group("the report")
    out.add_argument("--json", type=Path, metavar="FILE", help="write everything as JSON")
    out.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables, with machine and seed")
    out.add_argument("--baseline", type=Path, default=BASELINE, metavar="FILE", help="compare with this run")
    out.add_argument("--save-baseline", action="store_true", help="make this run the baseline")
    out.add_argument(
        "--fail-if-worse", type=float, metavar="PERCENT", help="exit 3 if a compared figure is worse by more"
    )
    out.add_argument("--quiet", action="store_true", help="no progress on stderr")
    return parser


def make_options(arguments: argparse.Namespace) -> Options:
    """The scenario options of a command line."""
    values: dict[str, Any] = dict(QUICK) if arguments.quick else {}
    for name in Options.__dataclass_fields__:
        given = getattr(arguments, name, None)
        if given is not None:
            values[name] = given
    # Users of every run are new: their seqs start at 1, and a second run on the same data is not confused.
    return Options(**values, run=secrets.token_hex(3), check_stored=not arguments.no_stored_check)


async def measure(
    target: Target,
    options: Options,
    names: Sequence[str],
    repeat: int,
    progress: Progress,
    results: list[dict[str, Any]],
) -> None:
    """Run scenarios one after the other, into `results`; one that breaks is reported and the next goes on."""
    # The storm first: memory that other scenarios left behind would be counted as free.
    for name in sorted(names, key=lambda name: name != "S6"):
        runs: list[Measurement] = []
        try:
            for turn in range(repeat):
                progress.line(
                    f"{name} {turn + 1}/{repeat}: {(SCENARIOS[name].__doc__ or '').splitlines()[0]}",
                    last=True,
                )
                runs.append(
                    await SCENARIOS[name](target, replace(options, run=f"{options.run}{turn}"), progress)
                )
        except (OSError, TimeoutError, TargetError) as exc:
            progress.line(f"{name} failed: {exc}", last=True)
            results.append(failed(name, f"FAILED: {type(exc).__name__}: {exc}"))
            continue
        results.append(report.combine(runs))


def failed(name: str, verdict: str) -> dict[str, Any]:
    """The result of a scenario that could not be run."""
    return {
        "name": name,
        "title": (SCENARIOS[name].__doc__ or "").splitlines()[0].split(": ", 1)[1].rstrip("."),
        "repeats": 0,
        "metrics": {},
        "ok": False,
        "verdict": verdict,
        "verdicts": [],
        "notes": [],
    }


async def run(arguments: argparse.Namespace) -> int:
    """Find or start the system, measure, report."""
    # B1 and F1 to F3 only when they are named: they fill the database, which stays filled.
    names = arguments.scenarios or [
        name for name in SCENARIOS if name[0] not in "BF" and (arguments.start or name not in DESTRUCTIVE)
    ]
    options = make_options(arguments)
    progress = Progress(arguments.quiet)
    own: OwnSystem | None = None
    results: list[dict[str, Any]] = []
    try:
        if arguments.start:
            own = OwnSystem(Path(tempfile.mkdtemp(prefix="carillon-bench-")))
            progress.line(f"starting a system in {own.runtime_dir}", last=True)
            target = await own.start()
        else:
            target = Target.load(arguments.dev_json)
            try:
                await get_json(target.http_door(options.door), "/healthz")
            except OSError as exc:
                raise TargetError(
                    f"the system of {arguments.dev_json} does not answer ({exc}); is it up?"
                ) from exc
        await measure(target, options, names, arguments.repeat, progress, results)
        results.sort(key=lambda result: names.index(result["name"]))
    except asyncio.CancelledError:
        if results:
            print(report.table(results))
        raise
    finally:
        if own is not None:
            progress.line("stopping the system", last=True)
            own.stop()
            if results and all(result["ok"] for result in results):
                shutil.rmtree(own.runtime_dir, ignore_errors=True)
            else:
                progress.line(f"its logs are kept in {own.runtime_dir}", last=True)
    whole = report.document(
        results,
        {
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "door": options.door,
            "seed": options.seed,
            "repeat": arguments.repeat,
            "quick": arguments.quick,
            "options": {
                name: getattr(options, name) for name in Options.__dataclass_fields__ if name != "run"
            },
        },
    )
    baseline = None
    with contextlib.suppress(FileNotFoundError):
        baseline = json.loads(arguments.baseline.read_text())
    compared = report.compare(results, baseline)
    print(report.table(results, compared))
    facts = whole["machine"]
    print(
        f"\n{facts['cores']} cores ({facts['cpu']}), {facts['memory']}, {facts['kernel']}, "
        f"Python {facts['python']}, Ray {facts['ray']}; commit {facts['commit']}; "
        f"door {options.door}, seed {options.seed}"
    )
    for path, text in (
        (arguments.json, json.dumps(whole, indent=1) + "\n"),
        (arguments.markdown, report.markdown(whole)),
        (arguments.baseline if arguments.save_baseline else None, json.dumps(whole, indent=1) + "\n"),
    ):
        if path is not None:
            path.write_text(text)
    if not all(result["ok"] for result in results):
        return 1
    if arguments.fail_if_worse is not None and any(
        row["worse"] > arguments.fail_if_worse for row in compared
    ):
        return 3
    return 0


def main(argv: list[str] | None = None) -> int:
    """Parse, run, and turn what happened into an exit code."""
    parser = make_parser()
    arguments = parser.parse_args(argv)
    unknown = [name for name in arguments.scenarios if name not in SCENARIOS]
    if unknown or arguments.repeat < 1:
        parser.error(f"unknown scenario {unknown[0]}" if unknown else "--repeat must be at least 1")
    # SIGTERM ends like Ctrl-C, so that a system we started is stopped in both cases.
    signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(run(arguments))
    except TargetError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
