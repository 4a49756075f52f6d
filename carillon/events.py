"""`POST /v1/events`: from the bytes of a request to one event per recipient.

The hot path is one typed decode of the whole body and one encode per event; Python touches each event a few
times only. Whatever that path refuses goes through `carillon.event_rules`, which is slower and says why.

The immutable content is written here once (the same text as `carillon.notification.encode_content`, held to
it by a test) and never parsed again on its way to the socket.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Final, Literal, NamedTuple, cast

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from carillon.clock import rfc3339
from carillon.errors import InvalidInputError
from carillon.event_rules import (
    DEDUPES,
    LAST_EXPIRY_MS,
    MAX_ACTIONS,
    MAX_BODY_BYTES,
    MAX_DEPTH,
    MAX_EVENT_BYTES,
    MAX_ITEMS,
    MAX_KEY,
    MAX_URL,
    MAX_WINDOW_S,
    MIN_WINDOW_S,
    TEXTS,
    Instant,
    Refusal,
    expiry_ms,
    explain_event,
    has_control,
    is_array,
    is_object,
    text_error,
    tree_errors,
)
from carillon.external import ChannelName, ExternalName
from carillon.ids import Uuid7Source, slot_of
from carillon.messages import Dedupe, Event, Outcome
from carillon.problems import FieldError, Problem, problem, shown
from carillon.templates import Rendered

ROUTE: Final = "events"
"""First part of scoped idempotency keys."""

_Id = Annotated[str, Meta(min_length=1, max_length=128)]
_Name = Annotated[str, Meta(min_length=1, max_length=64)]
_Label = Annotated[str, Meta(min_length=1, max_length=255)]
_Url = Annotated[str, Meta(min_length=1, max_length=MAX_URL)]


class _Action(Struct, forbid_unknown_fields=True, omit_defaults=True):
    id: _Name | None = None
    label: _Label | None = None
    action: _Name | None = None
    url: _Url | None = None
    method: Literal["GET", "POST", "PUT", "PATCH", "DELETE"] | None = None
    payload: dict[str, Any] | None = None

    def plain(self) -> tuple[str, str, str]:
        """The members that allow no control character."""
        return self.id or "", self.action or "", self.url or ""


class _Dedupe(Struct, rename="camel", forbid_unknown_fields=True, omit_defaults=True):
    key: _Label | None = None
    window_s: Annotated[float, Meta(ge=MIN_WINDOW_S, le=MAX_WINDOW_S)] | None = None
    merge: Literal["drop", "count", "replace", "accumulate"] | None = None

    def plain(self) -> Dedupe:
        """As it travels."""
        window_ms = 0 if self.window_s is None else max(1, round(self.window_s * 1000))
        return Dedupe(self.merge or DEDUPES[0], self.key, window_ms)


class EventBody(Struct, rename="camel", forbid_unknown_fields=True, omit_defaults=True):
    """An event as a service sends it; members that are not built yet accept null only."""

    type: _Name
    title: _Label
    user_id: _Id | None = None
    user_ids: list[Any] | None = None
    body: Annotated[str, Meta(max_length=MAX_BODY_BYTES)] | None = None
    priority: Literal["low", "normal", "high", "urgent", "critical"] | None = None
    category: _Name | None = None
    actor_id: _Id | None = None
    target_type: _Name | None = None
    target_id: _Label | None = None
    data: dict[str, Any] | None = None
    actions: Annotated[list[_Action], Meta(max_length=MAX_ACTIONS)] | None = None
    image_url: _Url | None = None
    icon: _Url | None = None
    link: _Url | None = None
    channels: Annotated[list[ChannelName], Meta(min_length=1, max_length=20)] | None = None
    collapse_key: _Label | None = None
    expires_at: Instant | None = None
    campaign_id: _Id | None = None
    source_app: _Name | None = None
    idempotency_key: _Label | None = None
    aggregate: bool | None = None
    fallback: Annotated[list[ExternalName], Meta(max_length=20)] | None = None
    topic: None = None
    template: None = None
    params: None = None
    locale: None = None
    dedupe: _Dedupe | None = None
    schedule_at: None = None


class LaterBody(EventBody, kw_only=True):
    """An event that is not sent now."""

    schedule_at: Instant | None = None  # pyright: ignore[reportIncompatibleVariableOverride]


class TemplatedBody(LaterBody, kw_only=True):
    """An event whose texts come from a template; what it names itself wins."""

    # msgspec takes a field of the same name for another one; in Python's types it is not.
    title: _Label | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    template: _Label  # pyright: ignore[reportIncompatibleVariableOverride, reportGeneralTypeIssues]
    params: dict[str, Any] | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    locale: _Name | None = None  # pyright: ignore[reportIncompatibleVariableOverride]


class _Content(Struct):
    """Member by member, in order, what `encode_content` writes."""

    type: str
    title: str
    body: str | None
    actorId: str | None
    targetType: str | None
    targetId: str | None
    priority: str
    category: str | None
    actions: list[_Action]
    data: dict[str, Any]
    createdAt: str
    imageUrl: str | UnsetType = UNSET
    icon: str | UnsetType = UNSET
    link: str | UnsetType = UNSET
    expiresAt: str | UnsetType = UNSET
    campaignId: str | UnsetType = UNSET
    sourceApp: str | UnsetType = UNSET
    channels: list[str] | UnsetType = UNSET
    collapseKey: str | UnsetType = UNSET
    channelContent: dict[str, dict[str, str]] | UnsetType = UNSET


_decode_one: Final = msgspec.json.Decoder(EventBody).decode
_decode_many: Final = msgspec.json.Decoder(list[EventBody]).decode
_encode: Final = msgspec.json.Encoder().encode
_encode_sorted: Final = msgspec.json.Encoder(order="sorted").encode
_PRIORITY: Final = {None: 1, "low": 0, "normal": 1, "high": 2, "urgent": 3, "critical": 3}
_PRIORITY_NAME: Final = ("low", "normal", "high", "urgent")

# Bytes -> b"#" for digits: a run of 16 is the cheapest sign of an integer beyond 2^53 (0.6 us for 230 bytes,
# a regular expression needs 4).
_DIGITS: Final = bytes(35 if 48 <= i <= 57 else 32 for i in range(256))
_LONG_NUMBER: Final = b"#" * 16


class Slot(NamedTuple):
    """One entry of the answer, in the order sent."""

    event: int
    """Index into `Request.events`; -1 if `refused` tells why there is none."""
    user: str | None
    """The recipient to name in the answer (with `userIds`), else None."""
    refused: Problem | None


class Later(NamedTuple):
    """An event with `scheduleAt`."""

    due_ms: int
    body: str
    """What is to be sent then: the event for its one recipient, as JSON, without time and key."""


class Request(NamedTuple):
    """A valid request (some of its items may be refused)."""

    events: list[Event]
    slots: list[Slot] | None
    """None for a single event: it is `events[0]`."""
    later: Mapping[int, Later] = {}
    """Events that are not sent now, by index."""
    variants: Mapping[int, Rendered] = {}
    """Events whose template has variants, by index: what they got."""
    beyond: Mapping[int, Outcome] = {}
    """Events that a rate limit refused, by index."""


class _SlowPathError(Exception):
    """The fast path does not accept this; the slow one decides. Never leaves this module."""


class NotPlainError(InvalidInputError):
    """Some events name templates or a time: render, then `EventParser.parse_prepared`.

    Args (positional): the body as plain values.
    """

    code = "not_supported"

    def __init__(self, document: Any) -> None:
        super().__init__("templates and times are for those who keep them", "template")
        self.args = (document,)
        self.document = document


Prepared = Mapping[str, Rendered] | Problem
"""What became of one event's template: by recipient, or why not."""


