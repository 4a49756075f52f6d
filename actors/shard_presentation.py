"""What a shard tells its users' devices of how notifications are to present themselves in the app.

A user of whom nobody says anything costs a connection one look, and is told nothing. Anybody else is told
once per connection, and again when it changes; a notification carries nothing of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Final

from actors.shard_policies import Policies
from actors.shard_users import User, UserCache
from carillon import server_frames
from carillon.presentation import AS_THE_APP, SILENT, OfApp, Words, of_app

PORTION = 500
"""Users of a tenant whose defaults have changed that are looked at in one turn of the loop."""


class _Walk:
    """Users who are to be told, as far as it concerns them.

    Attributes:
        before: the defaults they may have been told.
    """

    def __init__(self, users: Sequence[User], before: list[Words]) -> None:
        self.before = before
        self.left = iter(users)


class Presentations:
    """The presentation of one shard's users."""

    def __init__(self, users: UserCache, policies: Policies) -> None:
        self._users = users
        self._policies = policies
        self._tell: Callable[[Sequence[User], bytes], None] = lambda users, frame: None
        self._defaults: dict[str, Words] = {}  # of tenants, as those who are connected were, or will be, told
        self._walks: dict[str, _Walk] = {}  # of tenants, while they are being told
        policies.on_change(self._follow)

    def on_change(self, tell: Callable[[Sequence[User], bytes], None]) -> None:
        """Call `tell` with users and the frame that all their connections are to get."""
        self._tell = tell

    def of(self, user: User) -> OfApp:
        """How notifications are to present themselves in a user's app."""
        mine, rules = user.preferences, self._policies.of(user.key.tenant).rules
        if mine is None and rules is None:
            return AS_THE_APP
        return _of(user, SILENT if rules is None else rules.defaults.in_app)

    def welcome(self, user: User) -> bytes | None:
        """The frame that follows a WELCOME; None: there is nothing to tell."""
        rules = self._policies.of(user.key.tenant).rules
        defaults = SILENT if rules is None else rules.defaults.in_app
        self._defaults.setdefault(user.key.tenant, defaults)
        if user.preferences is None and rules is None:
            return None
        found = _of(user, defaults)
        return frame_of(found) if found != AS_THE_APP else None

    def again(self, user: User) -> bytes | None:
        """The frame for a connection that was attached elsewhere and may have been told something else.
        None if nobody ever said anything."""
        frame = self.welcome(user)
        if frame is None and (user.preferences is not None or self._policies.of(user.key.tenant).text):
            return _PLAIN
        return frame

    def take(self, user: User, document: str) -> None:
        """Note a user's new preferences, and tell the devices what they change."""
        before = self.of(user)
        user.take_preferences(document)
        after = self.of(user)
        if after != before and user.session is not None:
            self._tell((user,), frame_of(after))

    def _follow(self, tenant: str) -> None:
        """The rules of a tenant have changed."""
        rules = self._policies.of(tenant).rules
        after = SILENT if rules is None else rules.defaults.in_app
        before = self._defaults.get(tenant)
        if before is None or before == after:
            return  # of those who are here none was told anything else
        self._defaults[tenant] = after
        walk = self._walks.get(tenant)
        users = [user for user in self._users.users() if user.key.tenant == tenant]
        walk = self._walks[tenant] = _Walk(users, [*(walk.before if walk else ()), before])
        asyncio.get_running_loop().call_soon(self._walk_on, tenant, walk)

    def _walk_on(self, tenant: str, walk: _Walk) -> None:
        """Tell some of those whom a change of defaults concerns; the next in the next turn of the loop."""
        if self._walks.get(tenant) is not walk:
            return  # they have changed again
        defaults = self._defaults[tenant]
        some = list(islice(walk.left, PORTION))
        if not some:
            del self._walks[tenant]
            return
        frames: dict[Words, bytes] = {}
        told: dict[bytes, list[User]] = {}
        for user in some:
            if user.session is None:
                continue
            mine = SILENT if user.preferences is None else user.preferences.in_app
            frame = frames.get(mine)
            if frame is None:
                now = of_app(mine, defaults)
                known = all(of_app(mine, before) == now for before in walk.before)
                frame = frames[mine] = b"" if known else frame_of(now)
            if frame:
                told.setdefault(frame, []).append(user)
        for frame, users in told.items():
            self._tell(users, frame)
        asyncio.get_running_loop().call_soon(self._walk_on, tenant, walk)


def frame_of(found: OfApp) -> bytes:
    """PRESENTATION."""
    return server_frames.presentation(found.sound, found.vibration, found.duration_ms, found.auto_dismiss)


_PLAIN: Final = frame_of(AS_THE_APP)


def _of(user: User, defaults: Words) -> OfApp:
    return of_app(SILENT if user.preferences is None else user.preferences.in_app, defaults)
