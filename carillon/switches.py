"""Which channels are open for a notification: the tenant's forced rules over the user's preferences over the
tenant's defaults. Pure.

Of one document the most specific word on a channel counts: that of the type, of the category, of the channel
itself. `true` and `false` of a type or category switch it as a whole and say nothing of single channels. Only
where the user's document is silent is the tenant's asked: no default, however specific, opens
what the user has closed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple
from zoneinfo import ZoneInfo

import msgspec

from carillon.event_rules import Instant, expiry_ms
from carillon.messages import PRIORITIES
from carillon.preferences import CHANNELS, DAYS
from carillon.presentation import words
from carillon.quiet_hours import Digest, QuietHours, minutes_of

FAMILIES: Final = CHANNELS
"""Channels as preferences name them."""
USER: Final = "user"
TENANT: Final = "tenant"
EVENT: Final = "event"
_WINDOWS: Final = 8
"""Windows of a tenant that a document remembers where the user is."""
_MEMO: Final = 256
"""Verdicts a document remembers; beyond it they are worked out each time."""
_PRIORITY: Final = {name: index for index, name in enumerate(PRIORITIES)} | {"critical": len(PRIORITIES) - 1}


class Fired(NamedTuple):
    """One rule that decided something."""

    rule: str
    """See carillon/explain.py, which has the words."""
    source: str
    """user | tenant | event | system: whose rule it is."""
    about: str | None = None
    """The type, category, channel or limit it is about."""
    channels: tuple[str, ...] = ()
    """Channels it closed, opened or delayed."""
    until_ms: int | None = None


class Entry(NamedTuple):
    """What a document says of one type or category."""

    enabled: bool | None
    channels: Mapping[str, bool]
    priority: int | None
    digest: Digest | None
    digest_set: bool


class Preferences:
    """A preferences document, read once.

    Attributes:
        quiet, quiet_set: quiet hours; set although None: the document says that there are none.
        floating: they name no time zone of their own.
        zoned: it is known in which time zone the user is.
        emergency_only: whether a channel is for urgent notifications alone.
        in_app, push: how notifications are to be shown in the app, and pushes.
    """

    __slots__ = (
        "__weakref__",
        "categories",
        "channels",
        "digest",
        "digest_set",
        "dnd_until_ms",
        "emergency_only",
        "everything",
        "floating",
        "here",
        "in_app",
        "memo",
        "memo_of",
        "push",
        "quiet",
        "quiet_set",
        "types",
        "zone",
        "zoned",
    )  # fmt: skip

    def __init__(self, document: Mapping[str, Any], zone: str | None = None) -> None:
        """Read a valid document; `zone` is where the user is if the document does not say."""
        self.zone = _zone(document.get("timezone") or zone)
        self.zoned = bool(document.get("timezone") or zone)
        self.everything: bool | None = document.get("global")
        self.channels: dict[str, bool] = {}
        self.emergency_only: dict[str, bool] = {}
        self.in_app = words(document, "in_app")
        self.push = words(document, "push")
        for name, word in part(document, "channels").items():
            self._channel(name, word)
        self.categories = self._entries(part(document, "categories"))
        self.types = self._entries(part(document, "types"))
        self.quiet_set = "quietHours" in document
        self.quiet = self._quiet(document.get("quietHours"))
        self.floating = not part(document, "quietHours").get("timezone")
        self.here: dict[QuietHours, QuietHours] = {}
        until = document.get("doNotDisturbUntil")
        self.dnd_until_ms = 0 if until is None else expiry_ms(msgspec.convert(until, Instant))
        self.digest_set = "digest" in document
        self.digest = self._digest(document.get("digest"))
        self.memo: dict[tuple[str, str | None, bool], Switches] = {}
        self.memo_of: object = None

    def _channel(self, name: str, word: Any) -> None:
        if isinstance(word, bool):
            self.channels[name] = word
            return
        if "enabled" in word:
            self.channels[name] = word["enabled"]
        if "emergencyOnly" in word:
            self.emergency_only[name] = word["emergencyOnly"]

    def _entries(self, words: dict[str, Any]) -> dict[str, Entry]:
        return {name: self._entry(word) for name, word in words.items()}

    def _entry(self, word: Any) -> Entry:
        if isinstance(word, bool):
            return Entry(word, {}, None, None, False)
        channels: dict[str, bool] = {name: word[name] for name in FAMILIES if name in word}
        channels |= part(word, "channels")
        digest = word.get("digest")
        return Entry(
            word.get("enabled"), channels, _PRIORITY.get(word.get("priority")), self._digest(digest),
            "digest" in word,
        )  # fmt: skip

    def _quiet(self, word: Any) -> QuietHours | None:
        if not word or word.get("enabled") is False:
            return None
        zone = _zone(word["timezone"]) if word.get("timezone") else self.zone
        days = frozenset(DAYS.index(day) for day in word.get("days", DAYS))
        return QuietHours(minutes_of(word["start"]), minutes_of(word["end"]), zone, days)

    def quiet_of(self, defaults: Preferences) -> tuple[QuietHours | None, str]:
        """The quiet hours that count, and whose they are.

        Without a word of the user's the tenant's: where the user is, unless they name a time zone themselves.
        """
        if self.quiet_set:
            return self.quiet, USER
        quiet = defaults.quiet
        if quiet is not None and defaults.floating and self is not defaults:
            quiet = self.local(quiet)
        return quiet, TENANT

    def local(self, quiet: QuietHours) -> QuietHours:
        """A window of local time where the user is; as it is given if that is not known."""
        if not self.zoned:
            return quiet
        found = self.here.get(quiet)
        if found is None:
            if len(self.here) >= _WINDOWS:
                self.here.clear()
            found = self.here[quiet] = QuietHours(quiet.start, quiet.end, self.zone, quiet.days)
        return found

    def _digest(self, word: Any) -> Digest | None:
        if word is None:
            return None
        more: Mapping[str, Any] = {"frequency": word} if isinstance(word, str) else word
        frequency = more["frequency"]
        if frequency in ("off", "instant"):
            return None
        at = minutes_of(more.get("at", "08:00"))
        return Digest(frequency, at, DAYS.index(more.get("day", "mon")), self.zone)

    @property
    def digests(self) -> bool:
        """Whether it says anything of digests."""
        entries = (*self.types.values(), *self.categories.values())
        return self.digest_set or any(entry.digest_set for entry in entries)

    def says(self, kind: str, category: str | None, family: str) -> tuple[bool, str, str] | None:
        """The most specific word on one channel: (open, rule, what it is about); None: it says nothing."""
        of_type = self.types.get(kind)
        if of_type is not None and family in of_type.channels:
            return of_type.channels[family], "type_channel", kind
        of_category = self.categories.get(category) if category is not None else None
        if of_category is not None and family in of_category.channels:
            assert category is not None
            return of_category.channels[family], "category_channel", category
        if family in self.channels:
            return self.channels[family], "channel", family
        return None

    def wants(self, kind: str, category: str | None) -> tuple[bool, str, str] | None:
        """Whether the type, or else the category, is switched on as a whole; None: the document is silent."""
        of_type = self.types.get(kind)
        if of_type is not None and of_type.enabled is not None:
            return of_type.enabled, "type", kind
        of_category = self.categories.get(category) if category is not None else None
        if of_category is not None and of_category.enabled is not None:
            assert category is not None
            return of_category.enabled, "category", category
        return None

    def entries(self, kind: str, category: str | None) -> list[Entry]:
        """What it says of the type, then of the category."""
        found = [self.types.get(kind), self.categories.get(category) if category is not None else None]
        return [entry for entry in found if entry is not None]


class Switches(NamedTuple):
    """What is open for one type and category, whatever the time.

    Attributes:
        off: channels that are closed.
        why: the rule that closed or forced each channel, where one did.
        forced: the tenant forces it: no quiet hours, digest or limit holds it. None: it does not.
        priority, level: the rule that overrides the event's priority, and with what.
        digest, digest_of: what collects it, and the rule that says so.
    """

    off: frozenset[str]
    why: Mapping[str, Fired]
    forced: Fired | None
    priority: Fired | None
    level: int | None
    digest: Digest | None
    digest_of: Fired | None


def switches(
    user: Preferences,
    defaults: Preferences,
    forced: Preferences,
    kind: str,
    category: str | None,
    urgent: bool,
) -> Switches:
    """Look through the documents.

    Args:
        forced: only its types and categories count.
        urgent: of the event itself; opens channels that are for emergencies.
    """
    off: set[str] = set()
    why: dict[str, Fired] = {}
    force: Fired | None = None
    if forced.types or forced.categories:
        for family in FAMILIES:
            word = forced.says(kind, category, family) or forced.wants(kind, category)
            if word is not None:
                is_on, _, about = word
                why[family] = Fired("forced_on" if is_on else "forced_off", TENANT, about, (family,))
                if is_on:
                    force = why[family]
                else:
                    off.add(family)
    for family in FAMILIES:
        if family in why:
            continue
        closed = _closed(user, defaults, kind, category, family)
        if closed is None and not urgent:
            closed = _for_emergencies(user, defaults, kind, category, family)
        if closed is not None:
            off.add(family)
            why[family] = closed
    level, priority = _priority(user, defaults, kind, category)
    if urgent:
        level = priority = None  # nothing makes an urgent one less so
    digest, digest_of = _digest(user, defaults, kind, category)
    return Switches(frozenset(off), why, force, priority, level, digest, digest_of)


def _closed(
    user: Preferences, defaults: Preferences, kind: str, category: str | None, family: str
) -> Fired | None:
    """The rule that closes a channel, None: it is open."""
    for document, source in ((user, USER), (defaults, TENANT)):
        if document.everything is not None:
            if not document.everything:
                return Fired("global_off", source, None, (family,))
            break
    for document, source in ((user, USER), (defaults, TENANT)):
        word = document.wants(kind, category)
        if word is not None:
            if not word[0]:
                return Fired(f"{word[1]}_off", source, word[2], (family,))
            break
    for document, source in ((user, USER), (defaults, TENANT)):
        word = document.says(kind, category, family)
        if word is not None:
            return None if word[0] else Fired(f"{word[1]}_off", source, word[2], (family,))
    return None


def _for_emergencies(
    user: Preferences, defaults: Preferences, kind: str, category: str | None, family: str
) -> Fired | None:
    for document, source in ((user, USER), (defaults, TENANT)):
        word = document.emergency_only.get(family)
        if word:
            return Fired("emergency_only", source, family, (family,))
        if word is not None or document.says(kind, category, family) is not None:
            return None
    return None


def _priority(
    user: Preferences, defaults: Preferences, kind: str, category: str | None
) -> tuple[int | None, Fired | None]:
    for document, source in ((user, USER), (defaults, TENANT)):
        for entry in document.entries(kind, category):
            if entry.priority is not None:
                return entry.priority, Fired("priority", source, PRIORITIES[entry.priority])
    return None, None


def _digest(
    user: Preferences, defaults: Preferences, kind: str, category: str | None
) -> tuple[Digest | None, Fired | None]:
    for document, source in ((user, USER), (defaults, TENANT)):
        found: tuple[bool, Digest | None] | None = None
        for entry in document.entries(kind, category):
            if entry.digest_set:
                found = True, entry.digest
                break
        if found is None and document.digest_set:
            found = True, document.digest
        if found is not None:
            digest = found[1]
            if digest is not None and document is defaults and user.zoned and user is not defaults:
                # Where the user is, as the default quiet hours: the tenant's day is not everybody's.
                digest = Digest(digest.frequency, digest.at, digest.weekday, user.zone)
            return digest, None if digest is None else Fired("digest", source, digest.frequency)
    return None, None


def remembered(
    user: Preferences,
    defaults: Preferences,
    forced: Preferences,
    kind: str,
    category: str | None,
    urgent: bool,
) -> Switches:
    """`switches`, worked out once per type and category of a document and tenant."""
    if user.memo_of is not defaults:
        user.memo.clear()
        user.memo_of = defaults
    key = (kind, category, urgent)
    found = user.memo.get(key)
    if found is None:
        found = switches(user, defaults, forced, kind, category, urgent)
        if len(user.memo) < _MEMO:
            user.memo[key] = found
    return found


def part(document: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A member of a valid document that is an object; {} if it is left out or null."""
    return document.get(name) or {}


def _zone(name: str | None) -> ZoneInfo:
    return ZoneInfo(name or "UTC")


NOTHING: Final = Preferences({})
"""A document that says nothing."""
