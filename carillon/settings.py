"""One frozen tree of settings: unit, default and effect beside each field.

Environment and file are parsed once, by the driver, with `load_settings`; actors get the finished tree
as an argument. The variable of a field is `CARILLON_<SECTION>_<FIELD>` in capitals, e.g.
`CARILLON_GATEWAY_PORT`; a TOML file named by `CARILLON_CONFIG` holds the same as `[section] field = ...`.
The environment wins. docs/reference/settings.md is checked against this module by a test.
"""

from __future__ import annotations

import dataclasses
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from carillon.errors import SettingsError

T = TypeVar("T")

WATCH: tuple[str, ...] = ("nobody", "tenant", "callback")
"""Who may watch whose presence (carillon/policy.py)."""
_TIME_OF_DAY = re.compile(r"([01]\d|2[0-3]):[0-5]\d", re.ASCII)
WHEN_AWAY = ("in_app", "both", "push_after")
"""What may be done while every device of a connected user is hidden or idle (carillon/policy.py)."""


def setting(
    default: T, doc: str, *, low: float | None = None, high: float | None = None, unit: str = ""
) -> T:
    """Declare a field: its default, what it does, its bounds (inclusive) and its unit."""
    meta: dict[str, Any] = {"doc": doc, "low": low, "high": high, "unit": unit}
    return field(default=default, metadata=meta)


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
class ClusterSettings:
    """Membership, leases and placement."""

    secret: str = setting("", "Shared secret of all links; empty means made at first start and kept.")
    namespace: str = setting("carillon", "Ray namespace of all actors.")
    bind_host: str = setting("127.0.0.1", "Address that links, gateways and ingress listen on.")
    advertise_host: str = setting("", "Address told to others; empty means the Ray node's own.")
    runtime_dir: str = setting(".carillon", "Folder for sockets, data and state of this machine.")
    shards_per_node: int = setting(2, "Shard actors on each node.", low=1, high=64)
    lease_renew_s: float = setting(1.0, "How often a member renews its lease.", low=0.05, unit="s")
    lease_timeout_s: float = setting(
        4.0, "A member that did not renew for so long is lost and its slots move.", low=0.2, unit="s"
    )
    rebalance_delay_s: float = setting(
        1.0, "Wait after a join before slots move, so that several joins move them once.", low=0.0, unit="s"
    )
    node_poll_s: float = setting(1.0, "How often the coordinator asks Ray for its nodes.", low=0.1, unit="s")
    fence_wait_s: float = setting(
        1.0,
        "A move of slots ends database sessions that hold a losing shard's row for longer.",
        low=0.05,
        unit="s",
    )
    spawn_retry_s: float = setting(
        15.0,
        "An actor that has not joined so long after it was started is looked at again.",
        low=0.5,
        unit="s",
    )


