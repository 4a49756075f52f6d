"""Calls about users as such: profiles, topics, segments, digests, erasure and export."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from carillon_client.core.calls import segment, typed, user_path
from carillon_client.core.codec import encode_json
from carillon_client.core.exchange import Call
from carillon_client.core.problems import error_of_answer
from carillon_client.errors import CarillonError, UnexpectedAnswerError
from carillon_client.models import (
    Digest,
    FlushedDigest,
    Profile,
    Segment,
    SegmentPage,
    SegmentPreview,
    Subscribed,
    SubscriberPage,
    Subscription,
)

_TOLD = ("userId", "createdAt", "updatedAt", "lastSeenAt")
"""Members of a profile that only the server tells."""


def put_profile(user_id: str, profile: Profile) -> Call[Profile]:
    """PUT /v1/users/{userId}."""
    members: dict[str, Any] = msgspec.to_builtins(profile)
    for name in _TOLD:
        members.pop(name, None)
    return Call("PUT", user_path(user_id), typed(Profile), encode_json(members))


def profile(user_id: str) -> Call[Profile | None]:
    """GET /v1/users/{userId}; None if nothing is known of the user."""
    parse: Callable[[Any], Profile | None] = typed(Profile)
    return Call("GET", user_path(user_id), parse, absent=lambda: None)


def erase(user_id: str) -> Call[bool]:
    """DELETE /v1/users/{userId}; False if nothing was kept. A repeated try finds what the first one did."""
    return Call("DELETE", user_path(user_id), lambda _: True, absent=lambda: False)


def export_path(user_id: str) -> str:
    """GET /v1/users/{userId}/export: a stream of lines."""
    return user_path(user_id, "/export")


class ExportReader:
    """Lines of an export as they come; knows whether it was whole."""

    def __init__(self) -> None:
        self._ended = False

    def line(self, raw: str) -> dict[str, Any] | None:
        """The line as data; None: it is the last one, or blank. Raises CarillonError: the server failed."""
        if not raw.strip():
            return None
        document: dict[str, Any] = msgspec.json.decode(raw)
        if document["kind"] == "error":
            told = document["problem"]
            raise error_of_answer(told["status"], {}, msgspec.json.encode(told))
        if document["kind"] == "end":
            self._ended = True
            return None
        return document

    def finish(self) -> None:
        """Raises UnexpectedAnswerError: it was cut off."""
        if not self._ended:
            raise UnexpectedAnswerError("the export was cut off: what came is not all")


def export_refused(status: int, headers: Mapping[str, str], body: bytes) -> CarillonError:
    """The error of an export that did not begin."""
    return error_of_answer(status, headers, body)


def _subscriber(topic: str, user_id: str) -> str:
    return f"/v1/topics/{segment('topic', topic)}/subscribers/{segment('userId', user_id)}"


def subscribe(topic: str, user_id: str) -> Call[Subscription]:
    """PUT /v1/topics/{topic}/subscribers/{userId}."""
    return Call("PUT", _subscriber(topic, user_id), typed(Subscription), b"{}")


def subscription(topic: str, user_id: str) -> Call[Subscription | None]:
    """GET /v1/topics/{topic}/subscribers/{userId}; None if the user does not subscribe."""
    parse: Callable[[Any], Subscription | None] = typed(Subscription)
    return Call("GET", _subscriber(topic, user_id), parse, absent=lambda: None)


def unsubscribe(topic: str, user_id: str) -> Call[bool]:
    """DELETE /v1/topics/{topic}/subscribers/{userId}; False if the user did not subscribe."""
    return Call("DELETE", _subscriber(topic, user_id), lambda _: True, absent=lambda: False)


def subscribe_many(topic: str, user_ids: Sequence[str]) -> Call[Subscribed]:
    """POST /v1/topics/{topic}/subscribers; it may be repeated."""
    path = f"/v1/topics/{segment('topic', topic)}/subscribers"
    return Call("POST", path, typed(Subscribed), encode_json({"userIds": list(user_ids)}))


def _paging(limit: int | None, cursor: str | None) -> tuple[tuple[str, str], ...]:
    given = {"limit": limit, "cursor": cursor}
    return tuple((name, str(value)) for name, value in given.items() if value is not None)


def subscribers(topic: str, limit: int | None, cursor: str | None) -> Call[SubscriberPage]:
    """GET /v1/topics/{topic}/subscribers."""
    path = f"/v1/topics/{segment('topic', topic)}/subscribers"
    return Call("GET", path, typed(SubscriberPage), query=_paging(limit, cursor))


def _segment_path(segment_id: str, rest: str = "") -> str:
    return f"/v1/segments/{segment('segmentId', segment_id)}{rest}"


def put_segment(segment_id: str, filter: Mapping[str, Any], description: str | None) -> Call[Segment]:
    """PUT /v1/segments/{segmentId}."""
    body: dict[str, Any] = {"filter": dict(filter)}
    if description is not None:
        body["description"] = description
    return Call("PUT", _segment_path(segment_id), typed(Segment), encode_json(body))


def get_segment(segment_id: str) -> Call[Segment | None]:
    """GET /v1/segments/{segmentId}; None if there is none."""
    parse: Callable[[Any], Segment | None] = typed(Segment)
    return Call("GET", _segment_path(segment_id), parse, absent=lambda: None)


def segments(limit: int | None, cursor: str | None) -> Call[SegmentPage]:
    """GET /v1/segments."""
    return Call("GET", "/v1/segments", typed(SegmentPage), query=_paging(limit, cursor))


def delete_segment(segment_id: str) -> Call[bool]:
    """DELETE /v1/segments/{segmentId}; False if there was none."""
    return Call("DELETE", _segment_path(segment_id), lambda _: True, absent=lambda: False)


def preview_segment(segment_id: str) -> Call[SegmentPreview]:
    """POST /v1/segments/{segmentId}/preview."""
    return Call("POST", _segment_path(segment_id, "/preview"), typed(SegmentPreview), b"{}")


def digests(user_id: str) -> Call[list[Digest]]:
    """GET /v1/users/{userId}/digests."""

    def parse(document: Any) -> list[Digest]:
        return msgspec.convert(document["digests"], list[Digest])

    return Call("GET", user_path(user_id, "/digests"), parse)


def flush_digest(user_id: str, digest_id: str) -> Call[FlushedDigest]:
    """POST /v1/users/{userId}/digests/{digestId}/flush; it may be repeated."""
    path = user_path(user_id, f"/digests/{segment('digestId', digest_id)}/flush")
    return Call("POST", path, typed(FlushedDigest), b"{}")


def remove_from_digest(user_id: str, digest_id: str, notification_id: str) -> Call[bool]:
    """DELETE /v1/users/{userId}/digests/{digestId}/items/{notificationId}; False if it is not in it."""
    item = segment("notificationId", notification_id)
    path = user_path(user_id, f"/digests/{segment('digestId', digest_id)}/items/{item}")
    return Call("DELETE", path, lambda _: True, absent=lambda: False)