class EventParser:
    """Turns request bodies into events.

    Args:
        ids: mints the notification ids, before the first try.
    """

    def __init__(self, ids: Uuid7Source) -> None:
        self._ids = ids
        self._stamp_ms = -1
        self._stamp_text = ""

    def parse(self, body: bytes, tenant: str, now_ms: int, key: str | None = None) -> Request:
        """Validate a body and mint its events.

        Args:
            body: JSON: an object (one event) or an array (a batch); empty equals `{}`.
            tenant: of the API key.
            now_ms: becomes `createdAt`.
            key: the Idempotency-Key header, if any. An event's own `idempotencyKey` wins over it.

        Raises:
            ProblemError: the request as a whole is refused.
        """
        if key is not None:
            error = text_error("Idempotency-Key", key, TEXTS["idempotencyKey"])
            if error is not None:
                raise refused("the Idempotency-Key header is not valid", [error])
        suspicious = _LONG_NUMBER in body.translate(_DIGITS) or b"\\u0000" in body
        try:
            if body.lstrip()[:1] == b"[":
                return self._batch(_decode_many(body), tenant, now_ms, key, suspicious)
            one = _decode_one(body)
            if one.user_ids is None:
                return Request([self._single(one, tenant, now_ms, key, suspicious)], None)
            return self._fan_out(one, tenant, now_ms, key, suspicious)
        except (
            _SlowPathError,
            msgspec.MsgspecError,
            UnicodeError,
            RecursionError,
            ValueError,
            OverflowError,
        ):
            document = read_json(body)
            if not is_plain(document):
                raise NotPlainError(document) from None
            return self._explained(document, tenant, now_ms, key, {})

    def parse_prepared(
        self,
        document: Any,
        prepared: Mapping[int, Prepared],
        tenant: str,
        now_ms: int,
        key: str | None = None,
    ) -> Request:
        """Parse a body some of whose events name templates.

        Args:
            document: of NotPlainError.
            prepared: by place of the event (0 for a single one); events that break a rule may be missing.

        Raises:
            ProblemError: the request as a whole is refused.
        """
        parsed = self._explained(document, tenant, now_ms, key, prepared)
        if not any(
            not isinstance(p, Problem) and any(r.variant for r in p.values()) for p in prepared.values()
        ):
            return parsed
        return parsed._replace(variants=_variants(parsed, document, prepared))

    # -- shapes -------------------------------------------------------------------------------------

    def _single(
        self,
        one: EventBody,
        tenant: str,
        now_ms: int,
        key: str | None,
        suspicious: bool,
        prepared: Mapping[str, Rendered] | None = None,
    ) -> Event:
        user = one.user_id
        if user is None:
            raise _SlowPathError
        if prepared is None:
            content = self._content(one, now_ms, suspicious)
        else:
            content = self._content(
                _filled(one, prepared[user], user), now_ms, suspicious, prepared[user].channels
            )
        event = self._event(one, tenant, user, now_ms, content)
        chosen = one.idempotency_key or key
        if chosen is not None:
            event.idempotency_key = f"{ROUTE}:{chosen}"
            event.body_hash = _body_hash(one, user)
        return event

    def _batch(
        self, items: list[EventBody], tenant: str, now_ms: int, key: str | None, suspicious: bool
    ) -> Request:
        if len(items) > MAX_ITEMS:
            raise refused(
                f"a request holds at most {MAX_ITEMS} items",
                [FieldError("", f"at most {MAX_ITEMS} items", f"{len(items)} items")],
            )
        events: list[Event] = []
        for index, one in enumerate(items):
            if one.user_ids is not None:
                raise _SlowPathError
            item_key = None if key is None else f"{key}#{index}"
            events.append(self._single(one, tenant, now_ms, item_key, suspicious))
        return Request(events, [Slot(index, None, None) for index in range(len(events))])

    def _fan_out(
        self,
        one: EventBody,
        tenant: str,
        now_ms: int,
        key: str | None,
        suspicious: bool,
        prepared: Mapping[str, Rendered] | None = None,
    ) -> Request:
        users = one.user_ids
        assert users is not None
        if one.user_id is not None:
            raise _SlowPathError
        if len(users) > MAX_ITEMS:
            raise refused(
                f"a request holds at most {MAX_ITEMS} recipients",
                [FieldError("userIds", f"at most {MAX_ITEMS} recipients", f"{len(users)} recipients")],
            )
        one.user_ids = None
        content = "" if prepared is not None else self._content(one, now_ms, suspicious)
        contents: dict[int, str] = {}  # of what was rendered, once for all who get it
        chosen = one.idempotency_key or key
        events: list[Event] = []
        slots: list[Slot] = []
        known: dict[str, int] = {}
        for index, user in enumerate(users):
            if type(user) is str and user in known:
                slots.append(Slot(known[user], user, None))  # named twice: notified once, told twice
                continue
            error = _recipient_error(index, user)
            if error is not None:
                told = problem(
                    "invalid", f"{error.path}: expected {error.expected}, got {error.got}", [error]
                )
                slots.append(Slot(-1, shown(user, 128) if isinstance(user, str) else None, told))
                continue
            if prepared is not None:
                rendered = prepared[user]
                content = contents.get(id(rendered))
                if content is None:
                    content = self._content(
                        _filled(one, rendered, None), now_ms, suspicious, rendered.channels
                    )
                    contents[id(rendered)] = content
            event = self._event(one, tenant, user, now_ms, content)
            if chosen is not None:
                event.idempotency_key = f"{ROUTE}:{chosen}#{user}"
                event.body_hash = _body_hash(one, user)
            known[user] = len(events)
            slots.append(Slot(len(events), user, None))
            events.append(event)
        return Request(events, slots)

    # -- pieces -------------------------------------------------------------------------------------

    def _content(
        self,
        one: EventBody,
        now_ms: int,
        suspicious: bool,
        channel_content: dict[str, dict[str, str]] | None = None,
    ) -> str:
        """Check what the decoder's types do not say and write the content. Raises _SlowPathError.

        The recipients are no part of an event's 32 KiB: a fan-out to 1,000 long ids is still one small event.
        """
        words = (
            one.user_id, one.type, one.category, one.actor_id, one.target_type, one.target_id, one.image_url,
            one.icon, one.link, one.collapse_key, one.campaign_id, one.source_app, one.idempotency_key,
        )  # fmt: skip
        if has_control("".join(filter(None, words))) or (one.dedupe is not None and _dedupe_wrong(one)):
            raise _SlowPathError
        body, expires = one.body, one.expires_at
        if body is not None and len(body) * 4 > MAX_BODY_BYTES and len(body.encode()) > MAX_BODY_BYTES:
            raise _SlowPathError
        if expires is not None and not 0 <= expiry_ms(expires) < LAST_EXPIRY_MS:
            raise _SlowPathError
        if one.actions and has_control("".join(part for a in one.actions for part in a.plain())):
            raise _SlowPathError
        text = _encode(
            _Content(
                one.type,
                one.title,
                body,
                one.actor_id,
                one.target_type,
                one.target_id,
                _PRIORITY_NAME[_PRIORITY[one.priority]],
                one.category,
                one.actions or [],
                one.data or {},
                self._stamp(now_ms),
                one.image_url or UNSET,
                one.icon or UNSET,
                one.link or UNSET,
                UNSET if expires is None else rfc3339(expiry_ms(expires)),
                one.campaign_id or UNSET,
                one.source_app or UNSET,
                UNSET if one.channels is None else list(dict.fromkeys(one.channels)),
                one.collapse_key or UNSET,
                channel_content or UNSET,
            )
        )[1:-1]
        # Content leaves out the ids and keys of the event, at most 2.5 KiB, and adds less than 300 bytes.
        if len(text) > MAX_EVENT_BYTES - 4096 and event_bytes(one) > MAX_EVENT_BYTES:
            raise _SlowPathError
        if (suspicious or text.count(b"{") + text.count(b"[") >= MAX_DEPTH) and tree_errors(
            msgspec.to_builtins(one, builtin_types=(datetime,))
        ):
            raise _SlowPathError
        return text.decode()

    def _stamp(self, now_ms: int) -> str:
        """`rfc3339(now_ms)`, formatted once per millisecond (it costs as much as the whole decode)."""
        if now_ms != self._stamp_ms:
            self._stamp_ms, self._stamp_text = now_ms, rfc3339(now_ms)
        return self._stamp_text

    def _event(self, one: EventBody, tenant: str, user: str, now_ms: int, content: str) -> Event:
        return Event(
            self._ids.next(now_ms),
            tenant,
            user,
            slot_of(tenant, user),
            one.type,
            one.category,
            _PRIORITY[one.priority],
            content,
            now_ms,
            None if one.expires_at is None else expiry_ms(one.expires_at),
            None if one.channels is None else list(dict.fromkeys(one.channels)),
            one.collapse_key,
            fallback=list(dict.fromkeys(one.fallback)) if one.fallback else None,
            dedupe=None if one.dedupe is None else one.dedupe.plain(),
            aggregate=one.aggregate,
        )

    def _explained(
        self, document: Any, tenant: str, now_ms: int, key: str | None, prepared: Mapping[int, Prepared]
    ) -> Request:
        """The slow path: the same verdicts, item by item, with reasons."""
        if not is_array(document):
            one, made = _with_texts(document, prepared.get(0), recipients=True)
            if isinstance(one, Problem):
                raise ProblemError(one)
            try:
                at = _due_ms(one, now_ms)
                if one.user_ids is not None:
                    many = self._fan_out(one, tenant, now_ms, key, False, made)
                    if at is None:
                        return many
                    later = {
                        index: Later(at, _sent_later(one, e.user)) for index, e in enumerate(many.events)
                    }
                    return many._replace(later=later)
                single = self._single(one, tenant, now_ms, key, False, made)
                return Request(
                    [single], None, {} if at is None else {0: Later(at, _sent_later(one, single.user))}
                )
            except _SlowPathError:
                raise ProblemError(_UNEXPLAINED) from None
        if len(document) > MAX_ITEMS:
            raise refused(
                f"a request holds at most {MAX_ITEMS} items",
                [FieldError("", f"at most {MAX_ITEMS} items", f"{len(document)} items")],
            )
        events: list[Event] = []
        slots: list[Slot] = []
        later: dict[int, Later] = {}
        for index, item in enumerate(document):
            one, made = _with_texts(item, prepared.get(index), recipients=False)
            if not isinstance(one, Problem):
                item_key = None if key is None else f"{key}#{index}"
                try:
                    events.append(self._single(one, tenant, now_ms, item_key, False, made))
                    at = _due_ms(one, now_ms)
                    if at is not None:
                        later[len(events) - 1] = Later(at, _sent_later(one, events[-1].user))
                    slots.append(Slot(len(events) - 1, None, None))
                    continue
                except _SlowPathError:
                    one = _UNEXPLAINED
            slots.append(Slot(-1, None, one))
        return Request(events, slots, later)


