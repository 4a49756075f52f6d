"""Settings of shards: users, and what is said to them, merged, scheduled and sent to many."""

from __future__ import annotations

from dataclasses import dataclass

from carillon.settings_fields import setting


@dataclass(frozen=True)
class ShardSettings:
    """The actor that owns users."""

    max_batch: int = setting(512, "Events of one append transaction.", low=1, high=5000)
    max_queue: int = setting(20_000, "Events waiting for append before new ones fail as busy.", low=1)
    tenant_queue: int = setting(
        15_000,
        "Events of one tenant waiting for append before its new ones fail as busy; others have the rest.",
        low=1,
    )
    context_cache: int = setting(50_000, "User contexts kept in memory.", low=100)
    recent_window: int = setting(
        50, "Recent notifications kept per live session for resume.", low=0, high=1000
    )
    edit_history: int = setting(
        50, "Former contents kept of a notification that is edited again and again.", low=0, high=10_000
    )
    grace_s: float = setting(
        5.0, "A session lives on for so long after its last connection was lost.", low=0.0, unit="s"
    )
    clean_close_grace_s: float = setting(0.5, "The same after a normal close (1000).", low=0.0, unit="s")
    ack_window_s: float = setting(
        5.0, "A live delivery that no device acknowledges in so long gets its push.", low=0.05, unit="s"
    )
    when_away: str = setting(
        "push_after",
        "While all devices of a user are hidden or idle: in_app (no push if one acknowledges), both, or "
        "push_after (a delay, unless seen). A tenant's policy wins; it "
        "can also name a URL that decides (callback).",
    )
    when_away_delay_s: float = setting(
        30.0, "The delay of push_after. A tenant's policy wins.", low=0.0, high=86_400.0, unit="s"
    )
    hold_s: float = setting(
        60.0,
        "A push that an active user's device acknowledged still comes if the user looks away without having "
        "seen it within so long of its creation; 0 ends it with the acknowledgement. A tenant's policy wins.",
        low=0.0,
        high=3600.0,
        unit="s",
    )
    max_kept_pushes: int = setting(
        50_000,
        "Pushes of a shard that wait for an acknowledgement without a row of the outbox; beyond it they get "
        "one at once. 0: each does.",
        low=0,
    )
    kept_s: float = setting(
        90.0, "One that is held for longer than that gets a row at its acknowledgement.", low=0.0, unit="s"
    )
    kept_mark_s: float = setting(
        5.0,
        "How often a shard notes from which notification on it keeps such pushes; a successor looks through "
        "what is younger.",
        low=0.05,
        high=3600.0,
        unit="s",
    )
    policy_refresh_s: float = setting(
        5.0, "A changed policy that a shard was not told of holds there within so long.", low=0.05, unit="s"
    )
    ack_flush_s: float = setting(
        0.2, "Acknowledgements are written in batches this far apart.", low=0.0, unit="s"
    )
    sweep_s: float = setting(2.0, "How often due outbox rows are claimed.", low=0.05, unit="s")
    sweep_batch: int = setting(500, "Outbox rows claimed at a time.", low=1, high=5000)
    delivery_lease_s: float = setting(
        30.0, "A claimed outbox row whose outcome is missing is due again after so long.", low=0.5, unit="s"
    )
    resume_wait_s: float = setting(
        0.5,
        "A connection without a position waits so long for RESUME before live frames flow.",
        low=0.0,
        unit="s",
    )
    replay_page: int = setting(200, "Notifications of one page of replay.", low=1, high=1000)
    idempotency_ttl_s: float = setting(86_400.0, "How long an idempotency key is kept.", low=1.0, unit="s")
    max_connections_per_user: int = setting(
        20, "Connections of a user; the oldest is closed with 4004.", low=1
    )
    remembered_devices: int = setting(
        64,
        "Devices of a user whose acknowledged position, and attention between two polls, are kept in memory.",
        low=1,
    )
    max_topics_per_user: int = setting(
        1000, "Topics of a user beyond which SUBSCRIBE is refused; services may add more.", low=0
    )
    erase_batch: int = setting(
        1000, "Notifications of an erased user deleted by one statement.", low=1, high=10_000
    )
    erase_sweep_s: float = setting(
        60.0,
        "How often interrupted erasures are looked for; 0: never.",
        low=0.0,
        unit="s",
    )
    erasure_keep_s: float = setting(
        2_592_000.0,
        "Tokens of an erased user made before are refused for so long (30 days): longer than tokens live.",
        low=60.0,
        unit="s",
    )


