"""Services: they publish in every shape, try again under the same key, read feeds and ask for presence."""

from __future__ import annotations

import asyncio
import collections
import json
import random
import time
from typing import Any
from urllib.parse import quote

import jwt

from benchmarks.wire import Door, HttpConnection, Response, http_request
from tests.chaos.history import History, Record
from tests.chaos.plant import Plant
from tests.chaos.population import Person, claims

MAX_OPEN = 400
"""Operations that wait for their answer at once; beyond it nothing is offered, and nothing made up for."""
NO_ROUTE = 1404
"""Stands for the 404 of a Serve proxy that has no routes yet."""
RETRIED = frozenset({409, 429, 503, NO_ROUTE})
"""Answers that promise nothing and ask for another try."""


class Client:
    """Connections to one door, taken and given back."""

    def __init__(self, url: str, timeout_s: float = 15.0) -> None:
        self.door = Door.of(url)
        self._timeout_s = timeout_s
        self._idle: list[HttpConnection] = []

    async def request(
        self, method: str, path: str, body: Any, bearer: str, headers: dict[str, str] | None = None
    ) -> Response:
        """Ask once. Raises OSError or TimeoutError when no answer came: it may have taken effect."""
        data = http_request(
            self.door, method, path, b"" if body is None else json.dumps(body).encode(), bearer
        )
        for name, value in (headers or {}).items():
            data = data.replace(b"\r\n", f"\r\n{name}: {value}\r\n".encode(), 1)
        connection = self._idle.pop() if self._idle else HttpConnection(self.door, self._timeout_s)
        try:
            response = await connection.request(data)
        except BaseException:
            connection.close()
            raise
        self._idle.append(connection)
        return response

    def close(self) -> None:
        """Drop all connections."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()


class Load:
    """Everything services do.

    Args:
        plant: the system.
        history: every operation goes there.
        persons: the users.
        rng: of all choices.
        rate: operations a second that are offered.
    """

    def __init__(
        self, plant: Plant, history: History, persons: list[Person], rng: random.Random, rate: float
    ) -> None:
        self.offered = 0
        self.answered: collections.Counter[str] = collections.Counter()
        self.unanswered = 0
        """Operations that were given up at the end."""
        self.accepted_at: dict[str, float] = {}
        """label -> when the first 202 came."""
        self.began_at: dict[str, float] = {}
        """label -> when it was first tried."""
        self.ids: dict[str, str] = {}
        """label -> id."""
        self._plant = plant
        self._history = history
        self._users = [person.user for person in persons]
        self._rng = rng
        self._rate = rate
        self._direct = Client(plant.direct_url)
        self._route = Client(plant.http_url)
        self._open = 0
        self._stopping = False
        self._deadline = float("inf")
        self._readable: collections.deque[tuple[str, str]] = collections.deque(maxlen=200)

    # -- set-up -------------------------------------------------------------------------------------------

    async def register(self, persons: list[Person]) -> None:
        """Give the users their push targets."""
        from tests.chaos.population import target_body

        for person in persons:
            for provider, token, device in person.targets:
                path = f"/v1/users/{quote(person.user)}/devices/{quote(device)}"
                response = await self._direct.request(
                    "PUT", path, target_body(provider, token), self._plant.api_key
                )
                if response.status >= 300:
                    raise RuntimeError(f"PUT {path} answered {response.status}: {response.body[:300]!r}")

    # -- life -----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until `stop`, and then until every operation has its answer or its deadline has passed."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._repeat(0.5, self._read_feed))
            group.create_task(self._repeat(1.0, self._ask_presence))
            group.create_task(self._repeat(0.7, self._mark_read))
            began, due = time.monotonic(), 0
            while not self._stopping:
                wanted = int((time.monotonic() - began) * self._rate)
                while due < wanted:
                    due += 1
                    if self._open < MAX_OPEN:
                        self._open += 1
                        self.offered += 1
                        group.create_task(self._operation(self.offered))
                await asyncio.sleep(0.01)
        self._direct.close()
        self._route.close()

    def stop(self, within_s: float) -> None:
        """Offer nothing more; what has no answer after `within_s` is given up (it stays ambiguous)."""
        self._stopping = True
        self._deadline = time.monotonic() + within_s

    async def _repeat(self, every_s: float, work: Any) -> None:
        while not self._stopping:
            await asyncio.sleep(self._rng.uniform(0.5, 1.5) * every_s)
            try:
                await work()
            except (OSError, TimeoutError, ValueError, KeyError):
                continue  # no answer, or 503: nothing was promised

    # -- publishing -----------------------------------------------------------------------------------------

    async def _operation(self, number: int) -> None:
        try:
            await self._publish(number)
        finally:
            self._open -= 1

    def _shape(self, number: int) -> tuple[str, Any, list[list[Any]], str | None]:
        """(shape, body, items [[user, label, key]], Idempotency-Key header)."""
        rng, title = self._rng, f"e{number}"
        key = f"chaos-{number}"
        draw = rng.random()
        if draw < 0.12:
            count = rng.randint(2, 6)
            users = [rng.choice(self._users) for _ in range(count)]
            body: Any = [self._event(user, f"{title}.{index}") for index, user in enumerate(users)]
            items = [[user, f"{title}.{index}|{user}", f"{key}#{index}"] for index, user in enumerate(users)]
            return "batch", body, items, key
        if draw < 0.22:
            users = rng.sample(self._users, rng.randint(2, 5))
            event = self._event("", title)
            del event["userId"]
            event["userIds"] = users
            return "users", event, [[user, f"{title}|{user}", f"{key}#{user}"] for user in users], key
        user = rng.choice(self._users)
        if draw < 0.32:  # without a key: sent once, whatever comes back
            return "bare", self._event(user, title), [[user, f"{title}|{user}", None]], None
        return "single", self._event(user, title), [[user, f"{title}|{user}", key]], key

    def _event(self, user: str, title: str) -> dict[str, Any]:
        event: dict[str, Any] = {"userId": user, "type": "chaos", "title": title}
        if self._rng.random() < 0.2:
            event["priority"] = self._rng.choice(["low", "high", "urgent"])
        if self._rng.random() < 0.2:
            event["body"] = "x" * self._rng.randint(1, 1000)
        return event

    async def _publish(self, number: int) -> None:
        shape, body, items, key = self._shape(number)
        client = self._route if self._rng.random() < 0.2 else self._direct
        for _, label, _ in items:
            self.began_at[label] = self._history.now()
        wait_s, attempt = 0.05, 0
        while True:
            attempt += 1
            record = await self._try(client, number, attempt, shape, body, items, key)
            self._learn(record)
            self.answered[record["outcome"]] += 1
            if self._is_complete(record):
                break
            if key is None:
                return
            if time.monotonic() > self._deadline:
                self.unanswered += 1
                return
            await asyncio.sleep(self._rng.uniform(wait_s / 2, wait_s))
            wait_s = min(1.0, wait_s * 2)
        if key is not None and record["outcome"] == "ok" and not self._stopping:
            await self._afterwards(client, number, attempt, shape, body, items, key)

    async def _afterwards(
        self,
        client: Client,
        number: int,
        attempt: int,
        shape: str,
        body: Any,
        items: list[list[Any]],
        key: str,
    ) -> None:
        """Now and then the same again (must be the same), or another body (must be refused)."""
        draw = self._rng.random()
        if draw < 0.06:
            await asyncio.sleep(self._rng.uniform(0, 3))
            record = await self._try(client, number, attempt + 1, shape, body, items, key)
            self._learn(record)
        elif draw < 0.09 and shape == "single":
            other = {**body, "title": f"other than {body['title']}"}
            began = self._history.now()
            try:
                response = await client.request(
                    "POST", "/v1/events", other, self._plant.api_key, {"Idempotency-Key": key}
                )
                outcome = {202: "ok", 422: "refused"}.get(response.status, "unavailable")
            except (OSError, TimeoutError):
                outcome = "ambiguous"
            self._history.add("conflict", key=key, outcome=outcome, start=began, end=self._history.now())

    async def _try(
        self, client: Client, number: int, attempt: int, shape: str, body: Any, items: list[list[Any]],
        key: str | None,
    ) -> Record:  # fmt: skip
        """One request, noted with its answer or with the fact that there was none."""
        began = self._history.now()
        members: dict[str, Any] = {"outcome": "ambiguous", "status": 0, "results": []}
        try:
            headers = {"Idempotency-Key": key} if key is not None else None
            response = await client.request("POST", "/v1/events", body, self._plant.api_key, headers)
        except (OSError, TimeoutError, ValueError) as exc:
            members["error"] = type(exc).__name__
        else:
            members["status"] = response.status
            if response.status == 202:
                answer = response.json()
                results = answer.get("results", [answer])
                members["outcome"] = "ok"
                members["results"] = [
                    {name: result[name] for name in ("id", "seq", "status", "channels") if name in result}
                    if "id" in result
                    else {"error": result["error"].get("code"), "status": result["error"].get("status")}
                    for result in results
                ]
            elif response.status == 404 and b"/-/routes" in response.body:
                # Serve's proxy before it knows the application: not an answer of Carillon's.
                members["outcome"], members["status"] = "refused", NO_ROUTE
            else:
                members["outcome"] = "refused"
                if response.status not in RETRIED:
                    members["body"] = response.body[:300].decode(errors="replace")
        return self._history.add(
            "publish", number=number, attempt=attempt, shape=shape, items=items, **members, start=began,
            end=self._history.now(),
        )  # fmt: skip

    def _learn(self, record: Record) -> None:
        for (user, label, _), result in zip(record["items"], record["results"], strict=False):
            if "id" in result:
                self.accepted_at.setdefault(label, record["end"])
                self.ids[label] = result["id"]
                if self._rng.random() < 0.1:
                    self._readable.append((user, result["id"]))

    @staticmethod
    def _is_complete(record: Record) -> bool:
        if record["outcome"] == "refused":
            return record["status"] not in RETRIED and record["status"] < 500
        return record["outcome"] == "ok" and all(
            "id" in result or result.get("status") not in RETRIED for result in record["results"]
        )

    # -- reading ------------------------------------------------------------------------------------------

    async def _read_feed(self) -> None:
        await self.read_feed(self._rng.choice(self._users), whole=False)

    async def read_feed(self, user: str, *, whole: bool) -> None:
        """One page, or all of a user's feed. Raises OSError unless answered with 200."""
        items: list[list[Any]] = []
        began = self._history.now()
        cursor = ""
        while True:
            path = f"/v1/users/{quote(user)}/notifications?limit=100" + (
                f"&cursor={cursor}" if cursor else ""
            )
            response = await self._direct.request("GET", path, None, self._plant.api_key)
            if response.status != 200:
                raise ConnectionError(f"{path} answered {response.status}")
            page = response.json()
            items += [[item["id"], item["seq"]] for item in page["notifications"]]
            cursor = quote(page["nextCursor"] or "")
            if not cursor or not whole:
                break
        self._history.add(
            "feed",
            user=user,
            items=items,
            whole=not cursor,
            final=whole,
            start=began,
            end=self._history.now(),
        )

    async def _ask_presence(self) -> None:
        await self.ask_presence(final=False)

    async def ask_presence(self, *, final: bool) -> None:
        """The presence of everybody. Raises OSError unless answered with 200."""
        began = self._history.now()
        response = await self._direct.request(
            "POST", "/v1/presence/query", {"userIds": self._users}, self._plant.api_key
        )
        if response.status != 200:
            raise ConnectionError(f"presence answered {response.status}")
        statuses = {entry["userId"]: entry["status"] for entry in response.json()["users"]}
        self._history.add("presence", statuses=statuses, final=final, start=began, end=self._history.now())

    async def _mark_read(self) -> None:
        if not self._readable:
            return
        user, one = self._readable.popleft()
        token = jwt.encode(claims(user, time.time()), self._plant.client_secret, algorithm="HS256")
        began, ok = self._history.now(), False
        try:
            response = await self._direct.request(
                "POST", "/api/notifications/read", {"notificationIds": [one]}, token
            )
            ok = response.status == 200
        finally:
            self._history.add(
                "read", user=user, ids=[one], via="http", ok=ok, start=began, end=self._history.now()
            )
