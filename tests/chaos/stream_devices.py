"""Devices of those whose network lets no WebSocket through: event streams, acknowledgements by request.

They talk to the own door of whichever ingress replica takes the connection, without a proxy between: faults
of the clients' network are not theirs, faults of the ingress are.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from typing import Any

import httpx
import jwt

from tests.chaos.devices import STOP_CODES, Device, connection_number
from tests.chaos.population import claims


class StreamDevice(Device):
    """A device that reads GET /api/stream of the replicas' own door."""

    async def run(self) -> None:
        """Live until cancelled."""
        # A stream says something every heart-beat: what is silent for longer is dead.
        timeout = httpx.Timeout(5.0, read=self._timeout_s)
        async with httpx.AsyncClient(
            base_url=self._plant.direct_url, trust_env=False, timeout=timeout
        ) as self._http:
            await super().run()

    async def _connection(self) -> bool:
        """One stream, from the request to its end; True if it got a WELCOME."""
        self._conn = connection_number()
        position = [self._epoch, self._seq, self._rev] if self._epoch else None
        self._answered = position is None
        token = jwt.encode(claims(self.user, time.time()), self._plant.client_secret, algorithm="HS256")
        headers = {"Authorization": f"Bearer {token}"}
        query: dict[str, Any] = {"deviceId": self.name, "state": self._attention()}
        how = "none" if position is None else self._rng.choice(["header", "url"])
        if how == "header":
            headers["Last-Event-ID"] = f"{self._epoch}:{self._seq}:{self._rev}"
        elif how == "url":
            query |= {"epoch": self._epoch, "lastSeq": self._seq, "lastRev": self._rev}
        self._history.add(
            "dial", conn=self._conn, user=self.user, device=self.name, position=position, how=how
        )
        welcomed = False
        by, code = "lost", 1006
        try:
            async with self._http.stream("GET", "/api/stream", params=query, headers=headers) as answer:
                if answer.status_code != 200:
                    by = "server"
                    return False
                stay_s = self._rng.choice([0.3, 2.0, 6.0]) if self.habit.leaves else None
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(stay_s) as stay:
                        async for line in answer.aiter_lines():
                            if self.settling:
                                stay.reschedule(None)
                            if not line.startswith("data: "):
                                continue
                            frame = json.loads(line[6:])
                            if frame["type"] == "CLOSE":
                                by, code = "server", frame["code"]
                                continue
                            self._frame(frame)
                            if frame["type"] == "WELCOME":
                                welcomed = self.connected = True
                            elif frame["type"] == "NEW_NOTIFICATION":
                                await self._acknowledge_by_request(frame["notification"], headers)
                if by == "lost" and stay_s is not None:
                    by = "client"
        except httpx.HTTPError:
            pass
        finally:
            self.connected = False
            self._closed(code, by)
        if code in STOP_CODES:
            self.stopped = code
        return welcomed

    async def _acknowledge_by_request(self, note: dict[str, Any], headers: dict[str, str]) -> None:
        # Noted first: it may take effect although its answer is lost.
        if self._rng.random() < 0.5:
            self._history.add("ack", conn=self._conn, seq=note["seq"])
            body = {"seq": note["seq"], "deviceId": self.name}
        else:
            self._history.add("ack", conn=self._conn, ids=[note["id"]])
            body = {"notificationId": note["id"], "deviceId": self.name}
        with contextlib.suppress(httpx.HTTPError):
            await self._http.post("/api/ack", json=body, headers=headers)
