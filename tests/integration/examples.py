"""The worked examples of the documents, as calls of a real system: what is asked, and what it answered.

Each example writes a transcript. `tests/integration/test_worked_examples.py` holds it against the page that
shows it, and writes it there when it is asked to (WRITE_EXAMPLES=1).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import textwrap
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import httpx
import redis.asyncio as aioredis
from websockets.asyncio.client import ClientConnection, connect

from carillon.clock import SystemClock, rfc3339
from cluster.cli import main
from tests.integration.client_world import ClientWorld
from tests.support import eventually

HOUR: Final = 3_600_000
_WIDTH: Final = 150
_ANSWER: Final = ("id", "status", "channels", "reason")
_PLAN: Final = ("status", "channels", "reason", "pushDueAt", "silent", "rules")
_WHY: Final = ("channels", "rules", "words")


class Transcript:
    """What was asked of a system, and what it answered, as it stands in a document."""

    def __init__(self, world: ClientWorld, http: httpx.AsyncClient) -> None:
        self.world = world
        self._http = http
        self._lines: list[str] = []

    def text(self) -> str:
        """The transcript."""
        return "\n".join(self._lines).strip("\n")

    def say(self, text: str) -> None:
        """A line that is no call."""
        self._lines += [text, ""]

    async def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        status: int = 200,
        only: tuple[str, ...] | None = None,
        show: bool = True,
        token: str | None = None,
        shown_path: str | None = None,
    ) -> Any:
        """Call the system and note it.

        Args:
            only: members of the answer that are shown; (): none, the answer is of no interest.
            token: of a user's device, instead of the service's key.
            shown_path: instead of the path, which has an id that nobody has seen yet.
        """
        answer = await self._http.request(
            method,
            f"{self.world.url}{path}",
            json=body,
            headers={"Authorization": f"Bearer {token or self.world.key}"},
        )
        assert answer.status_code == status, answer.text
        told = answer.json()
        if show:
            self.note(f"{method} {shown_path or path}", body)
            if only != ():
                self.note(f"{status}", told, only)
            self._lines.append("")
        return told

    def note(self, head: str, body: Any, only: tuple[str, ...] | None = None) -> None:
        """One line, wrapped: what was said, and its JSON."""
        if body is None:
            self._lines.append(head)
            return
        text = f"{head} {shown(body, only)}"
        self._lines += [
            line.replace("\N{NO-BREAK SPACE}", " ")
            for part in text.split("\n")
            for line in textwrap.wrap(
                part, _WIDTH, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
            )
        ]

    # -- what the examples have in common ----------------------------------------------------------

    async def phone(self, user: str = "ada") -> None:
        """The user has a phone."""
        target = {"platform": "android", "provider": "fcm", "token": f"phone of {user}"}
        await self.call("PUT", f"/v1/users/{user}/devices/phone", target, show=False)

    async def prefer(self, user: str = "ada", /, **document: Any) -> None:
        """The user's preferences."""
        await self.call("PUT", f"/v1/users/{user}/preferences", document, only=())

    async def policy(self, **document: Any) -> None:
        """The tenant's policy."""
        await self.call("PUT", "/v1/policy", document, only=())

    async def event(self, show: bool = True, status: int = 202, **members: Any) -> Any:
        """Send an event."""
        body = {"userId": "ada"} | members
        return await self.call("POST", "/v1/events", body, status=status, only=_ANSWER, show=show)

    async def dry(self, **members: Any) -> Any:
        """Ask what would become of an event."""
        return await self.call("POST", "/v1/events?dryRun=true", {"userId": "ada"} | members, only=_PLAN)

    async def explain(self, told: Any, only: tuple[str, ...] = _WHY) -> Any:
        """Ask why."""
        return await self.call("GET", f"/v1/notifications/{told['id']}/explain", only=only)

    async def token(self, user: str = "ada") -> str:
        """A token of a user's device."""
        told = await self.call("POST", "/v1/tokens", {"userId": user}, status=201, show=False)
        return told["token"]

    @contextlib.asynccontextmanager
    async def browser(self, user: str = "ada", **looks: Any) -> AsyncIterator[ClientConnection]:
        """The user has a page open and tells where the user looks."""
        headers = {"Authorization": f"Bearer {await self.token(user)}"}
        async with connect(
            f"{self.world.ws_url}?deviceId=browser",
            additional_headers=headers,
            subprotocols=["carillon.v1.json"],  # type: ignore[list-item]
        ) as socket:
            if looks:
                frame = {"type": "VISIBILITY", **looks}
                await socket.send(json.dumps(frame))
                self.say(f"browser -> {json.dumps(frame)}")
            # An answer to what came behind it: it has been heard.
            await socket.send(json.dumps({"type": "PING"}))
            yield socket