def _dedupe_wrong(one: EventBody) -> bool:
    """What the decoder's types do not say of `dedupe`."""
    dedupe = one.dedupe
    assert dedupe is not None
    if dedupe.key is not None and has_control(dedupe.key):
        return True
    return bool(one.aggregate) and dedupe.merge not in (None, DEDUPES[0])


def is_plain(document: Any) -> bool:
    """Whether no event of a body names a template or a time, nor the only one a topic."""
    if topic_of(document) is not None:
        return False
    items = document if is_array(document) else [document]
    return not any(
        is_object(item) and (item.get("template") is not None or item.get("scheduleAt") is not None)
        for item in items
    )


def topic_of(document: Any) -> dict[str, Any] | None:
    """The event of a body, if it is one event that names a topic."""
    return document if is_object(document) and document.get("topic") is not None else None


def _with_texts(
    item: Any, prepared: Prepared | None, *, recipients: bool
) -> tuple[EventBody | Problem, Mapping[str, Rendered] | None]:
    """A body and what its template made for its recipients, or the problem."""
    one = _accepted(item, recipients=recipients)
    if isinstance(one, Problem) or not isinstance(one, TemplatedBody):
        return one, None
    if prepared is None:
        return problem("not_supported", "templates are not rendered here"), None
    return (prepared, None) if isinstance(prepared, Problem) else (one, prepared)


