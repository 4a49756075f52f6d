"""Merging: which events become part of a notification that is there already, and what it says then. Pure.

An event asks for it (`dedupe`, `aggregate`), or the tenant's rule for its type (carillon/merge_rules.py):

| how | alike are events with | each that follows | the window ends |
|---|---|---|---|
| drop | the same `dedupe.key`; without one type, title, body, target | is a `duplicate` | with its time |
| count | the same | is the new content, `count` grows | or once it was read |
| replace | the same | is the new content, `count` grows | the same |
| accumulate | the same | the same, and `data.items` has all up to a bound | the same |
| aggregate | the same type and target | is the new content, `actors` and their `count` grow | the same |

A window belongs to one user and one way of merging, begins with its first event and is as long as that one
asked for. Read, dismissed, archived, cancelled, retracted or expired: what comes then is a new notification.
`drop` alone looks at time only, and at nothing that was retracted or has expired: what was said and dealt
with is not said again.

`Merger` decides for one batch of a shard's writer: it is given the windows that are open, takes the batch's
events in order, and says at the end what is to be written. Whatever it changes is its own, so that a batch
whose commit fails is decided anew. A window has a row of its own only once something was merged into its
notification, whose row says what there is to say until then (carillon/merge_begun.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Final, NamedTuple

import msgspec

from carillon.clock import rfc3339
from carillon.decision import URGENT
from carillon.event_rules import DEDUPES, is_array
from carillon.ids import uuid_text
from carillon.merge_begun import Opening, slot_of
from carillon.merge_rules import ACCUMULATE, AGGREGATE, COUNT, DROP, REPLACE, MergeRule, data_of, render
from carillon.messages import PRIORITIES, Event
from carillon.notification import ALWAYS, NotificationRow, decode_content, encode_content, filed_away
from carillon.settings import MergeSettings
from carillon.switches import EVENT, TENANT

OPENED: Final = "opened"
"""Of an event: it became a notification, into which others may be merged."""
MERGED: Final = "merged"
DUPLICATE: Final = "duplicate"

LOUD: Final = "loud"
"""Of a merged event: it disturbed the user as a notification of its own would have."""
LATER: Final = "later"
"""It is told by a push that comes once the user may be disturbed again."""
TOGETHER: Final = "together"
"""It is told by the push of another one that came at the same time."""
QUIET: Final = "quiet"
"""It is shown where the notification is, without a sound, and no push tells it."""

_KEEP: Final = ("createdAt", "collapseKey")
"""Members that stay those of the first event: the phone shows one banner, whatever is merged."""
_COUNTED: Final = (COUNT, ACCUMULATE, AGGREGATE)
_encode: Final = msgspec.json.Encoder().encode


class Ask(NamedTuple):
    """One way in which an event is to be merged.

    Attributes:
        how: drop | count | replace | accumulate | aggregate.
        key: of the window, among those of its user.
        name: `aggregationKey` of what is merged.
        source: event | tenant: who asks.
        rule: the tenant's for the type, None if there is none.
    """

    how: str
    key: str
    name: str
    window_ms: int
    source: str
    rule: MergeRule | None


def may_ask(event: Event) -> bool:
    """Whether an event itself says anything of merging: the one check that every event pays."""
    return event.dedupe is not None or event.aggregate is not None


class Said(msgspec.Struct, rename="camel"):
    """What tells events apart: a part of a notification's content."""

    title: Any = None
    body: Any = None
    target_type: Any = None
    target_id: Any = None
    actor_id: Any = None

    @property
    def actor(self) -> str | None:
        """Who did it, as far as actors can be told apart; None: nobody is named."""
        return self.actor_id if isinstance(self.actor_id, str) else None


_said: Final = msgspec.json.Decoder(Said).decode


def said_by(content: str) -> Said:
    """That part of a stored content.

    Raises:
        msgspec.MsgspecError, UnicodeError: it is nothing that the ingress wrote.
    """
    return _said(f"{{{content}}}")