@dataclass(frozen=True)
class LinkSettings:
    """The data plane between actors."""

    max_frame_bytes: int = setting(
        16 * 1024 * 1024, "Longest frame; a longer one closes the link.", low=65536
    )
    max_outbound_bytes: int = setting(
        32 * 1024 * 1024, "Bytes waiting for one peer before sends fail as busy.", low=65536
    )
    max_in_flight: int = setting(20_000, "Unanswered requests on one link before they fail as busy.", low=1)
    request_timeout_s: float = setting(10.0, "Default deadline of a request.", low=0.05, unit="s")
    handshake_timeout_s: float = setting(5.0, "Longest handshake.", low=0.05, unit="s")
    reconnect_min_s: float = setting(
        0.05, "First wait before dialling again (full jitter).", low=0.0, unit="s"
    )
    reconnect_max_s: float = setting(1.0, "Longest wait before dialling again.", low=0.01, unit="s")
    heartbeat_s: float = setting(2.0, "A link without traffic sends a ping this often.", low=0.05, unit="s")
    dead_after_s: float = setting(
        6.0, "A link that received nothing for so long is closed.", low=0.1, unit="s"
    )


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
    policy_refresh_s: float = setting(
        5.0, "A tenant's changed policy holds everywhere within so long.", low=0.05, unit="s"
    )
    ack_flush_s: float = setting(
        0.1, "Acknowledgements are written in batches this far apart.", low=0.0, unit="s"
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
    keep_s: float = setting(
        172_800.0,
        "How long it is known which events were merged: repeated tries of them are recognised, `explain` "
        "names them. Not shorter than the longest window, nor than `shard.idempotency_ttl_s`.",
        low=86_400.0,
        unit="s",
    )


@dataclass(frozen=True)
class GatewaySettings:
    """The actor that owns sockets."""

    port: int = setting(8001, "TCP port of the WebSocket listener; 0 means any free one.", low=0, high=65535)
    allowed_origins: str = setting(
        "", "Comma-separated exact origins; empty means every origin (tokens are not ambient credentials)."
    )
    heartbeat_s: float = setting(25.0, "Ping interval.", low=0.05, unit="s")
    pong_timeout_s: float = setting(
        8.0, "A ping without pong for so long closes with 4212.", low=0.05, unit="s"
    )
    auth_timeout_s: float = setting(10.0, "Longest wait for a first AUTH frame.", low=0.05, unit="s")
    handshake_timeout_s: float = setting(10.0, "Longest HTTP upgrade.", low=0.05, unit="s")
    max_message_bytes: int = setting(65_536, "Longest client message (1009 beyond).", low=1024)
    max_buffer_bytes: int = setting(1_048_576, "Unsent live bytes of a connection before 4208.", low=4096)
    frames_per_s: float = setting(
        100.0, "Client frames per second before reading is paused.", low=1.0, unit="1/s"
    )
    user_frames_per_s: float = setting(
        300.0, "The same for all of a user's connections at one gateway together.", low=1.0, unit="1/s"
    )
    max_errors_per_minute: int = setting(10, "Bad frames in a minute before 4003.", low=1)
    max_connections: int = setting(15_000, "Connections of one gateway; more are refused with 4213.", low=1)
    reattach_timeout_s: float = setting(
        10.0, "Connections without owner for so long close with 4202.", low=0.1, unit="s"
    )
    drain_s: float = setting(
        20.0, "Drain closes (4201) are spread over so long.", low=0.0, high=30.0, unit="s"
    )
    max_handshake_bytes: int = setting(
        16_384, "Longest HTTP request of an upgrade, its headers included.", low=1024
    )
    low_buffer_bytes: int = setting(
        65_536, "Replay goes on once a connection has no more than this unsent.", low=1024
    )
    max_held_frames: int = setting(
        32, "Frames kept for a connection without owner before reading is paused.", low=1
    )
    attach_retry_s: float = setting(
        0.1, "Pause before a refused attachment is tried again.", low=0.01, unit="s"
    )
    ack_repeat_s: float = setting(
        10.0,
        "Cumulative acknowledgements younger than this are told again to the next shard.",
        low=0.1,
        unit="s",
    )
    close_timeout_s: float = setting(
        3.0, "A peer that does not finish the closing handshake in so long is cut off.", low=0.05, unit="s"
    )
    tls_cert_file: str = setting("", "PEM file of a certificate and its chain; empty means no TLS.")
    tls_key_file: str = setting("", "PEM file of the certificate's key.")


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
class IngressSettings:
    """The HTTP side: two doors, one app."""

    port: int = setting(8000, "Port of Serve's route (HAProxy).", low=1, high=65535)
    direct_port: int = setting(
        8080, "Port of the replica's own door; 0 means any free one.", low=0, high=65535
    )
    replicas: int = setting(1, "Serve replicas on each node.", low=1, high=64)
    tls_cert_file: str = setting(
        "", "PEM file of a certificate and its chain for the own door; empty means no TLS."
    )
    tls_key_file: str = setting("", "PEM file of the certificate's key.")
    request_timeout_s: float = setting(10.0, "Deadline of a request, retries inside it.", low=0.1, unit="s")
    max_request_bytes: int = setting(8 * 1024 * 1024, "Longest request body (413 beyond).", low=1024)
    import_batch: int = setting(
        500, "Events of an import stored at a time; the next are read meanwhile.", low=1, high=1000
    )
    import_line_bytes: int = setting(65_536, "Longest line of an import; a longer one fails.", low=1024)
    import_failures: int = setting(100, "Failed lines that the answer of an import tells.", low=0)
    import_patience_s: float = setting(
        60.0, "An import waits so long for what cannot store its events now.", low=0.0, unit="s"
    )
    preview_s: float = setting(
        2.0, "The preview of a segment counts for so long, then it estimates.", low=0.05, unit="s"
    )
    max_attributes_bytes: int = setting(
        16_384, "Longest attributes of a user's profile, as JSON.", low=2, high=1_048_576
    )
    max_in_flight: int = setting(4096, "Requests at once before 503.", low=1)
    max_connections: int = setting(
        10_000, "Connections to a replica's own door, streams not counted; one more is cut off.", low=1
    )
    max_head_bytes: int = setting(
        65_536, "Longest head of a request at a replica's own door (431 beyond).", low=1024
    )
    peer_timeout_s: float = setting(
        30.0,
        "Who takes longer to send a request, or to take its answer, is cut off.",
        low=0.05,
        unit="s",
    )
    max_streams: int = setting(
        5000, "Event streams and long polls of one replica; more are answered 503.", low=1
    )
    stream_life_s: float = setting(
        300.0,
        "An event stream is ended (4212) after 0.8 to 1 times so long: its client comes back, or is gone.",
        low=0.05,
        unit="s",
    )
    stream_retry_s: float = setting(
        2.0,
        "What an EventSource is told to wait before it comes back, give or take half.",
        low=0.01,
        unit="s",
    )
    max_wait_s: float = setting(
        60.0, "Longest wait of a long poll (`waitS`); more is cut to it.", low=0.1, unit="s"
    )
    auth_cache_s: float = setting(
        5.0, "How long a key or tenant is trusted before it is read again.", low=0.0, unit="s"
    )
    token_ttl_s: float = setting(
        3600.0, "Default lifetime of a token from POST /v1/tokens.", low=1.0, unit="s"
    )
    token_ttl_max_s: float = setting(86_400.0, "Longest lifetime of such a token.", low=1.0, unit="s")
    clock_skew_s: float = setting(5.0, "Tolerance for `exp`, `nbf` and `iat` of a token.", low=0.0, unit="s")
    token_audience: str = setting("", "Required `aud` of client tokens; empty means it is not looked at.")
    token_issuer: str = setting("", "Required `iss` of client tokens; empty means it is not looked at.")
    limit_lease_s: float = setting(
        0.05,
        "Seconds of a rate limit (of a key, of a tenant) that a replica takes from Redis ahead.",
        low=0.0,
        high=1.0,
        unit="s",
    )
    ticket_ttl_s: float = setting(
        30.0, "How long a ticket from POST /api/tickets may be redeemed, once.", low=0.05, unit="s"
    )
    jwks_ttl_s: float = setting(
        300.0,
        "A tenant's JWK Set is read again after so long.",
        low=0.0,
        unit="s",
    )
    jwks_refresh_s: float = setting(
        10.0,
        "A token with an unknown key has the JWK Set read again, so often at most.",
        low=0.01,
        unit="s",
    )
    jwks_timeout_s: float = setting(3.0, "Longest wait for a JWK Set.", low=0.05, unit="s")
    replay_max: int = setting(500, "Dead letters of one replay call.", low=1, high=5000)
    cors_origins: str = setting(
        "", "Comma-separated origins that may call /api from a browser; empty means any. No credentials."
    )
    store_retry_s: float = setting(
        2.0, "How long an event is tried again while PostgreSQL is away, before 503.", low=0.0, unit="s"
    )
    retry_pause_s: float = setting(
        0.05, "Longest first wait between tries of a request (full jitter, doubled).", low=0.001, unit="s"
    )
    digest_items: int = setting(
        100, "Items of an open digest that are listed, the newest ones.", low=1, high=1000
    )
    digests_listed: int = setting(100, "Open digests of a user that are listed.", low=1, high=1000)
    search_walk: int = setting(
        1000,
        "Notifications that a search looks through one by one before it has the words of a feed indexed.",
        low=1,
        high=100_000,
    )
    search_fill_batch: int = setting(
        1000, "Notifications whose words are indexed in one transaction.", low=1, high=100_000
    )
    search_fills: int = setting(
        2, "Feeds of which a replica indexes the words at once; each takes a connection.", low=1, high=100
    )
    ready_timeout_s: float = setting(2.0, "Longest check of GET /readyz.", low=0.05, unit="s")
    key_touch_s: float = setting(15.0, "How often the last use of API keys is written.", low=0.05, unit="s")
    drain_s: float = setting(10.0, "A stopping replica finishes its requests for so long.", low=0.0, unit="s")
    demo: bool = setting(
        False, "Serve /demo/config.json, /demo/send and /demo/received: no login, demo only."
    )
    demo_tenant: str = setting("demo", "Tenant of the demo page.")
    demo_users: str = setting("ada,grace", "Comma-separated users of the demo page.")
    demo_fcm_received_url: str = setting("", "What the local FCM server received (its receivedUrl).")
    demo_apns_received_url: str = setting("", "What the local APNs server received (its receivedUrl).")


@dataclass(frozen=True)
class PushSettings:
    """Push pools and their senders."""

    min_senders: int = setting(1, "Sender actors of a pool at rest.", low=1, high=64)
    max_senders: int = setting(2, "Sender actors of a pool under load.", low=1, high=64)
    max_queue: int = setting(5000, "Jobs in a pool before it is full (rows stay in the outbox).", low=1)
    sender_concurrency: int = setting(500, "Requests in flight of one sender.", low=1, high=5000)
    timeout_s: float = setting(
        10.0, "A provider that does not answer in so long makes the try unknown.", low=0.05, unit="s"
    )
    digest_titles: int = setting(3, "Titles of items that the push of a digest shows.", low=1, high=20)
    digest_ids: int = setting(
        50, "Ids of items that the push of a digest carries, the newest ones.", low=1, high=80
    )
    digest_render_s: float = setting(
        5.0,
        "A tenant's template for digests has so long, else they go out in our own words.",
        low=0.01,
        unit="s",
    )
    ttl_s: float = setting(
        2_419_200.0, "Lifetime at the provider when the event names none (28 days).", low=0.0, unit="s"
    )
    max_attempts: int = setting(6, "Tries of one push before it is dead.", low=1, high=100)
    withdraw: bool = setting(
        True, "What was read, clicked, dismissed or archived elsewhere is taken back from phones, silently."
    )
    withdraw_attempts: int = setting(
        3, "Tries of such a withdrawal; then it is left at that, without a dead letter.", low=1, high=100
    )
    give_up_after_s: float = setting(
        86_400.0, "A push without any verdict of a provider for so long is dead.", low=1.0, unit="s"
    )
    backoff_s: float = setting(
        1.0, "Wait after the first failed try; doubled after each.", low=0.001, unit="s"
    )
    left_pause_s: float = setting(
        1.0,
        "Wait of a push that no pool took; doubled while its provider takes none, jittered.",
        low=0.001,
        unit="s",
    )
    left_pause_max_s: float = setting(30.0, "Longest such wait.", low=0.001, unit="s")
    left_per_s: float = setting(
        1000.0,
        "Such pushes come back no faster than this, per shard and provider.",
        low=1.0,
        unit="1/s",
    )
    fcm_url: str = setting("", "Override of FCM's host, for the local server; empty means Google's.")
    fcm_credentials: str = setting("", "Path of the service account file (JSON).")
    fcm_ca_file: str = setting("", "CA bundle for fcm_url.")
    fcm_project: str = setting("", "Project id; empty means the service account's.")
    apns_url: str = setting("", "Override of APNs' host (https://host:port); empty means Apple's.")
    apns_key_file: str = setting("", "Path of the .p8 signing key.")
    apns_key_id: str = setting("", "Key id of the signing key.")
    apns_team_id: str = setting("", "Apple team id.")
    apns_topic: str = setting("", "Default topic (bundle id); a device's appId wins.")
    apns_ca_file: str = setting("", "CA bundle for apns_url.")
    apns_connections: int = setting(2, "HTTP/2 connections of one sender.", low=1, high=20)
    apns_token_refresh_s: float = setting(
        3000.0,
        "Age of the provider token at which a new one is made (Apple: at most 1 h).",
        low=1.0,
        unit="s",
    )
    apns_token_min_age_s: float = setting(
        1200.0, "Apple refuses a new provider token before the last one is so old.", low=0.0, unit="s"
    )
    report_timeout_s: float = setting(
        30.0, "An outcome no shard took for so long is dropped; the outbox sends again.", low=0.1, unit="s"
    )
    breaker_failures: int = setting(
        20, "Tries in a row without an answer, or one refusal of our credentials, open the breaker.", low=1
    )
    breaker_open_s: float = setting(
        5.0, "First pause of an open breaker; doubles up to 60 s.", low=0.01, unit="s"
    )
    scale_idle_s: float = setting(
        30.0, "A further sender that was idle for so long is stopped.", low=0.05, unit="s"
    )
    concurrency_min: int = setting(
        10, "Requests that one app may always have in flight at its provider; it starts there.", low=1
    )
    concurrency_max: int = setting(
        1000, "Requests that one app may have in flight at most; between the two it adapts.", low=1
    )
    fcm_rate_per_s: float = setting(
        10_000.0,
        "Requests per second of one FCM project (Google: 600,000 a minute); 0 means unlimited.",
        low=0.0,
        unit="1/s",
    )
    apns_rate_per_s: float = setting(
        0.0, "Requests per second of one APNs topic and environment; 0 means unlimited.", low=0.0, unit="1/s"
    )
    rate_burst_s: float = setting(
        1.0, "After a rest so many seconds' worth of the rate may go at once.", low=0.0, unit="s"
    )
    max_pause_s: float = setting(
        300.0, "Longest pause of an app that a provider's Retry-After is obeyed for.", low=0.0, unit="s"
    )
    max_apps: int = setting(
        64, "Apps of one provider told apart; further ones share a breaker and a limit.", low=1
    )


@dataclass(frozen=True)
class RouterSettings:
    """The actor between ingress and shards."""

    max_outstanding: int = setting(
        20_000, "Events on the way to one shard before further ones are answered busy.", low=1
    )
    max_held: int = setting(
        20_000, "Events that wait for their slot to have an owner; more are answered busy.", low=0
    )
    max_batch: int = setting(1000, "Events of one message to a shard.", low=1, high=10_000)
    max_passing: int = setting(
        10_000, "Other requests passed on at once before further ones are answered busy.", low=1
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
    chunk_min: int = setting(50, "Fewest users that one transaction notifies.", low=1, high=1000)
    chunk_max: int = setting(500, "Most users that one transaction notifies.", low=1, high=1000)
    chunk_ms: float = setting(
        6.0,
        "Chunks grow and shrink so that one takes about so long: a commit of single events may wait for it.",
        low=1.0,
        unit="ms",
    )
    busy_share: float = setting(
        0.9,
        "Part of its time that a shard spends on broadcasts while it appends single events. With none "
        "it does not rest.",
        low=0.01,
        high=1.0,
    )
    parallel: int = setting(
        1,
        "Chunks that all shards write at a time: processors stay free for single events. One for each two "
        "of PostgreSQL's; 0: no bound.",
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
    failures_kept: int = setting(1000, "Users of a broadcast whose failure is listed.", low=0)
    keep_s: float = setting(
        2_592_000.0,
        "Broadcasts that ended are kept for so long (their idempotency keys, too).",
        low=1.0,
        unit="s",
    )


@dataclass(frozen=True)
class InboundSettings:
    """Events that others bring: webhooks and a Redis stream."""

    tolerance_s: float = setting(
        300.0, "A webhook signed longer ago, or further ahead, is refused.", low=1.0, unit="s"
    )
    max_body_bytes: int = setting(1_048_576, "Longest webhook.", low=1024)
    secret_overlap_s: float = setting(
        86_400.0, "How long the replaced secret of a source is taken, too.", low=0.0, unit="s"
    )
    stream: str = setting("", "Redis stream that events are read from; empty: none.")
    stream_group: str = setting("carillon", "Consumer group of the replicas.")
    stream_tenant: str = setting("", "Tenant of entries that name none.")
    stream_batch: int = setting(100, "Entries read and published at a time.", low=1, high=1000)
    stream_block_s: float = setting(1.0, "Longest wait of one read for entries.", low=0.01, unit="s")
    stream_claim_s: float = setting(
        60.0, "An entry that its reader did not acknowledge for so long is taken over.", low=0.05, unit="s"
    )
    stream_retry_s: float = setting(
        0.2, "First pause before an entry, or Redis, is tried again; doubled up to 5 s.", low=0.01, unit="s"
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


@dataclass(frozen=True)
class Settings:
    """The whole tree."""

    postgres: PostgresSettings = field(default_factory=PostgresSettings)
    redis: RedisSettings = field(default_factory=RedisSettings)
    cluster: ClusterSettings = field(default_factory=ClusterSettings)
    link: LinkSettings = field(default_factory=LinkSettings)
    shard: ShardSettings = field(default_factory=ShardSettings)
    gateway: GatewaySettings = field(default_factory=GatewaySettings)
    ingress: IngressSettings = field(default_factory=IngressSettings)
    push: PushSettings = field(default_factory=PushSettings)
    router: RouterSettings = field(default_factory=RouterSettings)
    presence: PresenceSettings = field(default_factory=PresenceSettings)
    template: TemplateSettings = field(default_factory=TemplateSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    inbound: InboundSettings = field(default_factory=InboundSettings)
    broadcast: BroadcastSettings = field(default_factory=BroadcastSettings)
    archive: ArchiveSettings = field(default_factory=ArchiveSettings)
    merge: MergeSettings = field(default_factory=MergeSettings)

    def __post_init__(self) -> None:
        for section in dataclasses.fields(self):
            _check_bounds(section.name, getattr(self, section.name))
        for name, section in (("gateway", self.gateway), ("ingress", self.ingress)):
            if bool(section.tls_cert_file) != bool(section.tls_key_file):
                raise SettingsError(
                    f"expected {name}.tls_cert_file and {name}.tls_key_file together, got one of them"
                )
        if self.cluster.lease_timeout_s < 2 * self.cluster.lease_renew_s:
            raise SettingsError(
                "expected cluster.lease_timeout_s to be at least twice cluster.lease_renew_s, got "
                f"{self.cluster.lease_timeout_s} and {self.cluster.lease_renew_s}: "
                "one late renewal would move slots"
            )
        if self.shard.when_away not in WHEN_AWAY:
            raise SettingsError(
                f"expected shard.when_away to be {'|'.join(WHEN_AWAY)}, got {self.shard.when_away!r}"
            )
        if self.presence.watch not in ("nobody", "tenant"):
            raise SettingsError(f"expected presence.watch to be nobody|tenant, got {self.presence.watch!r}")
        if self.broadcast.chunk_max < self.broadcast.chunk_min:
            raise SettingsError(
                "expected broadcast.chunk_max to be at least broadcast.chunk_min, got "
                f"{self.broadcast.chunk_max} and {self.broadcast.chunk_min}"
            )
        if self.link.reconnect_max_s < self.link.reconnect_min_s:
            raise SettingsError(
                "expected link.reconnect_max_s to be at least link.reconnect_min_s, got "
                f"{self.link.reconnect_max_s} and {self.link.reconnect_min_s}"
            )
        if self.archive.run_at and _TIME_OF_DAY.fullmatch(self.archive.run_at) is None:
            raise SettingsError(f"expected archive.run_at to be HH:MM, got {self.archive.run_at!r}")
        if self.merge.keep_s < self.shard.idempotency_ttl_s:
            raise SettingsError(
                "expected merge.keep_s to be at least shard.idempotency_ttl_s, got "
                f"{self.merge.keep_s} and {self.shard.idempotency_ttl_s}: a replay would not be recognised"
            )
        if self.push.max_senders < self.push.min_senders:
            raise SettingsError(
                "expected push.max_senders to be at least push.min_senders, got "
                f"{self.push.max_senders} and {self.push.min_senders}"
            )

    def with_values(self, **sections: Mapping[str, Any]) -> Settings:
        """A copy with some fields replaced: `with_values(gateway={"port": 0})`. Raises SettingsError."""
        changes: dict[str, Any] = {}
        for name, values in sections.items():
            try:
                changes[name] = dataclasses.replace(getattr(self, name), **values)
            except (AttributeError, TypeError) as exc:
                raise SettingsError(f"unknown setting in section {name!r}: {exc}") from exc
        return dataclasses.replace(self, **changes)


def _check_bounds(section: str, values: Any) -> None:
    for f in dataclasses.fields(values):
        value, low, high = getattr(values, f.name), f.metadata["low"], f.metadata["high"]
        unit = f" {f.metadata['unit']}" if f.metadata["unit"] else ""
        if low is not None and value < low:
            raise SettingsError(f"expected {section}.{f.name} to be at least {low}{unit}, got {value}")
        if high is not None and value > high:
            raise SettingsError(f"expected {section}.{f.name} to be at most {high}{unit}, got {value}")


def _parse(name: str, kind: Any, text: Any) -> Any:
    try:
        if kind is bool:
            word = str(text).lower()
            if word not in {"1", "0", "true", "false", "yes", "no"}:
                raise ValueError
            return word in {"1", "true", "yes"}
        if kind is not str and (isinstance(text, bool) or (kind is int and isinstance(text, float))):
            raise ValueError  # int() would round 80.5 and take true for 1
        value: Any = kind(text)
        if kind is float and not math.isfinite(value):
            raise ValueError  # nan passes every bound
        return value
    except (TypeError, ValueError):
        names: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false"}
        wanted = names.get(kind, "text")
        raise SettingsError(f"expected {name} to be {wanted}, got {text!r}") from None


def load_settings(environ: Mapping[str, str], config_path: Path | None = None) -> Settings:
    """Build the tree from a TOML file and environment variables.

    Args:
        environ: usually `os.environ`, read by the driver only.
        config_path: TOML file; None means the one named by `CARILLON_CONFIG`, if any.

    Raises:
        SettingsError: a value has the wrong type, breaks a bound, or names no setting.
    """
    if config_path is None and environ.get("CARILLON_CONFIG"):
        config_path = Path(environ["CARILLON_CONFIG"])
    document: dict[str, Any] = {}
    if config_path is not None:
        try:
            document = tomllib.loads(config_path.read_text())
        except OSError as exc:
            raise SettingsError(f"cannot read the settings file {config_path}: {exc.strerror}") from exc
        except tomllib.TOMLDecodeError as exc:
            raise SettingsError(f"expected {config_path} to be TOML: {exc}") from exc
    sections = {f.name: f.default_factory for f in dataclasses.fields(Settings)}
    for name in document:
        if name not in sections:
            raise SettingsError(f"unknown section [{name}] in {config_path}; known: {', '.join(sections)}")
        if not isinstance(document[name], dict):
            raise SettingsError(f"expected [{name}] in {config_path} to be a table, got {document[name]!r}")
    built: dict[str, Any] = {}
    known_variables: set[str] = {"CARILLON_CONFIG"}
    for name, make in sections.items():
        assert callable(make)
        kinds = get_type_hints(make)
        values: dict[str, Any] = {}
        for key, value in document.get(name, {}).items():
            if key not in kinds:
                raise SettingsError(f"unknown setting {name}.{key} in {config_path}")
            values[key] = _parse(f"{name}.{key}", kinds[key], value)
        for key, kind in kinds.items():
            variable = f"CARILLON_{name}_{key}".upper()
            known_variables.add(variable)
            if variable in environ:
                values[key] = _parse(variable, kind, environ[variable])
        built[name] = make(**values)
    prefixes = tuple(f"CARILLON_{name}_".upper() for name in sections)
    for variable in environ:
        if variable.startswith(prefixes) and variable not in known_variables:
            raise SettingsError(f"unknown setting {variable}; docs/reference/settings.md lists them")
    return Settings(**built)