def _variants(parsed: Request, document: Any, prepared: Mapping[int, Prepared]) -> dict[int, Rendered]:
    """The variant of each event that has one. In a batch the n-th event is that of the n-th accepted item."""
    places = [0] * len(parsed.events)
    if is_array(document):
        assert parsed.slots is not None
        for place, slot in enumerate(parsed.slots):
            if slot.event >= 0:
                places[slot.event] = place
    found: dict[int, Rendered] = {}
    for index, event in enumerate(parsed.events):
        made = prepared.get(places[index])
        rendered = None if made is None or isinstance(made, Problem) else made.get(event.user)
        if rendered is not None and rendered.variant is not None:
            found[index] = rendered
    return found


def _due_ms(one: EventBody, now_ms: int) -> int | None:
    """When it is to be sent; None is now, as is what has passed."""
    at = one.schedule_at if isinstance(one, LaterBody) else None
    return None if at is None or expiry_ms(at) <= now_ms else expiry_ms(at)


def _sent_later(one: EventBody, user: str) -> str:
    """The event for one recipient, without what belongs to the request that scheduled it."""
    body = msgspec.structs.replace(
        cast("Any", one), user_id=user, user_ids=None, schedule_at=None, idempotency_key=None
    )
    return _encode(body).decode()


def _filled(one: EventBody, rendered: Rendered, user: str | None) -> EventBody:
    """A body with the texts of its template, those of its own over them."""
    texts = rendered.members
    return msgspec.structs.replace(
        cast("Any", one),
        user_id=user,
        title=one.title or texts["title"],
        body=texts.get("body"),
        link=one.link or texts.get("link"),
        image_url=one.image_url or texts.get("imageUrl"),
    )