@dataclass(frozen=True)
class MergeSettings:
    """Events that become part of a notification that is there (docs/how-to/merge-notifications.md)."""

    dedupe_window_s: float = setting(
        300.0,
        "Events that are alike are one within so long of the first.",
        low=0.001,
        high=86_400.0,
        unit="s",
    )
    aggregate_window_s: float = setting(
        3600.0,
        "Events about one thing are gathered within so long of the first.",
        low=0.001,
        high=86_400.0,
        unit="s",
    )
    renotify_s: float = setting(
        300.0,
        "What grows disturbs its user (a push, a sound) at most this often; 0 means with every event. "
        "A tenant's policy wins.",
        low=0.0,
        high=86_400.0,
        unit="s",
    )
    max_actors: int = setting(10, "Actors that one notification names.", low=1, high=100)
    max_items: int = setting(20, "Items that `accumulate` keeps, the newest.", low=1, high=100)
    max_items_bytes: int = setting(
        16_384, "Their length as JSON together; older ones go.", low=1024, high=65_536
    )
    known_windows: int = setting(
        500_000,
        "Windows that a shard remembers, about 90 bytes each: of others Postgres need not be asked.",
        low=1,
        high=10_000_000,
    )
    learned_windows: int = setting(
        1000,
        "Open windows of one user that a shard reads when it takes over; of a user with more, Postgres is "
        "asked of every event that may be merged, for a day.",
        low=1,
        high=1_000_000,
    )
    keep_s: float = setting(
        172_800.0,
        "How long it is known which events were merged: repeated tries of them are recognised, `explain` "
        "names them. Not shorter than the longest window, nor than `shard.idempotency_ttl_s`.",
        low=86_400.0,
        unit="s",
    )


@dataclass(frozen=True)
class PresenceSettings:
    """What others learn of a user's presence."""

    watch: str = setting(
        "nobody",
        "Whom a client may watch: nobody, or tenant (every user of its tenant). A tenant's policy wins.",
    )
    coalesce_s: float = setting(
        0.1, "Changes of a watched user within so long are told as one.", low=0.0, unit="s"
    )
    max_per_connection: int = setting(1000, "Users that one connection may watch.", low=0, high=1000)
    max_per_gateway: int = setting(
        500_000,
        "Users watched by a gateway's connections, each counted per connection; more is refused as busy.",
        low=0,
    )
    mirror_ttl_s: float = setting(
        90.0,
        "Life of a user's key in Redis, renewed after a third; 0 mirrors nothing.",
        low=0.0,
        unit="s",
    )
    mirror_retry_s: float = setting(
        5.0, "Pause before Redis is tried again that did not take the mirror.", low=0.01, unit="s"
    )
    callback_hosts: str = setting(
        "",
        "Comma-separated hosts (or host:port) that tenants' presence URLs may have; empty: none is asked.",
    )
    callback_timeout_s: float = setting(
        2.0, "Longest wait for the answer of a tenant's presence URL.", low=0.05, unit="s"
    )
    callback_at_once: int = setting(
        32, "Requests to tenants' presence URLs that a shard has under way.", low=1
    )
    callback_waiting: int = setting(
        2000, "Connections of a shard that wait for such an answer; more are answered busy.", low=1
    )
    permission_ttl_s: float = setting(
        30.0, "How long such an answer holds for the same request of the same user.", low=0.0, unit="s"
    )
    recheck_s: float = setting(
        300.0, "Whether a connection may still watch whom it watches is asked so often.", low=0.05, unit="s"
    )
    retry_s: float = setting(
        0.2, "Pause before a watched user is asked for again whose shard refused.", low=0.01, unit="s"
    )


