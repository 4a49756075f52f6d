"""Tables, JSON, Markdown, the machine, and the comparison with a baseline."""

from __future__ import annotations

import math
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from benchmarks.bench import Measurement
from benchmarks.stats import change_percent, flatten, median_tree

COMPARED: Final = re.compile(
    r"(end_to_end_ms|post_ms|push_ms|welcome_ms|feed_ms|count_ms|search_ms|read_frame_ms|read_post_ms)\.(p50|p99)$"
    r"|_per_s$|all_welcome_s$|\.pss$|cpu_s_per_1000\.total$"
)
"""Metrics that are compared with the baseline; p999 and max of a short run are noise."""
_FORMAT = 2
"""Version of the JSON document."""


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    cpu = re.search(r"^model name\s*:\s*(.+)$", _text("/proc/cpuinfo"), re.MULTILINE)
    memory = re.search(r"^MemTotal:\s+(\d+) kB", _text("/proc/meminfo"), re.MULTILINE)
    return {
        "cpu": cpu[1] if cpu else platform.processor() or "unknown",
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{int(memory[1]) / 1024 / 1024:.0f} GiB" if memory else "unknown",
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "ray": _version("ray"),
        "uvloop": _version("uvloop"),
        "asyncpg": _version("asyncpg"),
        "commit": _commit(),
    }


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _commit() -> str:
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty"],  # noqa: S607
            cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return found.stdout.strip() or "unknown"


def combine(repeats: Sequence[Measurement]) -> dict[str, Any]:
    """One scenario's repeats as a JSON-able document: medians of the metrics, and every verdict.

    One wrong repeat makes the scenario wrong: a median of verdicts would hide a rare loss.
    """
    first = repeats[0]
    metrics = median_tree([repeat.metrics for repeat in repeats])
    if "memory_per_connection_kb" in first.metrics:
        # Later repeats fill memory that earlier ones left behind: only the first shows what one costs.
        metrics["memory_per_connection_kb"] = first.metrics["memory_per_connection_kb"]
    worst = next((repeat for repeat in repeats if not repeat.verdict.ok), repeats[-1])
    return {
        "name": first.name,
        "title": first.title,
        "repeats": len(repeats),
        "metrics": metrics,
        "ok": all(repeat.verdict.ok for repeat in repeats),
        "verdict": worst.verdict.sentence(),
        "verdicts": [repeat.verdict.as_json() for repeat in repeats],
        "notes": list(dict.fromkeys(note for repeat in repeats for note in repeat.notes)),
    }


def document(results: Sequence[Mapping[str, Any]], run: Mapping[str, Any]) -> dict[str, Any]:
    """The whole run, as written by --json and --save-baseline."""
    return {"format": _FORMAT, "run": dict(run), "machine": machine(), "results": list(results)}


