"""`python -m tests.simulation`: run many seeds, or one with its trace."""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections import Counter

from tests.simulation.checks import summary
from tests.simulation.scenario import simulate


def main() -> int:
    """Parse arguments and run."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000, help="how many seeds (default 1000)")
    parser.add_argument("--seed-from", type=int, default=1, metavar="N", help="the first seed (default 1)")
    parser.add_argument("--seed", type=int, help="run this one seed only")
    parser.add_argument("--trace", action="store_true", help="with --seed: tell everything that happens")
    parser.add_argument(
        "--seconds", type=float, default=0.0, help="stop after so long, whatever --seeds says"
    )
    parser.add_argument("--keep-going", action="store_true", help="do not stop at the first failing seed")
    args = parser.parse_args()
    if args.seed is not None:
        world = simulate(args.seed, tracing=args.trace)
        print("\n".join(world.trace))
        return report(args.seed, world.violations)
    return many(args)


def many(args: argparse.Namespace) -> int:
    """Run seeds one after the other."""
    total: Counter[str] = Counter()
    began, began_cpu = time.monotonic(), time.process_time()
    failed = done = 0
    gc.disable()
    for seed in range(args.seed_from, args.seed_from + args.seeds):
        world = simulate(seed)
        total += summary(world)
        done += 1
        if world.violations:
            failed += 1
            report(seed, world.violations)
            if not args.keep_going:
                break
        del world
        if done % 20 == 0:
            gc.collect()
        if args.seconds and time.monotonic() - began > args.seconds:
            break
    took_s, cpu_s = time.monotonic() - began, time.process_time() - began_cpu
    print(f"{done} seeds from {args.seed_from} in {took_s:.1f} s, {failed} failed")
    print(f"{done / cpu_s * 60:.0f} a minute of one core")
    print(", ".join(f"{name} {count}" for name, count in sorted(total.items())))
    return 1 if failed else 0


def report(seed: int, violations: list[str]) -> int:
    """Tell what a seed broke."""
    if not violations:
        print(f"seed {seed}: nothing is wrong")
        return 0
    print(f"seed {seed}: {len(violations)} violations")
    for violation in violations:
        print(f"  {violation}")
    print(f"  repeat: python -m tests.simulation --seed {seed} --trace")
    return 1


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":
        # Sets of names must be walked in the same order in every run of a seed.
        os.execve(
            sys.executable,
            [sys.executable, "-m", "tests.simulation", *sys.argv[1:]],
            {**os.environ, "PYTHONHASHSEED": "0"},
        )
    sys.exit(main())