@dataclass(frozen=True)
class TemplateSettings:
    """Templates: what rendering one may take."""

    cache_s: float = setting(
        2.0,
        "A changed template holds everywhere within so long; at once where it was changed.",
        low=0.0,
        unit="s",
    )
    cache_size: int = setting(2000, "Versions of templates kept by a replica.", low=1)
    time_limit_s: float = setting(0.1, "Processor time of one text.", low=0.001, high=10.0, unit="s")
    max_steps: int = setting(10_000, "Loop turns and filters of one text.", low=10)
    max_length: int = setting(32_768, "Characters of one text and of every value on the way to it.", low=256)
    max_memory_bytes: int = setting(536_870_912, "Address space of a process that renders.", low=134_217_728)
    processes: int = setting(
        1, "Processes that render, per replica and shard; started with the first template.", low=1, high=16
    )
    batch: int = setting(50, "Texts rendered in one turn of a process.", low=1, high=1000)
    max_waiting: int = setting(200, "Requests that wait for a process before further ones are busy.", low=1)
    start_s: float = setting(
        5.0,
        "Longest start of such a process, and how much later than its own clock it is ended.",
        low=0.1,
        unit="s",
    )


@dataclass(frozen=True)
class ScheduleSettings:
    """What is sent later."""

    sweep_s: float = setting(
        0.25, "How often a shard looks for what is due; 0: never.", low=0.0, high=60.0, unit="s"
    )
    batch: int = setting(200, "Schedules claimed at a time.", low=1, high=5000)
    lease_s: float = setting(
        30.0, "A claimed schedule whose outcome is missing is due again after so long.", low=0.2, unit="s"
    )
    publish_timeout_s: float = setting(10.0, "Longest publishing of one occurrence.", low=0.1, unit="s")
    retry_s: float = setting(
        1.0, "Pause before an occurrence that could not be published is tried again.", low=0.01, unit="s"
    )
    zone_recheck_s: float = setting(
        900.0, "A user's new time zone counts for what is scheduled in it within so long.", low=0.05, unit="s"
    )
    keep_s: float = setting(
        604_800.0,
        "Schedules that ended are kept for so long (their idempotency keys, too).",
        low=1.0,
        unit="s",
    )
    max_ahead_s: float = setting(
        31_622_400.0, "How far ahead scheduleAt of an event may be.", low=1.0, unit="s"
    )
    min_interval_s: float = setting(60.0, "Shortest time between occurrences of a rule.", low=0.05, unit="s")


@dataclass(frozen=True)
class BroadcastSettings:
    """One event to many users, behind the single events."""

    look_s: float = setting(
        0.5,
        "How often a shard looks for broadcasts that begin or go on; 0: never.",
        low=0.0,
        high=60.0,
        unit="s",
    )
    chunk_min: int = setting(
        60,
        "Fewest users that one transaction notifies: each costs PostgreSQL as much as about forty users.",
        low=1,
        high=1000,
    )
    chunk_max: int = setting(250, "Most users that one transaction notifies.", low=1, high=1000)
    chunk_ms: float = setting(
        3.0,
        "Chunks grow and shrink so that one takes about so long, its wait for a turn included: a commit of "
        "single events may wait for it.",
        low=1.0,
        unit="ms",
    )
    busy_share: float = setting(
        0.8,
        "Part of its time that a shard spends on broadcasts while it appends single events. With none "
        "it does not rest.",
        low=0.01,
        high=1.0,
    )
    parallel: int = setting(
        1,
        "Chunks that all shards read or write at a time: processors stay free for single events. One for "
        "each two of PostgreSQL's; 0: no bound.",
        low=0,
        high=1024,
    )
    live_batch: int = setting(
        50, "Connected users whose notifications are appended at a time.", low=1, high=1000
    )
    live_wait_ms: float = setting(
        50.0, "Longest time that such a batch waits behind single events.", low=0.0, unit="ms"
    )
    retry_s: float = setting(
        0.5, "Pause after a chunk that could not be written before it is tried again.", low=0.01, unit="s"
    )
    max_open: int = setting(
        20, "Broadcasts of a tenant that run or are paused; another one is 429 `too_many`.", low=1
    )
    max_scheduled: int = setting(
        200, "Broadcasts of a tenant that wait for their `scheduleAt`; another one is 429.", low=1
    )
    full_retry_s: float = setting(10.0, "Retry-After of that answer.", low=1.0, unit="s")
    failures_kept: int = setting(1000, "Users of a broadcast whose failure is listed.", low=0)
    keep_s: float = setting(
        2_592_000.0,
        "Broadcasts that ended are kept for so long (their idempotency keys, too).",
        low=1.0,
        unit="s",
    )
