"""Settings of what is kept and where: PostgreSQL, Redis, the archive."""

from __future__ import annotations

from dataclasses import dataclass

from carillon.settings_fields import setting


@dataclass(frozen=True)
class PostgresSettings:
    """The database that holds the truth."""

    dsn: str = setting("", "Connection string; empty means the embedded server of `make up`.")
    pool_size: int = setting(4, "Connections of an ingress replica.", low=1, high=100)
    shard_pool_size: int = setting(
        3, "Connections of a shard: appends, acknowledgements, reads.", low=2, high=20
    )
    connect_timeout_s: float = setting(5.0, "Longest wait for a connection.", low=0.1, unit="s")
    statement_timeout_s: float = setting(10.0, "Longest run of one statement.", low=0.1, unit="s")
    embedded_port: int = setting(
        0, "Port of the embedded server; 0 means any free one at each start.", low=0, high=65535
    )


@dataclass(frozen=True)
class RedisSettings:
    """The accelerator. Losing it costs speed, never correctness."""

    url: str = setting("", "redis:// URL; empty means the embedded Valkey of `make up`.")
    timeout_s: float = setting(
        0.5, "Longest wait for one command before going on without.", low=0.01, unit="s"
    )
    embedded_port: int = setting(
        0, "Port of the embedded server; 0 means any free one at each start.", low=0, high=65535
    )
    feed_ttl_s: float = setting(
        300.0,
        "How long the top of a feed and its counters stay after they were read; 0 keeps none.",
        low=0.0,
        unit="s",
    )
    feed_from_reads: int = setting(
        2,
        "Feeds and counts that a replica reads at once from which on it asks Redis; 1 means always. A lone "
        "read has its answer sooner from PostgreSQL.",
        low=1,
    )
    feed_max_bytes: int = setting(
        131_072, "Longest entry of a feed; longer ones are read from PostgreSQL each time.", low=0
    )


@dataclass(frozen=True)
class ArchiveSettings:
    """Retention, and the archive that what is older moves to."""

    retention_days: int = setting(
        90,
        "Notifications that were read move to the archive once their month is older than so many days; "
        "0: never. A tenant's policy may say otherwise (retentionDays).",
        low=0,
        high=36_500,
        unit="days",
    )
    root: str = setting(
        "",
        "Where the archive lies: a folder that the coordinator's node sees, or a URL of fsspec "
        "(s3://bucket/path); empty: `archive` in cluster.runtime_dir.",
    )
    run_at: str = setting("03:00", "When the daily run begins (UTC, HH:MM); empty: never by itself.")
    poll_s: float = setting(
        60.0, "How often the coordinator looks whether a run or an erasure is due.", low=0.05, unit="s"
    )
    batch_rows: int = setting(500, "Notifications of one step, hence of one transaction.", low=1, high=10_000)
    batch_bytes: int = setting(
        4_194_304, "A step ends early when its notifications are so long together.", low=1024, unit="bytes"
    )
    pause_s: float = setting(
        0.2,
        "Pause after each step, or as long as the step took if that is longer; 0: none.",
        low=0.0,
        unit="s",
    )
    part_bytes: int = setting(
        33_554_432,
        "Parts of a month are merged until they hold so much JSON; also what a merge holds in memory.",
        low=1024,
        unit="bytes",
    )
    level: int = setting(9, "Zstandard's level of compression.", low=1, high=19)
    revisit_days: float = setting(
        30.0,
        "A month whose unread rows were kept is looked at again after so long.",
        low=0.0,
        unit="days",
    )
    restored_days: float = setting(
        30.0, "A restored month stays in the tables for so long.", low=0.0, unit="days"
    )
    exposures_days: int = setting(
        365,
        "Who got which variant of a template is forgotten after so many days; 0: never.",
        low=0,
        unit="days",
    )
    audit_days: int = setting(0, "Records of the audit go after so many days; 0: never.", low=0, unit="days")
    lock_wait_s: float = setting(
        0.05,
        "Longest wait for the lock under which a partition is exchanged: others queue behind it.",
        low=0.001,
        high=10.0,
        unit="s",
    )
    lock_tries: int = setting(
        100, "Tries for that lock before the partition is left for the next run.", low=1
    )
    lock_pause_s: float = setting(1.0, "Pause between two such tries.", low=0.0, unit="s")
    merge_rows: int = setting(
        1_000_000, "Old months of a year become one partition if they hold at most so many rows.", low=0
    )
