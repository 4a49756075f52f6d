"""Settings of the doors: sockets, HTTP, and events that others bring."""

from __future__ import annotations

from dataclasses import dataclass

from carillon.settings_fields import setting


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
    policy_wait_s: float = setting(
        2.0,
        "A changed policy is answered once all shards decide by it, or after so long.",
        low=0.05,
        high=30.0,
        unit="s",
    )
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
    dry_run_sample: int = setting(
        100,
        "Subscribers for whom the dry run of an event with a topic makes plans; 0: they are counted alone.",
        low=0,
        high=1000,
    )
    max_attributes_bytes: int = setting(
        16_384, "Longest attributes of a user's profile, as JSON.", low=2, high=1_048_576
    )
    max_in_flight: int = setting(4096, "Requests at once before 503.", low=1)
    tenant_in_flight: int = setting(
        3072,
        "Requests of one tenant at once before its next is answered 503; others have the rest of "
        "`ingress.max_in_flight` (as many or more are no bound).",
        low=1,
    )
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