def shown(value: Any, only: tuple[str, ...] | None = None) -> str:
    """JSON as documents have it: of an object only some members, each rule on a line of its own."""
    if only is None or not isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    members = [
        f'"rules":\N{NO-BREAK SPACE}[{_rules(value[name])}]'
        if name == "rules"
        else f'"{name}": {shown(value[name])}'
        for name in only
        if name in value
    ]
    left = [name for name in value if name not in only]
    return "{" + ", ".join([*members, *(["…"] if left else [])]) + "}"


def _rules(rules: list[dict[str, Any]]) -> str:
    """What a rule has, without members that are empty."""
    lines = [
        json.dumps({name: part for name, part in rule.items() if part not in (None, [])}, ensure_ascii=False)
        for rule in rules
    ]
    return "".join(f"\n   {line}," for line in lines)[:-1]


def clock_around(before_h: int = 1, after_h: int = 1) -> dict[str, str]:
    """Quiet hours that it is now, in UTC."""
    now = datetime.now(UTC).replace(minute=0)
    start, end = now - timedelta(hours=before_h), now + timedelta(hours=after_h + 1)
    return {"start": f"{start:%H:%M}", "end": f"{end:%H:%M}", "timezone": "UTC"}


def ahead(ms: int) -> str:
    """A time to come, in whole seconds."""
    return rfc3339((SystemClock().now_ms() + ms) // 1000 * 1000)


# -- switches -----------------------------------------------------------------------------------------


async def switches(t: Transcript) -> None:
    await t.phone()
    await t.prefer(
        types={"game.tip": False, "chat.message": {"push": False}},
        categories={"marketing": False, "social": {"push": False}},
    )
    for members in (
        {"type": "game.tip", "title": "Try the new level"},
        {"type": "offer", "category": "marketing", "title": "Ten seats more"},
        {"type": "chat.message", "title": "Grace wrote to you"},
        {"type": "post.like", "category": "social", "title": "Grace liked your post"},
    ):
        await t.explain(await t.event(**members))
    await t.prefer(channels={"push": False})
    await t.explain(await t.event(type="build.done", title="Build 4711 has finished"))
    await t.prefer(**{"global": False})
    await t.explain(await t.event(type="build.done", title="Build 4712 has finished"))


async def emergency_only(t: Transcript) -> None:
    await t.phone()
    await t.prefer(channels={"push": {"emergencyOnly": True}})
    await t.explain(await t.event(type="build.done", title="Build 4711 has finished"))
    await t.explain(
        await t.event(type="server.down", priority="urgent", title="db1 is down"), ("channels", "rules")
    )


async def priority(t: Transcript) -> None:
    await t.phone()
    await t.prefer(categories={"pager": {"priority": "urgent"}}, quietHours=clock_around())
    await t.dry(type="job.done", title="Backup is done")
    told = await t.event(type="disk.full", category="pager", title="Disk full on db1")
    await t.explain(told, ("channels", "rules"))


async def forced(t: Transcript) -> None:
    await t.policy(forced={"categories": {"security": True}, "types": {"test.ping": {"push": False}}})
    await t.phone()
    await t.prefer(**{"global": False, "quietHours": clock_around()})
    told = await t.event(type="login.new", category="security", title="New login from Lima")
    await t.explain(told, ("channels", "rules"))
    await t.prefer(types={"test.ping": {"push": True}})
    await t.explain(await t.event(type="test.ping", title="ping"))


# -- time ---------------------------------------------------------------------------------------------


async def do_not_disturb(t: Transcript) -> None:
    await t.phone()
    await t.prefer(doNotDisturbUntil=ahead(HOUR), quietHours=clock_around(0, 3))
    told = await t.event(type="chat.message", title="Grace wrote to you")
    await t.explain(told, ("channels", "rules", "words"))
    await t.prefer(doNotDisturbUntil=ahead(-HOUR))
    await t.dry(type="chat.message", title="Grace wrote to you")


async def quiet_hours(t: Transcript) -> None:
    await t.phone()
    await t.prefer(quietHours=clock_around())
    told = await t.event(type="comment.reply", title="Grace replied to you")
    await t.explain(told)
    await t.dry(type="server.down", priority="urgent", title="db1 is down")


async def type_window(t: Transcript) -> None:
    around = clock_around()
    await t.policy(types={"offer": {"window": {"start": around["end"], "end": around["start"]}}})
    await t.phone()
    told = await t.event(type="offer", title="Ten seats more")
    await t.explain(told)


async def digest(t: Transcript) -> None:
    await t.phone()
    at = f"{datetime.now(UTC) + timedelta(hours=12):%H:00}"
    await t.prefer(timezone="UTC", categories={"news": {"digest": {"frequency": "daily", "at": at}}})
    told = await t.event(type="article", category="news", title="Danube rises")
    await t.event(type="article", category="news", title="New tram line 18")
    await t.explain(told)


# -- limits -------------------------------------------------------------------------------------------


async def overflow_to_digest(t: Transcript) -> None:
    await t.policy(limits={"user": {"count": 2, "windowS": 3600}})
    await t.phone()
    for number in (1, 2):
        await t.event(type="post.like", title=f"Like {number}")
    told = await t.event(type="post.like", title="Like 3")
    await t.explain(told)


async def overflow_to_feed(t: Transcript) -> None:
    await t.policy(limits={"types": {"post.like": {"count": 1, "windowS": 600}}, "overflow": "feed"})
    await t.phone()
    await t.event(type="post.like", title="Like 1")
    told = await t.event(type="post.like", title="Like 2")
    await t.explain(told)
    await t.dry(userId="bob", type="post.like", title="Like 3")
    await t.dry(type="comment.reply", title="Grace replied to you")


async def _tenant_rate(t: Transcript, *words: str) -> None:
    """The operator's limit for the tenant, known to the door at once."""
    command = ["tenant", "limit", "acme", "--rate", "0.01", "--burst", "1", *words]
    assert await asyncio.to_thread(main, [*command, "--dsn", t.world.dsn]) == 0
    t.say(f"$ python -m cluster {' '.join(command)}")
    app = t.world.ingresses[0].app
    assert app is not None
    app.services.auth._keys.clear()


async def _offers(t: Transcript) -> Any:
    urgent = {"userId": "ada", "type": "login", "title": "New sign-in", "priority": "urgent"}
    offers = [{"userId": "ada", "type": "offer", "title": title} for title in ("Two for one", "Last chance")]
    return (await t.call("POST", "/v1/events", [*offers, urgent], status=202))["results"]


async def tenant_limit_to_feed(t: Transcript) -> None:
    await t.phone()
    await _tenant_rate(t, "--overflow", "feed")
    told = await _offers(t)
    await t.explain(told[0])
    await t.dry(type="login", title="New sign-in", priority="urgent")


async def tenant_limit_to_digest(t: Transcript) -> None:
    await t.phone()
    await _tenant_rate(t, "--overflow", "digest", "--collect", "3600")
    told = await _offers(t)
    await t.explain(told[0])
    await t.call("GET", "/v1/users/ada/digests")


# -- where the user is --------------------------------------------------------------------------------


async def nowhere(t: Transcript) -> None:
    await t.explain(await t.event(type="chat.message", title="Grace wrote to you"))
    await t.explain(await t.event(type="chat.typing", title="Grace types", channels=["in_app"]))
    await t.phone()
    for members in (
        {"type": "chat.message", "title": "Grace wrote to you"},
        {"type": "code", "title": "Your code is 4711", "channels": ["push"]},
        {"type": "server.down", "priority": "urgent", "title": "db1 is down"},
    ):
        await t.dry(**members)


async def connected(t: Transcript) -> None:
    await t.phone()
    reply = {"type": "comment.reply", "targetType": "post", "targetId": "42", "title": "Grace replied to you"}

    async def once(**looks: Any) -> None:
        async with t.browser(**looks) as socket:

            async def heard() -> bool:
                plan = await t.call("POST", "/v1/events?dryRun=true", {"userId": "ada"} | reply, show=False)
                rules = [(rule["rule"], rule["about"]) for rule in plan["rules"]]
                return rules == wanted

            wanted = [("live", None), wants[looks.get("viewing") or looks["state"]]]
            await eventually(heard)
            await t.dry(**reply)
            await socket.close()

    wants: dict[str, tuple[str, str | None]] = {
        "visible": ("acknowledgement", None), "post:42": ("viewing", None), "hidden": ("away", "hidden"),
    }  # fmt: skip
    await once(state="visible")
    await once(state="focused", viewing="post:42")
    await once(state="hidden")
    t.say("the browser is gone")

    async def left() -> bool:
        plan = await t.call("POST", "/v1/events?dryRun=true", {"userId": "ada"} | reply, show=False)
        return plan["rules"][0]["rule"] == "grace"

    await eventually(left)
    await t.dry(**reply)


async def expiry(t: Transcript) -> None:
    await t.phone()
    await t.prefer(doNotDisturbUntil=ahead(2 * HOUR))
    told = await t.event(type="taxi.here", title="Your taxi is here", expiresAt=ahead(HOUR))
    mine, path = await t.token(), f"/v1/notifications/{told['id']}"
    await t.call("GET", "/api/notifications/unread-count", token=mine, only=("count",))
    await t.call("PATCH", path, {"expiresAt": ahead(-1000)}, only=("id", "version"))
    await t.call("GET", "/api/notifications/unread-count", token=mine, only=("count",))
    await t.call("GET", "/api/notifications", token=mine)
    await t.call("PATCH", path, {"title": "It waits"}, status=409, only=("code", "detail"))


_FORETOLD: Final = ("status", "channels", "pushDueAt", "sendAt", "rules", "devices", "replayed", "words")


async def expires(t: Transcript) -> None:
    await t.phone()
    await t.prefer(doNotDisturbUntil=ahead(2 * HOUR))
    taxi = {"userId": "ada", "type": "taxi.here", "title": "Your taxi is here"}
    for ends in (ahead(HOUR), ahead(3 * HOUR), ahead(-HOUR)):
        event = taxi | {"expiresAt": ends}
        await t.call("POST", "/v1/events?dryRun=true", event, only=_FORETOLD)
        await t.explain(await t.event(**event))


async def foretold(t: Transcript) -> None:
    await t.phone()
    event = {"userId": "ada", "type": "report.weekly", "title": "Your week", "idempotencyKey": "week-47"}
    await t.call(
        "POST", "/v1/events?dryRun=true", event | {"scheduleAt": ahead(48 * HOUR)}, only=(*_FORETOLD, "then")
    )
    await t.event(**event)
    await t.call("POST", "/v1/events?dryRun=true", event, only=_FORETOLD)


async def closed(t: Transcript) -> None:
    await t.phone()
    await t.prefer(doNotDisturbUntil=ahead(HOUR))
    told = await t.event(type="game.tip", title="Try the new level")
    await t.prefer(types={"game.tip": {"push": False}})
    t.say("An hour later")
    await t.world.db.execute("update deliveries set due_at = now()")

    async def over() -> bool:
        why = await t.call("GET", f"/v1/notifications/{told['id']}/explain", show=False)
        return why["deliveries"][0]["state"] == "cancelled"

    await eventually(over, 20.0, what="the end of do-not-disturb")
    await t.explain(told, ("rules", "deliveries", "words"))


async def type_devices(t: Transcript) -> None:
    await t.phone()
    tablet = {"platform": "ios", "provider": "fcm", "token": "tablet of ada"}
    await t.call("PUT", "/v1/users/ada/devices/tablet", tablet, only=())
    await t.policy(types={"offer": {"devices": ["ios"]}, "tv.recording": {"devices": ["web"]}})
    for kind, title in (("offer", "Ten seats more"), ("tv.recording", "It is recorded")):
        event = {"userId": "ada", "type": kind, "title": title}
        await t.call("POST", "/v1/events?dryRun=true", event, only=_FORETOLD)
    told = await t.event(**event)

    async def over() -> bool:
        why = await t.call("GET", f"/v1/notifications/{told['id']}/explain", show=False)
        return why["deliveries"][0]["state"] == "cancelled"

    await eventually(over, what="the end of a push for nobody")
    await t.explain(told)


async def dry_topic(t: Transcript) -> None:
    await t.phone()
    users = {"userIds": ["ada", "bob", "cy"]}
    await t.call("POST", "/v1/topics/goal.alerts/subscribers", users, only=())
    event = {"topic": "goal.alerts", "type": "goal", "title": "1:0"}
    await t.call("POST", "/v1/events?dryRun=true", event)


# -- experiments --------------------------------------------------------------------------------------


async def experiment(t: Transcript) -> None:
    document = {
        "variants": [
            {"name": "plain", "weight": 70, "content": {"default": {"title": "Your invoice"}}},
            {
                "name": "friendly",
                "weight": 30,
                "content": {"default": {"title": "{{ who }}, your invoice is here"}},
            },
        ]
    }
    await t.call("PUT", "/v1/templates/invoice", document, only=("templateId", "version"))
    preview = {"params": {"who": "Ada"}, "userId": "ada"}
    await t.call("POST", "/v1/templates/invoice/preview", preview, only=("variant", "title"))
    users = [f"u{n}" for n in range(200)]
    many = {"userIds": users, "type": "invoice", "template": "invoice", "params": {"who": "you"}}
    told = await t.call("POST", "/v1/events", many, status=202, show=False)
    t.note("POST /v1/events", {**many, "userIds": ["u0", "u1", "…", "u199"]})
    statuses = {one["status"] for one in told["results"]}
    t.say(f'202 {{"results": [200 x {json.dumps(sorted(statuses))}]}}')
    friendly = 0
    for number, (user, one) in enumerate(zip(users, told["results"], strict=True)):
        note = await t.call("GET", f"/v1/notifications/{one['id']}", show=False)
        likes = note["notification"]["title"] != "Your invoice"
        friendly += likes
        # Half of those who are greeted click, and one in ten of the others.
        if number % 2 == 0 if likes else number % 10 == 0:
            mine = await t.token(user)
            await t.call("POST", f"/api/notifications/{one['id']}/click", {}, token=mine, show=False)
    t.say("some of them click")
    found = await t.call("GET", "/v1/templates/invoice/results", show=False)
    t.note("GET /v1/templates/invoice/results", None)
    t._lines.append('200 {"variants": [')
    for one in found["variants"]:
        rates = {
            name: {key: part if isinstance(part, int) else round(part, 3) for key, part in one[name].items()}
            for name in ("clicked",)
        }
        members = {name: one[name] for name in ("variant", "weight", "sent")} | rates
        t.note("  ", {**members, "delivered": 0}, tuple(members))
    t.say("]}")


# -- from outside, and later --------------------------------------------------------------------------


async def stripe(t: Transcript) -> None:
    secret = "whsec_test_of_the_documents"
    source = {
        "scheme": "stripe",
        "secret": secret,
        "when": "body.type == 'invoice.paid'",
        "event": {
            "userId": "{{ body.data.object.metadata.user }}",
            "type": "invoice.paid",
            "title": "Invoice {{ body.data.object.number }} is paid",
            "data": {"cents": "{{ body.data.object.amount_paid }}"},
        },
    }
    made = await t.call("PUT", "/v1/sources/stripe", source, only=("name", "path"))

    async def deliver(document: Any, sign_with: str, status: int, only: tuple[str, ...] | None) -> Any:
        body = json.dumps(document).encode()
        at_s = SystemClock().now_ms() // 1000
        signed = hmac.new(sign_with.encode(), f"{at_s}.".encode() + body, hashlib.sha256).hexdigest()
        answer = await t._http.post(
            f"{t.world.url}{made['path']}",
            content=body,
            headers={"Stripe-Signature": f"t={at_s},v1={signed}"},
        )
        assert answer.status_code == status, answer.text
        t._lines += [f"POST {made['path']}", f"Stripe-Signature: t={at_s},v1={signed}"]
        t._lines += textwrap.wrap(body.decode(), _WIDTH, subsequent_indent="    ")
        replayed = "idempotent-replayed" in answer.headers
        t.note(f"{status}{' (Idempotent-Replayed: true)' if replayed else ''}", answer.json(), only)
        t._lines.append("")
        return answer.json()

    paid = {
        "id": "evt_1",
        "type": "invoice.paid",
        "data": {"object": {"number": "A-17", "amount_paid": 4200, "metadata": {"user": "ada"}}},
    }
    told = await deliver(paid, secret, 202, ("id", "status"))
    again = await deliver(paid, secret, 202, ("id", "status"))
    assert again["id"] == told["id"]
    await deliver({"id": "evt_2", "type": "invoice.created"}, secret, 200, None)
    await deliver(paid, "whsec_of_somebody_else", 401, ("code", "detail"))
    await t.explain(told)


async def redis_stream(t: Transcript) -> None:
    client = aioredis.Redis.from_url(t.world.settings.redis.url)
    try:

        async def add(event: str) -> None:
            entry = await client.xadd("events", {"event": event})
            t._lines += [f"XADD events * event '{event}'", f'"{entry.decode()}"', ""]

        await add('{"userId": "ada", "type": "order.sent", "title": "Your order is on its way"}')
        mine = await t.token()

        async def feed() -> list[Any]:
            page = await t.call("GET", "/api/notifications", token=mine, show=False)
            return page["notifications"]

        (note,) = await eventually(feed)
        await t.explain(note)
        await add('{"userId": "ada"}')

        async def dead() -> list[Any]:
            return await client.xrange("events.dead")

        ((entry, fields),) = await eventually(dead)
        t._lines.append("XRANGE events.dead - +")
        t._lines.append(f'"{entry.decode()}" reason: {fields[b"reason"].decode()}')
        t.say(f"    entry: {fields[b'entry'].decode()}")

        async def acknowledged() -> bool:
            return (await client.xpending("events", "carillon"))["pending"] == 0

        await eventually(acknowledged)
        t.say("XPENDING events carillon: nothing, both are acknowledged")
    finally:
        await client.aclose()


async def schedules(t: Transcript) -> None:
    begin = datetime.now(UTC).replace(second=0, microsecond=0) - timedelta(hours=9, minutes=30)
    event = {"userId": "ada", "type": "report", "title": "Your hourly report"}
    rule = {"localAt": f"{begin:%Y-%m-%dT%H:%M:%S}", "rrule": "FREQ=HOURLY", "event": event}
    told = ("scheduleId", "state", "nextAt", "fired", "missed", "result")
    made = await t.call("POST", "/v1/schedules", rule, status=201, only=told)
    once = {"userId": "ada", "type": "trial.ends", "title": "Your trial ends", "scheduleAt": ahead(24 * HOUR)}
    await t.call("POST", "/v1/events", once, status=202, only=("id", "status"))

    async def listed() -> None:
        found = await t.call("GET", "/v1/schedules?userId=ada", show=False)
        t.note("GET /v1/schedules?userId=ada", None)
        t._lines.append('200 {"schedules": [')
        for one in found["schedules"]:
            t.note("  ", one, told)
        t.say("]}")

    await listed()
    t.say(
        "# the shard was away for five hours: the next time was put back in the database, as it finds it then"
    )
    await t.world.db.execute(
        "update schedules set next_at = next_at - interval '5 hours', due_at = due_at - interval '5 hours'"
        " where rule::text like '%HOURLY%'"
    )

    async def fired() -> bool:
        found = await t.call("GET", f"/v1/schedules/{made['scheduleId']}", show=False)
        return found["fired"] == 1

    await eventually(fired)
    await listed()
    found = await t.call("GET", "/v1/users/ada/notifications", show=False)
    t.note("GET /v1/users/ada/notifications", None)
    notes = [{"title": one["title"], "createdAt": one["createdAt"]} for one in found["notifications"]]
    t.note("200", {"notifications": notes, "nextCursor": None}, ("notifications", "nextCursor"))


Example = Callable[[Transcript], Awaitable[None]]
EXAMPLES: Final[dict[str, Example]] = {
    "switches": switches,
    "emergency_only": emergency_only,
    "priority": priority,
    "forced": forced,
    "do_not_disturb": do_not_disturb,
    "quiet_hours": quiet_hours,
    "type_window": type_window,
    "digest": digest,
    "overflow_to_digest": overflow_to_digest,
    "overflow_to_feed": overflow_to_feed,
    "tenant_limit_to_feed": tenant_limit_to_feed,
    "tenant_limit_to_digest": tenant_limit_to_digest,
    "nowhere": nowhere,
    "connected": connected,
    "expiry": expiry,
    "expires": expires,
    "foretold": foretold,
    "closed": closed,
    "type_devices": type_devices,
    "dry_topic": dry_topic,
    "experiment": experiment,
    "stripe": stripe,
    "redis_stream": redis_stream,
    "schedules": schedules,
}
"""By the name that the page has for them."""