def asks_of(event: Event, rule: MergeRule | None, limits: MergeSettings, said: Said) -> tuple[Ask, ...]:
    """How an event is to be merged; a `drop` comes first, and at most one other follows.

    The event wins over the rule, except that a rule's aggregation holds beside an event's `drop`: the same
    like twice is one, and those of different actors are gathered.
    """
    dedupe, aggregate = event.dedupe, event.aggregate
    if dedupe is None and aggregate is None and rule is not None and rule.how in DEDUPES:
        # What most events that are merged at all do: nothing else is looked at.
        return (_by_content(event, rule.how, rule.window_ms, TENANT, rule, limits, said),)
    asks: list[Ask] = []
    if dedupe is not None:
        how, key, window_ms = dedupe.merge, dedupe.key, dedupe.window_ms
        if key is None:
            asks.append(_by_content(event, how, window_ms, EVENT, rule, limits, said))
        else:
            window_ms = window_ms or round(limits.dedupe_window_s * 1000)
            asks.append(Ask(how, f"{how}:{_digest(key)}", key, window_ms, EVENT, rule))
    if dedupe is None or dedupe.merge == DROP:
        if aggregate:
            asks.append(_about(event, 0, EVENT, rule, limits, said))
        elif rule is not None and rule.how == AGGREGATE and aggregate is None:
            asks.append(_about(event, rule.window_ms, TENANT, rule, limits, said))
        elif dedupe is None and rule is not None and rule.how is not None and rule.how != AGGREGATE:
            asks.append(_by_content(event, rule.how, rule.window_ms, TENANT, rule, limits, said))
    return tuple(asks)


def _by_content(
    event: Event,
    how: str,
    window_ms: int,
    source: str,
    rule: MergeRule | None,
    limits: MergeSettings,
    said: Said,
) -> Ask:
    told = [event.type, said.title, said.body, said.target_type, said.target_id]
    content = blake2b(_encode(told), digest_size=16).hexdigest()
    if not window_ms:
        window_ms = round(limits.dedupe_window_s * 1000)
    return Ask(how, f"{how}:{content}", content, window_ms, source, rule)


def _about(
    event: Event,
    window_ms: int,
    source: str,
    rule: MergeRule | None,
    limits: MergeSettings,
    said: Said,
) -> Ask:
    if not window_ms:
        own = rule is not None and rule.how == AGGREGATE and rule.window_ms
        window_ms = own or round(limits.aggregate_window_s * 1000)
    about = [event.type, said.target_type, said.target_id]
    name = ":".join(part or "" for part in about).rstrip(":")
    return Ask(AGGREGATE, f"{AGGREGATE}:{_digest(about)}", name, window_ms, source, rule)


def _digest(value: Any) -> str:
    return blake2b(_encode(value), digest_size=16).hexdigest()


@dataclass(slots=True)
class Window:
    """An open window as the store has it.

    Attributes:
        events: how many are in the notification, the first included.
        count: the notification's.
        notified_ms: when the user was last disturbed by it, or will be.
        priority: of the row.
        cancelled: the service stopped what was pending of it.
        opening: of one without a row of its own: how it began.
    """

    stream_id: int
    key: str
    row: NotificationRow
    priority: int
    ends_ms: int
    events: int
    count: int
    notified_ms: int
    cancelled: bool = False
    opening: Opening | None = None


@dataclass(slots=True)
class Target:
    """A notification that takes in events, as it will be after the batch.

    Attributes:
        row: as stored; None for one that this batch makes.
        members: of its content.
        filed: the user wants nothing of it in the app.
        open: it takes in others. gone: it is withdrawn or over: not even a duplicate refers to it.
        changed: something was merged into it. top: it is to go to the top of the feed.
        keys: windows that began or took something in, with their ends; of one that this batch makes those
            that it still has.
        began: of one that this batch makes: all its windows, with their ends.
        rows: its windows need rows though nothing was merged into it: they stand for others there.
        opening: of a stored one: how the window began that has no row yet and took something in.
        loud: it may disturb the user now.
        texts: what writes title and body when `count` is above 1.
    """

    id: bytes
    stream_id: int
    seq: int
    row: NotificationRow | None
    members: dict[str, Any]
    type: str
    category: str | None
    priority: int
    expires_ms: int | None
    events: int
    count: int
    notified_ms: int
    filed: bool = False
    open: bool = True
    gone: bool = False
    changed: bool = False
    top: bool = False
    loud: bool = False
    keys: dict[str, int] = field(default_factory=dict[str, int])
    began: tuple[tuple[str, int], ...] = ()
    rows: bool = False
    opening: Opening | None = None
    texts: MergeRule | None = None

    def content(self, locale: str | None) -> str:
        """Its content, in the language of its user where the tenant's rule has texts."""
        members = self.members
        if self.texts is not None and self.count > 1:
            members = members | render(self.texts, locale, members, self.count)
        return encode_content(members)