_UNEXPLAINED: Final = problem("invalid", "the event breaks a rule of docs/reference/http.md")
"""Both paths follow the same rules (a test holds them to it), so nobody should ever read this."""


class ProblemError(InvalidInputError):
    """A request refused as a whole. Args (positional): the problem."""

    def __init__(self, told: Problem) -> None:
        super().__init__(told.detail or told.title, code=told.code)
        self.args = (told,)
        self.problem = told

    def __str__(self) -> str:
        return self.problem.detail or self.problem.title


def refused(detail: str, errors: list[FieldError] | None = None, code: str = "invalid") -> ProblemError:
    """The error of a refused request; `code` as in carillon.problems."""
    return ProblemError(problem(code, detail, errors or []))


def event_bytes(one: EventBody) -> int:
    """Size of an event as compact JSON, its list of recipients left out."""
    users, one.user_ids = one.user_ids, None
    size = len(_encode(one))
    one.user_ids = users
    return size


def _accepted(item: Any, *, recipients: bool) -> EventBody | Problem:
    """An item given as plain values as a body, or the problem that tells what is wrong with it."""
    refusal = explain_event(item, recipients=recipients)
    if refusal is None:
        try:
            one = msgspec.convert(item, LaterBody if item.get("template") is None else TemplatedBody)
            size = event_bytes(one)
        except (msgspec.ValidationError, UnicodeError, OverflowError) as exc:
            return problem("invalid", str(exc))
        if size <= MAX_EVENT_BYTES:
            return one
        limit = FieldError("", f"an event of at most {MAX_EVENT_BYTES} bytes", f"{size} bytes")
        refusal = Refusal("invalid", [limit])
    first = refusal.errors[0]
    where = f"{first.path}: " if first.path else ""
    return problem(refusal.code, f"{where}expected {first.expected}, got {first.got}", refusal.errors)