def compare(results: Sequence[Mapping[str, Any]], baseline: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Compared metrics that both runs have: `{scenario, metric, before, now, worse}` (worse in percent)."""
    if not baseline or baseline.get("format") != _FORMAT:
        return []
    old = {result["name"]: flatten(result["metrics"]) for result in baseline["results"]}
    rows = []
    for result in results:
        for metric, value in flatten(result["metrics"]).items():
            before = old.get(result["name"], {}).get(metric)
            if before is None or not COMPARED.search(metric):
                continue
            worse = change_percent(metric, before, value)
            if worse is not None:
                rows.append(
                    {
                        "scenario": result["name"],
                        "metric": metric,
                        "before": before,
                        "now": value,
                        "worse": worse,
                    }
                )
    return rows


def number(value: float) -> str:
    """Three significant digits, thousands apart: "0.95", "12.3", "15,900"."""
    if math.isnan(value):
        return "-"
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits}f}"


def _latency_cells(result: Mapping[str, Any], key: str) -> list[str]:
    found = result["metrics"].get(key) or {}
    return [number(found[name]) if name in found else "-" for name in ("p50", "p99", "p999")]


def _throughput(result: Mapping[str, Any]) -> str:
    metrics = result["metrics"]
    if "events_per_s" in metrics:
        return f"{number(metrics['events_per_s'])} events/s"
    if "users_per_s" in metrics:
        return f"{number(metrics['users_per_s'])} users/s"
    if "reads_per_s" in metrics:
        return f"{number(metrics['reads_per_s'])} reads/s"
    if "connections_per_s" in metrics:
        return f"{number(metrics['connections_per_s'])} connections/s"
    return "-"


_READS: Final = {
    "first_feed_ms": "first page, first read of a user",
    "first_count_ms": "unread count, first read of a user",
    "feed_ms": "first page",
    "count_ms": "unread count",
    "many_feed_ms": "first page, all connections at once",
    "many_count_ms": "unread count, all connections at once",
    "first_search_ms": "first search in a long feed (its words are indexed)",
    "search_ms": "search, users drawn by notification",
    "search_long_ms": "search in long feeds",
    "search_middle_ms": "search in middle feeds",
    "search_short_ms": "search in short feeds",
    "read_frame_ms": "MARK_READ to frame on another device",
    "read_post_ms": "POST /api/notifications/read to frame on another device",
}


def _details(result: Mapping[str, Any]) -> list[str]:
    """Sentences for what does not fit the table."""
    metrics, lines = result["metrics"], []
    lines.extend(
        f"{what}: p50 {number(metrics[key]['p50'])} ms, p99 {number(metrics[key]['p99'])} ms "
        f"({metrics[key]['n']:,.0f})"
        for key, what in _READS.items()
        if metrics.get(key, {}).get("n")
    )
    if "cpu_s_per_1000_reads" in metrics:
        spent = {k: v for k, v in metrics["cpu_s_per_1000_reads"].items() if k != "total"}
        lines.append(
            f"CPU s per 1,000 reads: {number(metrics['cpu_s_per_1000_reads']['total'])} in all; "
            + ", ".join(f"{name} {number(value)}" for name, value in spent.items() if value >= 0.0005)
        )
        lines.append(f"statements in PostgreSQL for each read: {number(metrics['statements_per_read'])}")
    if (push := metrics.get("push_ms", {})).get("n"):
        lines.append(
            f"push: {number(push['n'])} at the provider, p50 {number(push['p50'])} ms, "
            f"p99 {number(push['p99'])} ms, {number(metrics['pushes_per_s'])} pushes/s"
        )
    if "all_welcome_s" in metrics:
        waits = metrics["welcome_ms"]
        lines.append(
            f"all WELCOME after {number(metrics['all_welcome_s'])} s; "
            f"dial to WELCOME p50 {number(waits['p50'])} ms, p99 {number(waits['p99'])} ms"
        )
        lines.extend(
            f"memory per connection, {name}: {number(kinds['pss'])} KiB PSS, {number(kinds['rss'])} KiB RSS"
            for name, kinds in metrics["memory_per_connection_kb"].items()
        )
    if "cpu_s_per_1000" in metrics:
        spent = {k: v for k, v in metrics["cpu_s_per_1000"].items() if k != "total"}
        lines.append(
            f"CPU s per 1,000 deliveries: {number(metrics['cpu_s_per_1000']['total'])} in all; "
            + ", ".join(f"{name} {number(value)}" for name, value in spent.items() if value >= 0.0005)
        )
        lines.append(
            f"cores used {number(metrics['cores_used'])}, at rest {number(metrics['cores_used_idle'])}; load "
            f"generator {number(metrics['load_generator_cpu_s_per_1000'])} s per 1,000"
        )
    if (late := metrics.get("late_ms", {})).get("n"):
        lines.append(
            f"schedules late by p50 {number(late['p50'])} ms, p99 {number(late['p99'])} ms, "
            f"at most {number(late['max'])} ms ({late['n']:,.0f})"
        )
        lines.extend(
            f"events {name}: p50 {number(part['p50'])} ms, p99 {number(part['p99'])} ms ({part['n']:,.0f})"
            for name in ("before", "meanwhile")
            if (part := metrics[f"{name}_ms"]).get("n")
        )
    if "users_alone_per_s" in metrics:
        lines += _broadcast(metrics)
    if (lag := metrics.get("send_lag_ms", {})).get("n"):
        lines.append(
            f"load generator late by p50 {number(lag['p50'])} ms, p99 {number(lag['p99'])} ms (included)"
        )
    lines.extend(result["notes"])
    return lines


def _broadcast(metrics: Mapping[str, Any]) -> list[str]:
    def told(part: Mapping[str, Any]) -> str:
        found = part["end_to_end_ms"]
        return (
            f"p50 {number(found['p50'])} ms, p99 {number(found['p99'])} ms, p999 {number(found['p999'])} ms"
        )

    spent = {k: v for k, v in metrics["cpu_s_per_1000_users"].items() if k != "total"}
    return [
        f"stored beside single events {number(metrics['users_per_s'])} users/s, alone "
        f"{number(metrics['users_alone_per_s'])} users/s",
        f"single events before: {told(metrics['idle'])}",
        f"single events meanwhile: {told(metrics['meanwhile'])}; p99 times {number(metrics['p99_ratio'])}",
        f"CPU s per 1,000 users alone: {number(metrics['cpu_s_per_1000_users']['total'])} in all; "
        + ", ".join(f"{name} {number(value)}" for name, value in spent.items() if value >= 0.0005),
    ]


_HEAD: Final = ("", "scenario", "e2e p50", "p99", "p999", "POST p50", "p99", "p999", "throughput")


def _rows(results: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    return [
        [
            result["name"],
            result["title"],
            *_latency_cells(result, "end_to_end_ms"),
            *_latency_cells(result, "post_ms"),
            _throughput(result),
        ]
        for result in results
    ]


def table(results: Sequence[Mapping[str, Any]], compared: Sequence[Mapping[str, Any]] = ()) -> str:
    """For the terminal; latencies in ms."""
    rows = [list(_HEAD), *_rows(results)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]

    def line(row: list[str]) -> str:
        cells = [
            cell.ljust(width) if column in {0, 1} else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    lines = [line(rows[0]), "  ".join("-" * width for width in widths)]
    for result, row in zip(results, rows[1:], strict=True):
        lines.append(line(row))
        lines.append(f"    {'✓' if result['ok'] else '✗'} {result['verdict']}")
        for verdict in result["verdicts"]:
            lines.extend(f"        {example}" for example in verdict["examples"][:10])
        lines.extend(f"    {detail}" for detail in _details(result))
    if compared:
        lines.append("")
        lines.append("compared with the baseline (+ is worse):")
        lines.extend(
            f"  {row['scenario']} {row['metric']:<34} {number(row['before']):>9} -> {number(row['now']):>9}  "
            f"{row['worse']:+.0f} %"
            for row in compared
        )
    return "\n".join(lines)


def markdown(whole: Mapping[str, Any]) -> str:
    """The same for docs/reference/benchmarks.md, with machine and seed."""
    facts, run = whole["machine"], whole["run"]
    lines = [
        f"Measured on {run['date']}, commit {facts['commit']}: {facts['cores']} cores ({facts['cpu']}), "
        f"{facts['memory']}, {facts['kernel']}, Python {facts['python']}, Ray {facts['ray']}, "
        f"uvloop {facts['uvloop']}. "
        f"Load generator on the same machine. Door: {run['door']}. Seed {run['seed']}, "
        f"{run['repeat']} repeat{'s' if run['repeat'] != 1 else ''} (medians). Latencies in ms.",
        "",
        "| | scenario | e2e p50 | p99 | p999 | POST p50 | p99 | p999 | throughput | verdict |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for result, row in zip(whole["results"], _rows(whole["results"]), strict=True):
        lines.append(f"| {' | '.join(row)} | {result['verdict']} |")
    for result in whole["results"]:
        details = _details(result)
        if details:
            lines += [
                "",
                f"**{result['name']}** {result['title']}",
                "",
                *(f"- {detail}" for detail in details),
            ]
    return "\n".join(lines) + "\n"