class Decision(NamedTuple):
    """What becomes of one event.

    Attributes:
        status: opened (a notification of its own) | merged | duplicate.
        ask: the one that decided; of `opened` the last.
        actor: who is counted; None: nobody is.
    """

    status: str
    target: Target
    ask: Ask
    actor: str | None


class Merger:
    """Decides for the events of one batch, in order.

    Attributes:
        left: (notification, slot) of windows without rows whose keys began anew with other notifications.
    """

    def __init__(self, now_ms: int, limits: MergeSettings) -> None:
        self._now_ms = now_ms
        self._limits = limits
        self._windows: dict[tuple[int, str], tuple[Target, int]] = {}
        self._targets: dict[bytes, Target] = {}
        self._actors: set[tuple[bytes, str]] = set()
        self._openings: dict[tuple[int, str], Opening] = {}  # of windows without rows
        self._dropping: dict[tuple[int, str], Event] = {}  # by windows of `drop` that began in this batch
        self.left: list[tuple[bytes, int]] = []

    def know(self, windows: Iterable[Window], actors: Iterable[tuple[bytes, str]] = ()) -> None:
        """Take in what the store has: windows, and which of the actors asked about are counted already."""
        self._actors.update(actors)
        for w in windows:
            target = self._targets.get(w.row.id)
            if target is None:
                target = self._targets[w.row.id] = self._stored(w)
            elif w.events > target.events:  # of two keys the one that counts what was merged
                target.events, target.count = w.events, w.count
            target.notified_ms = max(target.notified_ms, w.notified_ms)
            self._windows[w.stream_id, w.key] = target, w.ends_ms
            if w.opening is not None:
                self._openings[w.stream_id, w.key] = w.opening
                if w.opening.actor is not None:
                    self._actors.add((w.row.id, w.opening.actor))

    def alone(self, windows: Iterable[tuple[int, str]]) -> bool:
        """Whether an event is a notification of its own for sure: none of its windows is there."""
        return self._windows.keys().isdisjoint(windows) and self._dropping.keys().isdisjoint(windows)

    def begin_drop(self, window: tuple[int, str], event: Event) -> None:
        """An event that is `alone` begins a window of `drop` and no other.

        Nothing is ever merged into it, so that no more needs to be known of it.
        """
        self._dropping[window] = event

    def _stored(self, w: Window) -> Target:
        row = w.row
        members = decode_content(row.content)
        filed = filed_away(row)
        over = row.expires_ms is not None and row.expires_ms <= self._now_ms
        gone = over or row.retracted_ms is not None
        done = w.cancelled or row.read_ms is not None or row.dismissed_ms is not None
        return Target(
            row.id, w.stream_id, row.seq, row, members, members.get("type") or "", members.get("category"),
            w.priority, row.expires_ms, w.events, w.count, w.notified_ms, filed,
            not (gone or done or (row.archived_ms is not None and not filed)), gone,
        )  # fmt: skip

    def decide(
        self,
        stream_id: int,
        event: Event,
        asks: tuple[Ask, ...],
        members: dict[str, Any],
        *,
        filed: bool,
        priority: int,
    ) -> Decision:
        """What becomes of the next event.

        Args:
            members: of its content; kept. Not needed of one that asks for `drop` alone.
            filed: its user wants nothing of it in the app.
            priority: with the user's override.
        """
        who = members.get("actorId")
        actor = who if isinstance(who, str) else None
        for ask in asks:
            window = (stream_id, ask.key)
            found = self._windows.get(window)
            if found is None and window in self._dropping:
                first = self._made(stream_id, self._dropping[window], {}, filed=False, priority=priority)
                return Decision(DUPLICATE, first, ask, None)
            if found is None or found[1] <= self._now_ms:
                continue
            target = found[0]
            if ask.how == DROP:
                if not target.gone:
                    return Decision(DUPLICATE, target, ask, None)
            elif target.open and target.filed == filed:
                self._take_in(target, event, ask, members, actor, priority)
                for other in asks:
                    if other is not ask:
                        self._open(target, stream_id, other)
                return Decision(MERGED, target, ask, actor)
        target = self._made(stream_id, event, members, filed=filed, priority=priority)
        ask = asks[-1]
        if ask.how != DROP:
            _name(target, ask, self._limits)
        self._targets[event.id] = target
        for one in asks:
            self._open(target, stream_id, one)
        target.began = tuple(target.keys.items())
        if actor is not None:
            self._actors.add((event.id, actor))
        return Decision(OPENED, target, ask, actor)

    def _made(
        self, stream_id: int, event: Event, members: dict[str, Any], *, filed: bool, priority: int
    ) -> Target:
        return Target(
            event.id, stream_id, 0, None, members, event.type, event.category, priority, event.expires_ms,
            1, 1, self._now_ms, filed,
        )  # fmt: skip

    def _open(self, target: Target, stream_id: int, ask: Ask) -> None:
        window = (stream_id, ask.key)
        ends_ms = self._now_ms + ask.window_ms
        known = self._windows.get(window)
        if known is not None and known[0] is not target:
            before = known[0]
            if before.row is None:
                before.keys.pop(ask.key, None)
            else:
                target.rows = True
                if self._openings.pop(window, None) is not None:
                    self.left.append((before.id, slot_of(ask.key, known[1])))
        self._windows[window] = target, ends_ms
        target.keys[ask.key] = ends_ms

    def _take_in(
        self,
        target: Target,
        event: Event,
        ask: Ask,
        members: dict[str, Any],
        actor: str | None,
        priority: int,
    ) -> None:
        before = target.members
        window = (target.stream_id, ask.key)
        target.keys.setdefault(ask.key, self._windows[window][1])
        target.opening = self._openings.pop(window, target.opening)
        target.events += 1
        fresh = True
        if ask.how == AGGREGATE and actor is not None:
            fresh = (target.id, actor) not in self._actors
            self._actors.add((target.id, actor))
        target.count += fresh
        level = max(_level(before), _level(members))
        target.members = (
            members | {name: before.get(name) for name in _KEEP} | {"priority": PRIORITIES[level]}
        )
        if ask.how == AGGREGATE:
            target.members["actors"] = _actors(members, before.get("actors") or (), self._limits.max_actors)
        elif ask.how == ACCUMULATE:
            items = _items_of(before, target) if target.events > 2 else [_item(before, target.id)]
            items.append(_item(members, event.id))
            target.members["data"] = {**data_of(members), "items": _bounded(items, self._limits)}
        target.members["aggregationKey"], target.members["count"] = ask.name, target.count
        target.texts = ask.rule if ask.how in _COUNTED and ask.rule is not None and ask.rule.texts else None
        target.priority = max(target.priority, priority)
        target.type, target.category = event.type, event.category
        if ask.how != REPLACE and event.expires_ms is not None and not _ends_later(target, event):
            # The last one to expire ends it: what was there before is not to go with what came after.
            target.members["expiresAt"] = before.get("expiresAt")
        else:
            target.expires_ms = event.expires_ms
        target.changed = True
        target.top = target.top or target.count > 1


