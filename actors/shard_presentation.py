"""What a shard tells its users' devices of how notifications are to present themselves in the app.

A user of whom nobody says anything costs a connection one look, and is told nothing. Anybody else is told
once per connection, and again when it changes; a notification carries nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable

from actors.shard_policies import Policies
from actors.shard_users import User, UserCache
from carillon import server_frames
from carillon.presentation import AS_THE_APP, SILENT, OfApp, Words, of_app


class Presentations:
    """The presentation of one shard's users."""

    def __init__(self, users: UserCache, policies: Policies) -> None:
        self._users = users
        self._policies = policies
        self._tell: Callable[[User, bytes], None] = lambda user, frame: None
        self._defaults: dict[str, Words] = {}  # of tenants, as those who are connected were told
        policies.on_change(self._follow)

    def on_change(self, tell: Callable[[User, bytes], None]) -> None:
        """Call `tell` with a user and the frame that all connections of the user are to get."""
        self._tell = tell

    def of(self, user: User) -> OfApp:
        """How notifications are to present themselves in a user's app."""
        mine, rules = user.preferences, self._policies.of(user.key.tenant).rules
        if mine is None and rules is None:
            return AS_THE_APP
        return _of(user, SILENT if rules is None else rules.defaults.in_app)

    def welcome(self, user: User, again: bool) -> bytes | None:
        """The frame that follows a WELCOME; None: there is nothing to tell.

        Args:
            again: the connection was attached elsewhere before and may have been told something else there.
        """
        rules = self._policies.of(user.key.tenant).rules
        defaults = SILENT if rules is None else rules.defaults.in_app
        self._defaults.setdefault(user.key.tenant, defaults)
        if user.preferences is None and rules is None:
            return None
        found = _of(user, defaults)
        return frame_of(found) if again or found != AS_THE_APP else None

    def take(self, user: User, document: str) -> None:
        """Note a user's new preferences, and tell the devices what they change."""
        before = self.of(user)
        user.take_preferences(document)
        after = self.of(user)
        if after != before and user.session is not None:
            self._tell(user, frame_of(after))

    def _follow(self, tenant: str) -> None:
        """The rules of a tenant have changed."""
        rules = self._policies.of(tenant).rules
        after = SILENT if rules is None else rules.defaults.in_app
        before = self._defaults.get(tenant)
        if before is None or before == after:
            return  # of those who are here none was told anything else
        self._defaults[tenant] = after
        for user in self._users.users():
            if user.key.tenant == tenant and user.session is not None:
                now = _of(user, after)
                if now != _of(user, before):
                    self._tell(user, frame_of(now))


def frame_of(found: OfApp) -> bytes:
    """PRESENTATION."""
    return server_frames.presentation(found.sound, found.vibration, found.duration_ms, found.auto_dismiss)


def _of(user: User, defaults: Words) -> OfApp:
    return of_app(SILENT if user.preferences is None else user.preferences.in_app, defaults)
