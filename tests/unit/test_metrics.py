"""Statistics of a member, and their Prometheus form."""

from __future__ import annotations

import pytest

from carillon.messages import Address, Member, MemberStats, StatsReply
from carillon.metrics import BUCKETS_MS, Stats, merge_histograms, quantile_ms, render_prometheus


def member(name: str, kind: str = "router") -> Member:
    return Member(kind, name, "node-1", "i", Address("127.0.0.1", 1))


def test_snapshot_is_a_copy():
    """What a renewal carries does not change while it waits to be sent."""
    stats = Stats()
    stats.count("events_accepted", 2)
    stats.gauge("sessions", 7)
    stats.observe_ms("append_ms", 3.0)
    counters, gauges, histograms = stats.snapshot()
    stats.count("events_accepted")
    stats.gauge("sessions", 8)
    stats.observe_ms("append_ms", 3.0)
    assert (counters, gauges) == ({"events_accepted": 2}, {"sessions": 7})
    assert sum(histograms["append_ms"][:-1]) == 1
    assert histograms["append_ms"][-1] == 3.0


@pytest.mark.parametrize("ms", [0.0, 0.1, 0.11, 10.0, 29_999.0, 1e9])
def test_bucket_bounds_are_inclusive_and_the_last_is_open(ms: float):
    """A value lands in the first bucket whose bound is not below it; nothing is lost beyond the last."""
    stats = Stats()
    stats.observe_ms("x", ms)
    counts = stats.histograms["x"][:-1]
    index = counts.index(1)
    assert sum(counts) == 1
    assert ms <= BUCKETS_MS[index]
    assert index == 0 or ms > BUCKETS_MS[index - 1]


def test_quantiles_interpolate():
    """The median of 0..100 ms evenly spread is within its bucket of the true one."""
    stats = Stats()
    for ms in range(1, 101):
        stats.observe_ms("x", float(ms))
    row = stats.histograms["x"]
    assert quantile_ms(row, 0.5) == pytest.approx(50, abs=2)
    assert quantile_ms(row, 0.99) == pytest.approx(99, abs=2)
    assert quantile_ms(row, 0.0) <= quantile_ms(row, 0.1) <= quantile_ms(row, 1.0) == 100.0


def test_quantile_of_nothing_and_of_the_open_bucket():
    """An empty histogram is 0; the open bucket answers its lower bound, never infinity."""
    assert quantile_ms([0.0] * (len(BUCKETS_MS) + 1), 0.99) == 0.0
    stats = Stats()
    stats.observe_ms("x", 1e9)
    assert quantile_ms(stats.histograms["x"], 0.5) == BUCKETS_MS[-2]


def test_merge_leaves_out_rows_of_another_version():
    """Histograms with other buckets are not mixed in."""
    stats = Stats()
    stats.observe_ms("x", 1.0)
    row = stats.histograms["x"]
    assert merge_histograms([row, row, [1.0, 2.0]])[-1] == 2.0


def test_prometheus_text_sums_members_of_a_kind():
    """Counters and buckets of two routers are one series; labels in names survive; durations are seconds."""
    one, two = Stats(), Stats()
    one.count('pushes_sent{provider="fcm"}', 2)
    two.count('pushes_sent{provider="fcm"}', 3)
    one.gauge("connections", 1.5)
    one.observe_ms("append_ms", 2.0)
    two.observe_ms("append_ms", 4.0)
    rows = [MemberStats(member(n), 0.25, *s.snapshot()) for n, s in (("r1", one), ("r2", two))]
    text = render_prometheus(StatsReply(9, {"shard-a": 1000, "": 24}, rows), {"in_flight": 3})
    lines = text.splitlines()
    assert 'carillon_pushes_sent_total{kind="router",provider="fcm"} 5' in lines
    assert 'carillon_connections{kind="router"} 1.5' in lines
    assert 'carillon_append_seconds_bucket{kind="router",le="0.002"} 1' in lines
    assert 'carillon_append_seconds_bucket{kind="router",le="+Inf"} 2' in lines
    assert 'carillon_append_seconds_sum{kind="router"} 0.006' in lines
    assert 'carillon_append_seconds_count{kind="router"} 2' in lines
    assert 'carillon_slots{shard=""} 24' in lines
    assert "carillon_map_version 9" in lines
    assert "carillon_in_flight 3" in lines
    assert lines.count("# TYPE carillon_pushes_sent_total counter") == 1
    assert text.endswith("\n")


def test_prometheus_text_parses():
    """The reference parser accepts what we write, odd names included."""
    from prometheus_client.parser import text_string_to_metric_families

    stats = Stats()
    stats.count("events_accepted", 1)
    stats.observe_ms("append_ms", 2.0)
    rows = [MemberStats(member('we"ird\\name\n'), 0.0, *stats.snapshot())]
    families = {f.name: f for f in text_string_to_metric_families(render_prometheus(StatsReply(1, {}, rows)))}
    assert families["carillon_append_seconds"].type == "histogram"
    assert families["carillon_member_up"].samples[0].labels["member"] == 'we"ird\\name\n'
