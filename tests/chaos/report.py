"""The report of a run: Markdown for people, JSON for programs. Pure but for writing the two files."""

from __future__ import annotations

import collections
import json
import statistics
from pathlib import Path
from typing import Any

from tests.chaos.checker import CLAIMS, Verdict
from tests.chaos.facts import Facts, Fault

SHOWN = 10
"""Violations of one guarantee that are shown with their operations; the JSON has all."""
MARGIN_S = 5.0
"""What counts as before and after a fault."""


def rate(times: list[float], start: float, end: float) -> float:
    """Events a second in [start, end)."""
    if end <= start:
        return 0.0
    return sum(start <= at < end for at in times) / (end - start)


def longest_gap(times: list[float], start: float, end: float) -> float:
    """Longest pause between events that ends in (start, end]."""
    previous, longest = start, 0.0
    for at in sorted(times):
        if start < at <= end:
            longest = max(longest, at - previous)
            previous = at
    return max(longest, end - previous)


def fault_row(facts: Facts, fault: Fault, answered: list[float], received: list[float]) -> dict[str, Any]:
    """Numbers of one fault."""
    healed = fault.healed if fault.healed is not None else facts.end
    recovered = fault.recovered if fault.recovered is not None else None
    end = recovered if recovered is not None else facts.end
    return {
        "number": fault.number,
        "name": fault.name,
        "detail": fault.detail,
        "start": fault.start,
        "healed": healed,
        "recovered": recovered,
        "before": rate(answered, fault.start - MARGIN_S, fault.start),
        "during": rate(answered, fault.start, max(healed, fault.start + 1.0)),
        "after": rate(answered, end, end + MARGIN_S),
        "gapAnswers": longest_gap(answered, fault.start, end),
        "gapReceipts": longest_gap(received, fault.start, end),
        "recoveryS": None if recovered is None else recovered - healed,
    }


def document(facts: Facts, verdicts: dict[str, Verdict]) -> dict[str, Any]:
    """Everything the report says."""
    answered = [entry.record["end"] for entry in facts.accepted]
    receipts = [e["t"] for c in facts.connections.values() for e in c.events if e["op"] == "receive"]
    recovered = [
        e for c in facts.connections.values() if c.dialled["position"] for e in c.events
        if e["op"] == "welcome" and e["recovered"] is True
    ]  # fmt: skip
    outcomes = collections.Counter(record["outcome"] for record in facts.publishes)
    states = collections.Counter(d["state"] for ds in facts.deliveries.values() for d in ds)
    pushes = sum(len(each) for each in facts.pushes.values())
    extra = 0
    for each in facts.pushes.values():
        extra += sum(n - 1 for n in collections.Counter(push["target"] for push in each).values())
    unneeded = sum(
        1 for one, each in facts.pushes.items() if one in facts.acked and facts.acked[one] < each[0]["t"]
    )
    return {
        "seed": facts.run["seed"],
        "seconds": facts.end,
        "rate": facts.run.get("rate"),
        "timings": facts.run.get("timings"),
        "short": facts.run.get("short"),
        "ok": not any(verdict.violations for verdict in verdicts.values()),
        "counts": {
            "requests": len(facts.publishes),
            "outcomes": dict(outcomes),
            "refusals": dict(
                collections.Counter(str(r["status"]) for r in facts.publishes if r["outcome"] == "refused")
            ),
            "acknowledgedEvents": len({entry.id for entry in facts.accepted}),
            "rows": len(facts.rows),
            "users": len(facts.streams),
            "connections": len(facts.connections),
            "resumes": len(recovered),
            "receipts": len(receipts),
            "acknowledged": len(facts.acked),
            "pushes": pushes,
            "pushesBeyondTheFirst": extra,
            "pushesAfterAnAcknowledgement": unneeded,
            "outbox": dict(states),
            "attempts": dict(
                collections.Counter(a["outcome"] for each in facts.attempts.values() for a in each)
            ),
            "presenceAnswers": len(facts.presences),
            "feedsRead": len(facts.feeds),
        },
        "faults": [fault_row(facts, fault, answered, receipts) for fault in facts.faults],
        "verdicts": {
            name: {
                "claim": CLAIMS[name],
                "checked": verdict.checked,
                "violations": [
                    {"rule": v.rule, "text": v.text, "at": v.at, "evidence": v.evidence}
                    for v in verdict.violations
                ],
            }
            for name, verdict in verdicts.items()
        },
    }


def _seconds(value: float | None) -> str:
    return "never" if value is None else f"{value:.1f}"


