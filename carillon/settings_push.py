"""Settings of push."""

from __future__ import annotations

from dataclasses import dataclass

from carillon.settings_fields import setting


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
    digest_items: int = setting(
        1000,
        "Items of a due digest that are looked at one by one beside those of a batch, the newest ones. "
        "Older ones are told with them, in the count.",
        low=1,
        high=10_000,
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
    fcm_android_channels: str = setting(
        "carillon",
        "What a user wants without sound or vibration names the Android notification channel "
        "PREFIX_no_sound, PREFIX_no_vibration or PREFIX_no_sound_no_vibration; empty means none is named.",
    )
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
