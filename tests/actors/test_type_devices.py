"""A type whose push is for some kinds of devices alone."""

from __future__ import annotations

from carillon.ids import slot_of
from carillon.messages import DevicePut, PushTarget
from tests.actors.shard_kit import Kit, make_event
from tests.support import eventually

POLICY = '{"policy": {"types": {"offer": {"devices": ["ios"]}, "tv": {"devices": ["web"]}}}}'


def device(name: str, platform: str) -> DevicePut:
    return DevicePut("t", "u", slot_of("t", "u"), name, platform, "fcm", "token", name, "app")


def devices(targets: list[PushTarget]) -> list[str]:
    return [target.device for target in targets]


async def test_only_these_devices_get_its_push(postgres_dsn: str) -> None:
    """Another type goes to all; one that none of the user's devices may get is told to nobody."""
    async with Kit(postgres_dsn) as kit:
        await kit.db.execute(
            "insert into tenants (tenant, client_secret, settings) values ('t', repeat('s', 32), $1::jsonb)",
            POLICY,
        )
        await kit.router.link.request(device("phone", "ios"))
        await kit.router.link.request(device("pad", "android"))
        await kit.publish(make_event("u", type="offer"))
        await kit.publish(make_event("u", type="other"))
        await kit.publish(make_event("u", type="tv"))
        await eventually(lambda: len(kit.router.jobs) == 2)
        by_type = {job.type: devices(job.targets) for job in kit.router.jobs}
        assert by_type == {"offer": ["phone"], "other": ["pad", "phone"]}

        async def ended() -> bool:
            return await kit.db.fetchval(
                "select count(*) = 1 from deliveries d join notifications n on n.id = d.notification_id"
                " where n.type = 'tv' and d.state in ('cancelled', 'dead')"
            )

        await eventually(ended)
        assert len(kit.router.jobs) == 2
