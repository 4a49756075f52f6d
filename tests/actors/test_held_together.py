"""What was held and is told together, on a real shard: in whose words, and who speaks when one ends."""

from __future__ import annotations

import json
import os
import uuid
from typing import Any

import pytest

from carillon.clock import rfc3339
from carillon.ids import slot_of
from carillon.messages import (
    Amend,
    Change,
    DevicePut,
    Event,
    PreferencesPut,
    PushJob,
    PushLeft,
    PushOutcome,
    PushResult,
)
from carillon.notification import encode_content
from tests.actors.shard_kit import Kit, make_event
from tests.support import eventually

WORDS = {
    "params": {"count": {}, "titles": {}},
    "content": {
        "default": {"title": "{{ count | plural({'one': '# message', 'other': '# messages'}) }}"},
        "pt": {
            "title": "{{ count | plural({'one': '# mensagem', 'other': '# mensagens'}) }}",
            "body": "{{ titles | join(', ') }}",
        },
    },
}


async def phone(kit: Kit, user: str = "u", locale: str | None = None) -> None:
    put = DevicePut("t", user, slot_of("t", user), "phone", "android", "fcm", "token", f"tok-{user}", "app")
    put.locale = locale
    await kit.router.link.request(put)


async def silence(kit: Kit, user: str = "u") -> None:
    """Do-not-disturb for an hour."""
    document = json.dumps({"doNotDisturbUntil": rfc3339(kit.clock.now_ms() + 3_600_000)})
    await kit.router.link.request(PreferencesPut("t", user, slot_of("t", user), document))


async def held(kit: Kit, count: int, **more: Any) -> list[Event]:
    """So many wait, and then do not: all are told by one push, which is on its way."""
    await phone(kit)
    await silence(kit)
    events = [make_event(title=f"number {n}", **more) for n in range(count)]
    await kit.publish(*events)
    kit.skip(3601)
    await pushed(kit, 1)
    return events


async def pushed(kit: Kit, count: int) -> PushJob:
    await eventually(lambda: len(kit.router.jobs) == count, what=f"push {count}")
    return kit.router.jobs[-1]


async def answer(kit: Kit, job: PushJob, outcome: str) -> None:
    """What the provider made of it."""
    results = [PushResult(target.device, outcome, error="UNAVAILABLE") for target in job.targets]
    told = PushOutcome(
        job.delivery, job.attempt, job.tenant, job.user, job.slot, job.notification, job.provider, results
    )
    await kit.router.link.request(told)


async def act(kit: Kit, how: str, event: Event) -> None:
    """A service, the user or time ends a notification."""
    slot = slot_of("t", "u")
    if how in ("retract", "cancel"):
        await kit.router.link.request(Amend("t", "u", slot, how, event.id, os.urandom(16), "key:k"))
    elif how == "expire":
        late = "update notifications set expires_at = now() where id = $1"
        await kit.db.execute(late, uuid.UUID(bytes=event.id))
        await kit.db.execute("update deliveries set due_at = now() where state = 'failed'")
    else:
        await kit.router.link.request(Change("t", "u", slot, how, [event.id]))
    kit.shard._outbox.due_now()


async def settled(kit: Kit) -> list[tuple[int, str, str | None]]:
    """Once nothing waits any more: (seq, state, reason) of all pushes."""
    waits = "select count(*) = 0 from deliveries where state in ('planned', 'sending', 'failed', 'unknown')"
    await eventually(lambda: kit.db.fetchval(waits), what="an outbox without anything to do")
    found = await kit.db.fetch(
        "select n.seq, d.state, d.reason from deliveries d join notifications n on n.id = d.notification_id"
        " where d.channel <> 'withdraw' order by n.seq"
    )
    return [tuple(row) for row in found]


def merged_into(event: Event) -> str:
    return f"merged into {uuid.UUID(bytes=event.id)}"