def _recipient_error(index: int, user: Any) -> FieldError | None:
    if type(user) is str and 0 < len(user) <= 128 and user.isprintable() and _encodable(user):
        return None
    path = f"userIds/{index}"
    error = text_error(path, user, TEXTS["userId"])
    if error is None and not _encodable(user):
        error = FieldError(path, "no lone surrogate", shown(user))
    return error


def _encodable(text: str) -> bool:
    return text.isascii() or _LONE.search(text) is None


_LONE: Final = re.compile(r"[\ud800-\udfff]")


def _body_hash(one: EventBody, user: str) -> bytes:
    """SHA-256 of the canonical body: members sorted, no white space, absent and null alike, the key itself
    left out (it may have come as a header), the recipient named."""
    key, one.idempotency_key = one.idempotency_key, None
    before, one.user_id = one.user_id, user
    try:
        return hashlib.sha256(_encode_sorted(one)).digest()
    finally:
        one.idempotency_key, one.user_id = key, before


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _read_int(digits: str) -> int:
    # Python refuses int() of more than 4,300 digits; anything beyond 20 is out of range all the same.
    return int(digits) if len(digits) <= 20 else int(digits[:20]) * 10


_json_decoder: Final = json.JSONDecoder(parse_constant=_refuse_constant, parse_int=_read_int)


def read_json(body: bytes) -> Any:
    """Parse a JSON body into plain values; an empty one equals `{}`. For paths that must explain.

    Raises:
        ProblemError: `malformed` (400) if it is not UTF-8 or not JSON; `invalid` (422) if it nests so deeply
            that no reader follows.
    """
    try:
        text = body.decode()
    except UnicodeDecodeError as exc:
        raise refused(f"the body is not UTF-8: byte {exc.start}", code="malformed") from None
    text = text.strip(" \t\r\n")
    if not text:
        return {}
    try:
        return _json_decoder.decode(text)
    except RecursionError:
        deep = FieldError("", f"nesting of at most {MAX_DEPTH}", "deeper nesting")
        raise refused(f"the body nests deeper than {MAX_DEPTH}", [deep]) from None
    except ValueError as exc:
        raise refused(f"the body is not JSON: {exc}", code="malformed") from None


assert TEXTS["idempotencyKey"].high == MAX_KEY
