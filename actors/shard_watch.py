"""Who may watch whose presence: the shard of the watcher answers, by its tenant's policy."""

from __future__ import annotations

import logging

from actors.link import Link
from actors.shard_policies import Policies
from actors.shard_users import User
from carillon.errors import CarillonError
from carillon.messages import ClientWatch, WatchAnswer

log = logging.getLogger(__name__)


class WatchPermission:
    """Answers WATCH_PRESENCE.

    Args:
        policies: gives the rule of a tenant.
    """

    def __init__(self, policies: Policies) -> None:
        self._policies = policies

    def ask(self, link: Link, message: ClientWatch, user: User) -> None:
        """Answer a client's wish with a `WatchAnswer`, now or later."""
        rule = self._policies.of(user.key.tenant).presence
        if not message.users or rule.watch == "tenant":
            self._send(link, WatchAnswer(message.conn, message.users, ref=message.ref))
        else:
            told = "watching presence is not permitted here"
            answer = WatchAnswer(message.conn, [], message.users, message.ref, "not_permitted", told)
            self._send(link, answer)

    def _send(self, link: Link, answer: WatchAnswer) -> None:
        if link.closed:
            return  # the gateway asks the shard that it attaches the connection to
        try:
            link.send_nowait(answer)
        except CarillonError as exc:
            log.info("an answer to WATCH_PRESENCE was not sent to %s: %s", link.peer, exc)

    async def close(self) -> None:
        """Nothing is under way."""