async def test_held_pushes_speak_the_tenants_words_in_the_users_language(postgres_dsn: str) -> None:
    """pt-BR falls back to pt, French to the default: plurals, titles; the link stays that of the newest."""
    async with Kit(postgres_dsn, delivery_lease_s=600.0, push={"digest_render_s": 60.0}) as kit:
        await kit.db.execute(
            "insert into tenants (tenant, client_secret, settings) values ('t', $1, $2::jsonb)",
            "x" * 32,
            json.dumps({"policy": {"held": {"template": "held"}}}),
        )
        await kit.db.execute(
            "insert into templates (tenant, template_id, version, document, created_by)"
            " values ('t', 'held', 1, $1, 'test')",
            json.dumps(WORDS),
        )
        for user, locale in (("ana", "pt-BR"), ("zoe", "fr"), ("one", "pt-BR")):
            await phone(kit, user, locale)
            await silence(kit, user)
        for user, count in (("ana", 3), ("zoe", 2), ("one", 1)):
            contents = [encode_content({"title": f"n{n}", "link": f"https://x/{n}"}) for n in range(count)]
            await kit.publish(*(make_event(user, content=content) for content in contents))
        kit.skip(3601)
        await pushed(kit, 3)
        told = {job.user: (job.title, job.body, job.link, job.count) for job in kit.router.jobs}
        assert told == {
            "ana": ("3 mensagens", "n2, n1, n0", "https://x/2", 3),
            "zoe": ("2 messages", None, "https://x/1", 2),
            "one": ("n0", None, "https://x/0", 1),
        }


async def test_held_pushes_speak_our_words_if_the_tenants_fail(postgres_dsn: str) -> None:
    """The template is gone: what was held is told all the same."""
    async with Kit(postgres_dsn) as kit:
        await kit.db.execute(
            "insert into tenants (tenant, client_secret, settings) values ('t', $1, $2::jsonb)",
            "x" * 32,
            json.dumps({"policy": {"held": {"template": "none"}}}),
        )
        await held(kit, 2)
        assert [(job.title, job.body) for job in kit.router.jobs] == [("2 new notifications", "number 1")]


@pytest.mark.parametrize("how", ["retract", "cancel", "expire", "read", "dismiss"])
async def test_the_next_speaks_when_the_one_that_spoke_ends_untold(postgres_dsn: str, how: str) -> None:
    """The push for three failed and is to be tried again, its own notification ends: one tells the others."""
    async with Kit(postgres_dsn, push={"backoff_s": 600.0}) as kit:
        events = await held(kit, 3)
        await answer(kit, kit.router.jobs[0], "failed")
        await act(kit, how, events[2])
        job = await pushed(kit, 2)
        assert (job.notification, job.title, job.body) == (events[1].id, "2 new notifications", "number 1")
        await answer(kit, job, "sent")
        found = await settled(kit)
        assert found[:2] == [(1, "cancelled", merged_into(events[1])), (2, "sent", None)]
        assert found[2][1] == "cancelled"


async def test_what_expired_while_another_spoke_for_it_says_so(postgres_dsn: str) -> None:
    """The push for three failed, one expires, the one that spoke is cancelled: told is what is left."""
    async with Kit(postgres_dsn, push={"backoff_s": 600.0}) as kit:
        events = await held(kit, 3)
        await answer(kit, kit.router.jobs[0], "failed")
        late = "update notifications set expires_at = now() where id = $1"
        await kit.db.execute(late, uuid.UUID(bytes=events[0].id))
        await act(kit, "cancel", events[2])
        job = await pushed(kit, 2)
        assert (job.notification, job.title, job.count) == (events[1].id, "number 1", 1)
        await answer(kit, job, "sent")
        assert await settled(kit) == [
            (1, "cancelled", "expired"),
            (2, "sent", None),
            (3, "cancelled", "cancelled"),
        ]


async def test_the_next_speaks_when_the_one_that_spoke_ends_on_its_way(postgres_dsn: str) -> None:
    """Cancelled while the provider has it, and it did not take it: the others are told."""
    async with Kit(postgres_dsn) as kit:
        events = await held(kit, 3)
        await act(kit, "cancel", events[2])
        await answer(kit, kit.router.jobs[0], "failed")
        job = await pushed(kit, 2)
        assert (job.notification, job.title) == (events[1].id, "2 new notifications")
        await answer(kit, job, "sent")
        assert [state for _, state, _ in await settled(kit)] == ["cancelled", "sent", "cancelled"]


