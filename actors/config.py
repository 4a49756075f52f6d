"""What every actor is built from."""

from __future__ import annotations

from dataclasses import dataclass, field

from carillon.messages import Address
from carillon.settings import Settings

COORDINATOR_NAME = "coordinator"
"""Name of the coordinator's Ray actor in `settings.cluster.namespace`, and of its end of a link."""


@dataclass(frozen=True)
class ActorConfig:
    """Identity and settings of one actor. Pickled by the driver, so plain data only."""

    kind: str
    """router | shard | gateway | pool | ingress | other."""
    name: str
    """Unique in the cluster and stable over restarts, e.g. "shard-<node>-0"."""
    node: str
    """Ray node id (hex); "local" in tests without Ray."""
    settings: Settings
    secret: bytes
    """The cluster secret: both ends of every link prove that they know it."""
    labels: dict[str, str] = field(default_factory=dict)
    """What else others select this actor by, e.g. a pool's {"provider": "fcm"}."""
    coordinator: Address | None = None
    """Fixed address of the coordinator (tests). None: ask the Ray actor named "coordinator"."""

    def __repr__(self) -> str:  # the secret must not reach a log
        return f"ActorConfig(kind={self.kind!r}, name={self.name!r}, node={self.node!r})"
