"""The synchronous publisher, what it does about users: profiles, topics, segments, digests, erasure."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import httpx

from carillon_client.core import user_calls
from carillon_client.core.exchange import Call
from carillon_client.errors import ClosedError
from carillon_client.http_shell import transport_error
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

T = TypeVar("T")


class UserPublisher(ABC):
    """The part of the synchronous publisher that is about users as such."""

    _client: httpx.Client

    @abstractmethod
    def _call(self, call: Call[T]) -> T:
        """Make a call, with its retries."""

    def put_profile(self, user_id: str, profile: Profile) -> Profile:
        """Replace the profile of a user: what it leaves out is emptied."""
        return self._call(user_calls.put_profile(user_id, profile))

    def profile(self, user_id: str) -> Profile | None:
        """What is known of a user; None: nothing."""
        return self._call(user_calls.profile(user_id))

    def erase_user(self, user_id: str) -> bool:
        """Erase everything kept of a user; False if nothing was."""
        return self._call(user_calls.erase(user_id))

    def subscribe(self, topic: str, user_id: str) -> Subscription:
        """Subscribe a user to a topic."""
        return self._call(user_calls.subscribe(topic, user_id))

    def unsubscribe(self, topic: str, user_id: str) -> bool:
        """End it; False if the user did not subscribe."""
        return self._call(user_calls.unsubscribe(topic, user_id))

    def subscription(self, topic: str, user_id: str) -> Subscription | None:
        """Since when a user subscribes; None: it does not."""
        return self._call(user_calls.subscription(topic, user_id))

    def subscribe_many(self, topic: str, user_ids: Iterable[str]) -> Subscribed:
        """Subscribe at most 1,000 users to a topic."""
        return self._call(user_calls.subscribe_many(topic, list(user_ids)))

    def subscribers(
        self, topic: str, *, limit: int | None = None, cursor: str | None = None
    ) -> SubscriberPage:
        """A page of the subscribers of a topic."""
        return self._call(user_calls.subscribers(topic, limit, cursor))

    def put_segment(
        self, segment_id: str, filter: Mapping[str, Any], *, description: str | None = None
    ) -> Segment:
        """Make or replace a segment. docs/reference/users.md has the filters."""
        return self._call(user_calls.put_segment(segment_id, filter, description))

    def segment(self, segment_id: str) -> Segment | None:
        """A segment; None if there is none."""
        return self._call(user_calls.get_segment(segment_id))

    def segments(self, *, limit: int | None = None, cursor: str | None = None) -> SegmentPage:
        """A page of segments, by id."""
        return self._call(user_calls.segments(limit, cursor))

    def delete_segment(self, segment_id: str) -> bool:
        """Delete a segment; False if there was none."""
        return self._call(user_calls.delete_segment(segment_id))

    def preview_segment(self, segment_id: str) -> SegmentPreview:
        """Who fits a segment now."""
        return self._call(user_calls.preview_segment(segment_id))

    def digests(self, user_id: str) -> list[Digest]:
        """The open digests of a user, by due time."""
        return self._call(user_calls.digests(user_id))

    def flush_digest(self, user_id: str, digest_id: str) -> FlushedDigest:
        """Send a digest now."""
        return self._call(user_calls.flush_digest(user_id, digest_id))

    def remove_from_digest(self, user_id: str, digest_id: str, notification_id: str) -> bool:
        """Take a notification out of a digest; it stays in the feed. False if it is not in it."""
        return self._call(user_calls.remove_from_digest(user_id, digest_id, notification_id))

    def export_user(self, user_id: str) -> Iterator[dict[str, Any]]:
        """Everything kept of a user, line by line, as it comes; each has a `kind`. Not tried again by itself.

        Raises:
            NotFoundError: nothing is kept of the user.
            UnexpectedAnswerError: it was cut off; another CarillonError: the server could not read on.
        """
        if self._client.is_closed:
            raise ClosedError("the publisher is closed")
        reader = user_calls.ExportReader()
        try:
            with self._client.stream("GET", user_calls.export_path(user_id)) as answer:
                if answer.status_code != 200:
                    body = answer.read()
                    raise user_calls.export_refused(answer.status_code, dict(answer.headers), body)
                for raw in answer.iter_lines():
                    document = reader.line(raw)
                    if document is not None:
                        yield document
        except httpx.RequestError as exc:
            raise transport_error(exc) from exc
        reader.finish()