def _ends_later(target: Target, event: Event) -> bool:
    """Whether an event that expires does so no earlier than the notification."""
    return (
        target.expires_ms is not None
        and event.expires_ms is not None
        and (event.expires_ms >= target.expires_ms)
    )


def _level(members: Mapping[str, Any]) -> int:
    name = members.get("priority")
    return PRIORITIES.index(name) if name in PRIORITIES else PRIORITIES.index(ALWAYS["priority"])


def _name(target: Target, ask: Ask, limits: MergeSettings) -> None:
    """Say in a new notification that it takes in others."""
    members = target.members
    members["aggregationKey"], members["count"] = ask.name, 1
    if ask.how == AGGREGATE:
        members["actors"] = _actors(members, (), limits.max_actors)


def _actors(members: Mapping[str, Any], before: Iterable[Any], most: int) -> list[dict[str, Any]]:
    """The newest first, each once. An actor is named by `data.actorName`, if the event has it."""
    name = data_of(members).get("actorName")
    actor: dict[str, Any] = {"id": members.get("actorId")}
    if isinstance(name, str) and name:
        actor["name"] = name
    if actor["id"] is None and "name" not in actor:
        return list(before)[:most]
    others = [one for one in before if one["id"] != actor["id"] or (one["id"] is None and one != actor)]
    return [actor, *others][:most]


_ITEM: Final = ("title", "body", "actorId", "targetType", "targetId", "link", "imageUrl", "createdAt")


def _item(members: Mapping[str, Any], raw: bytes) -> dict[str, Any]:
    """One event as `accumulate` keeps it; `id` is that of the event."""
    found: dict[str, Any] = {"id": uuid_text(raw)}
    found |= {name: members[name] for name in _ITEM if members.get(name) is not None}
    data = {name: value for name, value in data_of(members).items() if name != "items"}
    return found | {"data": data} if data else found


def _items_of(members: Mapping[str, Any], target: Target) -> list[Any]:
    items: Any = data_of(members).get("items")
    return list(items) if is_array(items) else [_item(members, target.id)]


