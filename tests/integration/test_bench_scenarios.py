"""The scenarios run against a small system, and its mistakes are found."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as command
from benchmarks import report
from benchmarks.bench import Measurement, Options, Progress
from benchmarks.scenarios import SCENARIOS
from benchmarks.target import Target, TargetError
from tests.integration.fake_system import FakeSystem, Faults
from tests.integration.ingress_world import World

SMALL = Options(
    users=6,
    devices=2,
    ack_s=0.01,
    sequential_events=40,
    duration_s=0.3,
    concurrency=4,
    batch=20,
    batch_connections=2,
    rate_per_s=200,
    offline_events=42,  # seven for each of the six users, three of whom are offline
    storm_connections=30,
    storm_timeout_s=10.0,
    presence_users=20,
    presence_queries=5,
    schedules=40,
    schedule_seconds=1,
    schedule_ahead_s=1.5,
    warmup_events=10,
    receipt_timeout_s=0.05,
    settle_s=0.2,
    linger_s=0.05,
)


async def measure(name: str, faults: Faults | None = None, **changes: Any) -> tuple[Measurement, FakeSystem]:
    """Run one scenario against a fake system with these faults."""
    async with FakeSystem(faults or Faults()) as fake:
        options = Options(**{**asdict(SMALL), **changes})
        return await SCENARIOS[name](fake.target, options, Progress(quiet=True)), fake


@pytest.mark.parametrize("name", ["S1", "S2", "S3", "S4", "S7"])
async def test_a_right_system_is_found_right(name: str) -> None:
    """Nothing lost, repeated or late in order: ok, with latencies and all ids stored and acknowledged."""
    measurement, fake = await measure(name)
    verdict = measurement.verdict
    assert verdict.ok, verdict.sentence()
    assert verdict.received == 2 * verdict.accepted > 0
    assert verdict.not_stored == 0
    latency = measurement.metrics["end_to_end_ms"]
    assert 0 < latency["p50"] <= latency["p99"] <= latency["max"]
    assert sum(fake.acknowledged.values()) == verdict.accepted


@pytest.mark.parametrize("name", ["S1", "S2", "S3", "S4"])
@pytest.mark.parametrize(
    ("fault", "kind"),
    [("lose", "lost"), ("duplicate", "duplicated"), ("swap", "out_of_order"), ("forget", "not_stored")],
)
async def test_a_wrong_system_is_found_wrong(name: str, fault: str, kind: str) -> None:
    """A system that loses, repeats, reorders or forgets now and then is not called correct, and says how."""
    measurement, _ = await measure(name, Faults(**{fault: 17}))
    assert not measurement.verdict.ok
    assert getattr(measurement.verdict, kind) > 0, measurement.verdict.sentence()
    assert kind in measurement.verdict.sentence()


async def test_presence_is_measured_and_checked() -> None:
    """C1 times queries of a system that is right, and fails on one that shows somebody who is not there."""
    measurement, _ = await measure("C1")
    assert measurement.verdict.ok, measurement.verdict.sentence()
    for kind in ("all_online_ms", "never_seen_ms", "half_online_ms"):
        assert measurement.metrics[kind]["n"] == 5
        assert measurement.metrics[kind]["p50"] > 0
    with pytest.raises(TargetError, match="wrong for 1 of 20 users"):
        await measure("C1", Faults(ghost=501))


async def test_refusals_are_shown_and_are_no_violation() -> None:
    """A system that says 503 to some is slower, not wrong."""
    measurement, _ = await measure("S2", Faults(refuse=10))
    assert measurement.verdict.ok, measurement.verdict.sentence()
    assert measurement.verdict.refused["503"] > 0


async def test_pushes_of_offline_users_are_looked_for() -> None:
    """S5 is right when each offline event was pushed, and wrong when one was not."""
    measurement, _ = await measure("S5")
    assert measurement.verdict.ok, measurement.verdict.sentence()
    assert measurement.metrics["push_ms"]["n"] == 21
    measurement, _ = await measure("S5", Faults(no_push=5))
    assert measurement.verdict.not_pushed == 1


async def test_a_storm_runs_in_a_process_of_its_own_and_is_judged() -> None:
    """S6 opens every connection, and an event lost to one of them is found."""
    measurement, _ = await measure("S6")
    assert measurement.verdict.ok, measurement.verdict.sentence()
    assert measurement.verdict.received == 30
    assert measurement.metrics["welcome_ms"]["n"] == 30
    measurement, _ = await measure("S6", Faults(lose=20))
    assert measurement.verdict.lost == 1


async def test_schedules_are_followed_from_the_moment_they_are_due() -> None:
    """D1 is right when each came once and not before its second; early ones and lost ones are found."""
    measurement, _ = await measure("D1", users=4)
    assert measurement.verdict.ok, (measurement.verdict.sentence(), measurement.verdict.examples)
    late = measurement.metrics["late_ms"]
    assert late["n"] == 80, "two devices"
    assert 0 < late["p50"] <= late["p99"] <= late["max"]
    for _ in range(5):  # on a machine that stands still an early one may come when it is due
        measurement, _ = await measure("D1", Faults(early=7, lose=17), users=4)
        assert measurement.verdict.lost
        assert not measurement.verdict.ok
        if measurement.verdict.wrong:
            break
    assert measurement.verdict.wrong


async def test_a_read_is_followed_to_the_other_device() -> None:
    """F3 is right when each read was told to the other device, and wrong when one was not."""
    measurement, _ = await measure("F3", sequential_events=24, receipt_timeout_s=30.0)
    assert measurement.verdict.ok, measurement.verdict.sentence()
    assert measurement.metrics["read_frame_ms"]["n"] == 12
    assert measurement.metrics["read_post_ms"]["n"] == 12
    measurement, _ = await measure("F3", Faults(hide_read=11), sequential_events=24, receipt_timeout_s=1.0)
    assert measurement.verdict.wrong == 2
    assert not measurement.verdict.ok


async def test_feeds_and_searches_are_compared_with_what_is_stored(postgres_dsn: str, redis_url: str) -> None:
    """F1 and F2 fill a database once, measure, and are right; a count that is off by one is found."""
    world = await World(postgres_dsn, redis={"url": redis_url}, ingress={"search_walk": 20}).start()
    try:
        target = Target(
            "acme", world.key, world.acme.client_secret, world.ingress.url, world.ingress.url,
            "ws://127.0.0.1:1/ws", postgres_dsn,
        )  # fmt: skip
        options = Options(**{**asdict(SMALL), "stored_notifications": 3000, "sequential_events": 60})
        measurement = await SCENARIOS["F2"](target, options, Progress(quiet=True))
        assert measurement.verdict.ok, (measurement.verdict.sentence(), measurement.verdict.examples)
        assert measurement.metrics["search_long_ms"]["n"] > 0
        assert await world.pool.fetchval("select count(*) from notifications") == 3000
        assert await world.pool.fetchval("select count(*) from search_documents") >= 300
        await world.pool.execute("update streams set unread = unread + 1")
        measurement = await SCENARIOS["F1"](target, options, Progress(quiet=True))
        assert measurement.metrics["many_feed_ms"]["n"] > 0
        # Every count is wrong, every page is right.
        assert measurement.verdict.wrong == measurement.verdict.received > 0
        assert not measurement.verdict.ok
    finally:
        await world.stop()


async def test_the_command_reports_and_its_exit_code_tells(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """JSON, Markdown and baseline are written; 0 for a right system, 1 for a wrong one."""
    for faults, code in ((Faults(), 0), (Faults(duplicate=7), 1)):
        async with FakeSystem(faults) as fake:
            dev_json = tmp_path / "dev.json"
            dev_json.write_text(json.dumps(dev_json_of(fake)))
            arguments = command.make_parser().parse_args(
                ["S1", "S2", "--dev-json", str(dev_json), "--quick", "--quiet", "--duration-s", "0.2",
                 "--sequential-events", "30", "--users", "5", "--json", str(tmp_path / "out.json"),
                 "--markdown", str(tmp_path / "out.md"), "--baseline", str(tmp_path / "base.json"),
                 "--save-baseline"]
            )  # fmt: skip
            assert await command.run(arguments) == code
    whole = json.loads((tmp_path / "out.json").read_text())
    assert [result["ok"] for result in whole["results"]] == [False, False]
    assert "Seed 1" in (tmp_path / "out.md").read_text()
    assert "compared with the baseline" in capsys.readouterr().out


def dev_json_of(fake: FakeSystem) -> dict[str, Any]:
    """dev.json as `python -m cluster up` would write it for the fake."""
    target = fake.target
    return {
        "tenant": target.tenant,
        "apiKey": target.api_key,
        "clientSecret": target.client_secret,
        "directUrl": target.direct_url,
        "httpUrl": target.serve_url,
        "wsUrl": target.ws_url,
    }


async def test_an_absent_system_is_an_answer_not_a_traceback(tmp_path: Path) -> None:
    """No dev.json: exit code 2 and a sentence that says what to do."""
    assert command.make_parser().parse_args([]).scenarios == []
    with pytest.raises(command.TargetError, match="make up"):
        await command.run(command.make_parser().parse_args(["--dev-json", str(tmp_path / "none.json")]))


def test_one_wrong_repeat_makes_the_scenario_wrong() -> None:
    """Medians are for latencies; a verdict is wrong if any repeat was."""
    from benchmarks.ledger import Verdict

    right = Measurement("S1", "t", {"post_ms": {"p50": 1.0}}, Verdict(accepted=1))
    wrong = Measurement("S1", "t", {"post_ms": {"p50": 3.0}}, Verdict(accepted=1, lost=1))
    combined = report.combine([wrong, right, right])
    assert not combined["ok"]
    assert combined["metrics"]["post_ms"]["p50"] == 1.0
    assert "1 lost" in combined["verdict"]


def test_memory_is_that_of_the_first_repeat() -> None:
    """A second storm reuses the first one's memory, so a median would flatter the system."""
    from benchmarks.ledger import Verdict

    storms = [
        Measurement("S6", "t", {"memory_per_connection_kb": {"gateway": {"pss": kb}}}, Verdict(accepted=1))
        for kb in (8.0, 1.0, 1.0)
    ]
    assert report.combine(storms)["metrics"]["memory_per_connection_kb"] == {"gateway": {"pss": 8.0}}
