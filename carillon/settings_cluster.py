"""Settings of membership, of links between actors, and of the router."""

from __future__ import annotations

from dataclasses import dataclass

from carillon.settings_fields import setting


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
    spare_process: bool = setting(
        False, "Keep an idle process of Ray on each node (110 MB), for the next actor that starts there."
    )
    spare_delay_s: float = setting(
        3.0, "So long after an actor joined, its node's spare process is looked after.", low=0.0, unit="s"
    )
    start_niceness: int = setting(
        10,
        "Niceness of an actor's new process while it imports: how far it steps back behind others.",
        low=0,
        high=19,
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
class RouterSettings:
    """The actor between ingress and shards."""

    max_outstanding: int = setting(
        20_000, "Events on the way to one shard before further ones are answered busy.", low=1
    )
    max_held: int = setting(
        20_000, "Events that wait for their slot to have an owner; more are answered busy.", low=0
    )
    max_batch: int = setting(1000, "Events of one message to a shard.", low=1, high=10_000)
    release_batch: int = setting(
        64,
        "Events that waited for their slot and go on at once, when its owner is there; the others follow.",
        low=1,
    )
    release_pause_s: float = setting(
        0.005,
        "Pause between them: what is new for other users comes in between.",
        low=0.0,
        high=1.0,
        unit="s",
    )
    max_passing: int = setting(
        10_000, "Other requests passed on at once before further ones are answered busy.", low=1
    )
