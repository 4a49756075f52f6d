"""What is scheduled, through the whole system: ingress, Postgres, shard, template, router, shard, feed."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import httpx

from carillon.clock import SystemClock, rfc3339
from tests.integration.client_world import ClientWorld
from tests.support import eventually

TEMPLATE = {"content": {"default": {"title": "Hi {{ who }}"}}}


async def test_a_scheduled_event_with_a_template_arrives(postgres_dsn: str) -> None:
    """It comes at its time, not before, with the words of the template and the id that was told; a rule for
    several users comes for each."""
    async with ClientWorld(postgres_dsn, schedule={"min_interval_s": 1.0}) as world:
        headers = {"Authorization": f"Bearer {world.key}"}
        clock = SystemClock()
        async with httpx.AsyncClient(
            base_url=world.url, headers=headers, trust_env=False, timeout=15
        ) as http:
            assert (await http.put("/v1/templates/hi", json=TEMPLATE)).status_code == 200
            due_ms = clock.now_ms() + 1500
            event = {
                "userId": "ada", "type": "t", "template": "hi", "params": {"who": "Ada"},
                "scheduleAt": rfc3339(due_ms),
            }  # fmt: skip
            told = (await http.post("/v1/events", json=event)).json()
            assert told["status"] == "deferred"
            start = datetime.now(UTC) + timedelta(seconds=1)
            rule = {
                "localAt": start.strftime("%Y-%m-%dT%H:%M:%S"),
                "rrule": "FREQ=MINUTELY;COUNT=2",
                "event": {"userIds": ["bob", "cy"], "type": "t", "title": "by rule"},
            }
            made = await http.post("/v1/schedules", json=rule)
            assert made.status_code == 201, made.text

            async def feed(user: str) -> list[Any]:
                return (await http.get(f"/v1/users/{user}/notifications")).json()["notifications"]

            (note,) = await eventually(lambda: feed("ada"), 20.0)
            assert clock.now_ms() >= due_ms
            assert (note["id"], note["title"]) == (told["id"], "Hi Ada")
            for user in ("bob", "cy"):
                await eventually(lambda user=user: feed(user), 20.0)
            left = (await http.get(f"/v1/schedules/{made.json()['scheduleId']}")).json()
            assert (left["state"], left["result"]) == ("active", "2 recipients")