def _bounded(items: list[Any], limits: MergeSettings) -> list[Any]:
    """The newest of them, as many as are allowed: always the last one, without its data if need be."""
    kept: list[Any] = []
    left = limits.max_items_bytes
    for item in reversed(items[-limits.max_items :]):
        size = len(_encode(item))
        if size > left:
            if not kept:
                kept.append({name: value for name, value in item.items() if name != "data"})
            break
        left -= size
        kept.append(item)
    kept.reverse()
    return kept


def notify(
    target: Target,
    now_ms: int,
    push_due_ms: int | None,
    renotify_ms: int,
    *,
    urgent: bool,
    digest: bool = False,
) -> tuple[str, int | None]:
    """Whether a merged event may disturb its user, and when its push is due.

    Never more often than once in `renotify_ms`: within that time it is shown quietly, and one push at its end
    tells what has come together by then. Urgent ones are never held.

    Args:
        push_due_ms: when its push would be due were it a notification of its own; None: it has none.
        digest: that push waits in a digest, which disturbs once however much is in it: it is due with that.

    Returns:
        LOUD, LATER or QUIET, and when the push is due (None: there is none).
    """
    last_ms = target.notified_ms
    if urgent or not renotify_ms or now_ms >= last_ms + renotify_ms:
        # The digest may be told, or left, before its time: it is no moment to wait for.
        target.notified_ms = now_ms if push_due_ms is None or digest else max(now_ms, push_due_ms)
        target.loud = True
        return LOUD, push_due_ms
    if push_due_ms is None:
        return QUIET, None
    if digest:
        return LATER, push_due_ms
    if last_ms > now_ms:
        # One is still to come and tells this, too; if it was cancelled meanwhile, another one does.
        return LATER, max(push_due_ms, last_ms)
    target.notified_ms = max(push_due_ms, last_ms + renotify_ms)
    return LATER, target.notified_ms


def is_urgent(priority: int) -> bool:
    """Whether nothing holds an event back."""
    return priority >= URGENT


HOW_WORDS: Final[Mapping[str, str]] = {
    DROP: "what says the same is told once in {window}",
    COUNT: "events like it are counted for {window}",
    REPLACE: "events like it replace each other for {window}",
    ACCUMULATE: "events like it are collected for {window}",
    AGGREGATE: "events about the same target are gathered for {window}",
}
_PUSH_WORDS: Final[Mapping[str | None, str]] = {
    LOUD: "the user was told as of any notification",
    TOGETHER: "the push of another one tells it",
    LATER: "a push tells it once the user may be disturbed again",
    QUIET: "it is shown quietly",
}
WHO_WORDS: Final[Mapping[str, str]] = {
    EVENT: "the event asks for it",
    TENANT: "the tenant's rule asks for it",
}


def words(status: str, how: str, source: str, notice: str | None) -> str:
    """Why an event was merged, as a sentence."""
    why = HOW_WORDS.get(how, how).format(window="its window")
    asked = WHO_WORDS.get(source, source)
    if status == DUPLICATE:
        return f"Nothing new: {why} ({asked})."
    if status == OPENED:
        return f"It begins a notification: {why} ({asked})."
    return f"Merged: {why} ({asked}); {_PUSH_WORDS.get(notice, 'it is shown quietly')}."


def would(decision: Decision) -> str:
    """What would become of an event, as a sentence."""
    status, target, ask, _ = decision
    why = HOW_WORDS[ask.how].format(window=span(ask.window_ms))
    into = f"{uuid_text(target.id)}: {why} ({WHO_WORDS[ask.source]})."
    if status == DUPLICATE:
        return f"It would be dropped as a duplicate of {into}"
    if status == MERGED:
        return f"It would be merged into {into}"
    return f"It would begin a notification: {why} ({WHO_WORDS[ask.source]})."


def span(ms: int) -> str:
    """A duration, as sentences have it."""
    for size, unit in ((3_600_000, "h"), (60_000, "min"), (1000, "s")):
        if ms >= size and ms % size == 0:
            return f"{ms // size} {unit}"
    return f"{ms / 1000:g} s"


def note(
    event: bytes, at_ms: int, status: str, how: str, source: str, actor: str | None, notice: str | None
) -> dict[str, Any]:
    """One merged event as answers tell it."""
    return {
        "id": uuid_text(event),
        "at": rfc3339(at_ms),
        "status": status,
        "how": how,
        "source": source,
        "actorId": actor,
        "notice": notice,
        "words": words(status, how, source, notice),
    }