async def test_the_next_speaks_when_the_one_that_spoke_comes_back_and_is_put_away(postgres_dsn: str) -> None:
    """Read while it was on its way, taken by nobody, dismissed before its next try: the next one speaks."""
    async with Kit(postgres_dsn, push={"backoff_s": 600.0}) as kit:
        events = await held(kit, 3)
        job = kit.router.jobs[0]
        await act(kit, "read", events[2])
        kit.router.link.send_nowait(PushLeft(job.provider, "away", [job.delivery], [job.attempt]))
        back = "select count(*) = 1 from deliveries where state = 'planned' and gate = 'withdrawn'"
        await eventually(lambda: kit.db.fetchval(back), what="the push that came back")
        await act(kit, "dismiss", events[2])
        ended = "select array_agg(carrier = id) from deliveries where reason = 'dismissed'"
        assert await kit.db.fetchval(ended) == [True]
        silent = """select count(*) from deliveries d join deliveries c on c.id = d.carrier
                    where c.reason = 'dismissed' and d.id <> c.id"""
        assert await kit.db.fetchval(silent) == 0, "nobody waits for the one that was put away"


async def test_what_is_retracted_does_not_take_the_others_off_the_phone(postgres_dsn: str) -> None:
    """The phone shows "3 new notifications", the newest is retracted: that goes, and the others are told."""
    async with Kit(postgres_dsn) as kit:
        events = await held(kit, 3)
        await answer(kit, kit.router.jobs[0], "sent")
        await act(kit, "retract", events[2])
        await pushed(kit, 3)
        (back,) = (job for job in kit.router.jobs if job.withdraw)
        (again,) = (job for job in kit.router.jobs[1:] if not job.withdraw)
        assert back.notification == events[2].id
        assert (again.notification, again.title) == (events[1].id, "2 new notifications")


async def test_who_read_the_newest_of_what_the_phone_shows_is_not_disturbed_again(postgres_dsn: str) -> None:
    """It was told, and the user is through with it: the banner goes, nothing comes."""
    async with Kit(postgres_dsn) as kit:
        events = await held(kit, 3)
        await answer(kit, kit.router.jobs[0], "sent")
        await act(kit, "read", events[2])
        job = await pushed(kit, 2)
        assert job.withdraw
        await answer(kit, job, "sent")
        assert [state for _, state, _ in await settled(kit)] == ["cancelled", "cancelled", "sent"]
        assert len(kit.router.jobs) == 2


async def test_nobody_speaks_for_what_the_user_is_through_with(postgres_dsn: str) -> None:
    """Two were read, then the one that spoke is cancelled: nothing is left to tell."""
    async with Kit(postgres_dsn, push={"backoff_s": 600.0}) as kit:
        events = await held(kit, 3)
        await answer(kit, kit.router.jobs[0], "failed")
        for event in events[:2]:
            await act(kit, "read", event)
        await act(kit, "cancel", events[2])
        assert [state for _, state, _ in await settled(kit)] == ["cancelled"] * 3
        assert len(kit.router.jobs) == 1


async def test_who_speaks_in_the_end_speaks_for_all(postgres_dsn: str) -> None:
    """Held again before it was sent, told with later ones: when that one ends, nobody of either is lost."""
    async with Kit(postgres_dsn, push={"backoff_s": 600.0}) as kit:
        await held(kit, 2)
        await answer(kit, kit.router.jobs[0], "failed")
        await kit.db.execute(
            "update deliveries set state = 'planned', attempts = 0, due_at = now() where state = 'failed'"
        )
        await silence(kit)
        late = make_event(title="late")
        await kit.publish(late)
        kit.shard._outbox.due_now()
        held_again = "select count(*) = 2 from deliveries where state = 'planned' and due_at > now()"
        await eventually(lambda: kit.db.fetchval(held_again), what="the hold")
        kit.skip(3601)
        job = await pushed(kit, 2)
        assert (job.notification, job.title, job.count) == (late.id, "3 new notifications", 3)
        await answer(kit, job, "failed")
        await act(kit, "retract", late)
        job = await pushed(kit, 3)
        assert (job.title, job.body, job.count) == ("2 new notifications", "number 1", 2)