def timeline(facts: Facts, columns: int = 100) -> list[str]:
    """Events answered and received over time, with the faults under them, as text."""
    if not facts.accepted:
        return []
    answered = [entry.record["end"] for entry in facts.accepted]
    start = min(answered)
    width = max(1.0, (facts.end - start) / columns)
    marks = " .:-=+*#%@"

    def bar(times: list[float]) -> str:
        counts = [0] * (columns + 1)
        for at in times:
            if at >= start:
                counts[min(columns, int((at - start) / width))] += 1
        top = max(counts) or 1
        return "".join(marks[min(9, (count * 9 + top - 1) // top)] for count in counts)

    receipts = [e["t"] for c in facts.connections.values() for e in c.events if e["op"] == "receive"]
    pushes = [push["t"] for each in facts.pushes.values() for push in each]
    broken = ["." for _ in range(columns + 1)]
    for fault in facts.faults:
        last = int((min(fault.end, facts.end) - start) / width)
        for column in range(int((fault.start - start) / width), min(columns, last) + 1):
            if 0 <= column <= columns:
                broken[column] = chr(ord("a") + (fault.number - 1) % 26)
    return [
        f"answered {bar(answered)}",
        f"received {bar(receipts)}",
        f"pushed   {bar(pushes)}",
        f"faults   {''.join(broken)}",
        f"one column: {width:.1f} s; the faults a, b, ... are numbers 1, 2, ... of the table",
    ]


def markdown(facts: Facts, verdicts: dict[str, Verdict], facts_document: dict[str, Any]) -> str:
    """The report for people."""
    counts = facts_document["counts"]
    word = "no violation" if facts_document["ok"] else "VIOLATIONS"
    lines = [
        f"# Chaos run, seed {facts.run['seed']}: {word}",
        "",
        f"{facts.end:.0f} s, {len(facts.faults)} faults, {facts.run.get('rate'):g} operations"
        f" offered a second to {counts['users']} users;"
        f" {'shrunk' if facts.run.get('short') else 'default'} timeouts.",
        "",
        "| guarantee | examined | violations | claim |",
        "|---|--:|--:|---|",
    ]
    for name, verdict in verdicts.items():
        found = len(verdict.violations)
        lines.append(f"| {name} | {verdict.checked} | {found or 'none'} | {CLAIMS[name]} |")
    lines += ["", "## What happened", "", "| | |", "|---|---|"]
    for name, value in counts.items():
        shown = ", ".join(f"{key}: {number}" for key, number in sorted(value.items())) if isinstance(
            value, dict
        ) else value  # fmt: skip
        lines.append(f"| {name} | {shown} |")
    lines += ["", "```text", *timeline(facts), "```", "", "## Faults", ""]
    lines += [
        "Events answered a second before, during and after; longest pause of answers and of receipts"
        " anywhere;"
        " seconds from healing until events reached every device and both providers again (and what was"
        " killed ran); of two faults at once both times count from the healing of each.",
        "",
        "| # | at | fault | before | during | after | no answer | no receipt | recovered |",
        "|--:|--:|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in facts_document["faults"]:
        lines.append(
            f"| {row['number']} | {row['start']:.0f} s | {row['name']} ({row['detail']}) |"
            f" {row['before']:.0f} | {row['during']:.0f} | {row['after']:.0f} |"
            f" {row['gapAnswers']:.1f} s | {row['gapReceipts']:.1f} s |"
            f" {_seconds(row['recoveryS'])} s |"
        )
    times = [row["recoveryS"] for row in facts_document["faults"] if row["recoveryS"] is not None]
    if times:
        lines += ["", f"Recovery: median {statistics.median(times):.1f} s, longest {max(times):.1f} s."]
    for name, verdict in verdicts.items():
        if not verdict.violations:
            continue
        lines += ["", f"## {name}: {len(verdict.violations)} violations", ""]
        for violation in verdict.violations[:SHOWN]:
            when = "" if violation.at is None else f"{violation.at:.2f} s, "
            around = [
                fault.name for fault in facts.faults
                if violation.at is not None and fault.start <= violation.at <= fault.end + MARGIN_S
            ]  # fmt: skip
            lines.append(f"- {when}{violation.rule}: {violation.text}" + (
                f" (during {', '.join(around)})" if around else ""
            ))  # fmt: skip
            lines += [f"    - `{json.dumps(record)[:600]}`" for record in violation.evidence[:6]]
        if len(verdict.violations) > SHOWN:
            lines.append(f"- and {len(verdict.violations) - SHOWN} more, in report.json")
    return "\n".join(lines) + "\n"


def write_report(folder: Path, facts: Facts, verdicts: dict[str, Verdict]) -> str:
    """Write report.md and report.json; returns the summary for the terminal."""
    facts_document = document(facts, verdicts)
    text = markdown(facts, verdicts, facts_document)
    (folder / "report.md").write_text(text)
    (folder / "report.json").write_text(json.dumps(facts_document, indent=1))
    lines = [f"{'guarantee':<10} {'examined':>9} {'violations':>10}  claim"]
    for name, verdict in verdicts.items():
        lines.append(f"{name:<10} {verdict.checked:>9} {len(verdict.violations):>10}  {CLAIMS[name]}")
        lines += [f"           {violation.rule}: {violation.text}" for violation in verdict.violations[:3]]
    return "\n".join(lines)
