"""Actors that do nothing but be members: what Ray workers import in the tests of the shell."""

from __future__ import annotations

from typing import Any

from actors.config import ActorConfig
from actors.coordinator import Coordinator
from actors.member import Membership
from actors.ray_shell import ActorShell, CoordinatorActor
from carillon.errors import ClusterError
from carillon.metrics import Stats


class PlainMember:
    """Joins, and takes no message."""

    def __init__(self, config: ActorConfig) -> None:
        self.membership = Membership(config, self, stats=Stats())

    def link_opened(self, link: Any) -> None: ...

    def link_closed(self, link: Any) -> None: ...

    def receive(self, link: Any, message: Any, request: int) -> None: ...

    def read_finished(self, link: Any) -> None: ...

    async def start(self) -> None:
        await self.membership.start()

    async def status(self) -> dict[str, Any]:
        return {"version": self.membership.map.version}

    async def stop(self) -> None:
        await self.membership.close(leave=True)


class BrokenMember(PlainMember):
    """Cannot start."""

    async def start(self) -> None:
        raise ClusterError("the disk is full")


class LonelyCoordinator(Coordinator):
    """Starts no actors."""

    def __init__(self, config: ActorConfig) -> None:
        super().__init__(config, spawn=False)


class PlainActor(ActorShell):
    path = "tests.actors.plain_members:PlainMember"


class BrokenActor(ActorShell):
    path = "tests.actors.plain_members:BrokenMember"


class LonelyCoordinatorActor(CoordinatorActor):
    path = "tests.actors.plain_members:LonelyCoordinator"
