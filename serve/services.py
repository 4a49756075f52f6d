"""What handlers work with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from actors.templates import Templates
from carillon.clock import Clock
from carillon.events import EventParser
from carillon.messages import Event, Message, Outcome, StatsReply
from carillon.metrics import Stats
from carillon.settings import Settings
from serve.auth import Authenticator
from serve.connections import Connections
from serve.tenant_shares import TenantShares
from stores.cached_feed import CachedFeed
from stores.postgres.audience import AudienceReader
from stores.postgres.broadcasts import BroadcastStore
from stores.postgres.dead_letters import DeadLetterReader
from stores.postgres.digests import DigestReader
from stores.postgres.export import Exporter
from stores.postgres.feed import FeedReader
from stores.postgres.inbound import InboundStore
from stores.postgres.schedules import ScheduleStore
from stores.postgres.search import SearchReader
from stores.postgres.segments import SegmentStore
from stores.postgres.tenants import TenantStore
from stores.postgres.tickets import TicketStore
from stores.postgres.topics import TopicStore
from stores.postgres.users import UserStore
from stores.redis.rate_limiter import RateLimiter


class Backend(Protocol):
    """The cluster behind the ingress (serve.backend.RouterBackend; tests have simpler ones)."""

    async def publish(self, events: list[Event], deadline: float) -> list[Outcome]:
        """See RouterBackend.publish."""
        ...

    async def request(self, message: Message, deadline: float) -> object:
        """See RouterBackend.request."""
        ...

    async def checks(self, timeout_s: float) -> dict[str, str]:
        """See RouterBackend.checks."""
        ...

    async def stats_reply(self, timeout_s: float) -> StatsReply:
        """See RouterBackend.stats_reply."""
        ...

    def gateways(self) -> list[str]:
        """What clients dial: the public URLs of all gateways."""
        ...


@dataclass
class Services:
    """Shared by all handlers of one replica."""

    settings: Settings
    clock: Clock
    stats: Stats
    parser: EventParser
    auth: Authenticator
    feed: FeedReader
    tenants: TenantStore
    backend: Backend
    tickets: TicketStore
    limits: RateLimiter
    templates: Templates
    schedules: ScheduleStore
    broadcasts: BroadcastStore
    inbound: InboundStore
    dead_letters: DeadLetterReader
    feeds: CachedFeed
    search: SearchReader
    users: UserStore
    exporter: Exporter
    topics: TopicStore
    segments: SegmentStore
    audiences: AudienceReader
    digests: DigestReader
    shares: TenantShares
    in_flight: int = 0
    draining: bool = False
    connections: Connections | None = None
    """Streams and long polls; None: there are none here."""
    url: str = ""
    """Of the replica's own door."""
    cluster_tag: str = ""
    """Says which cluster a door belongs to (GET /healthz), without telling its secret."""
