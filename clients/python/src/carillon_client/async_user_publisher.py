"""The asynchronous publisher, what it does about users: profiles, topics, segments, digests, erasure."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterable, Mapping
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


class AsyncUserPublisher(ABC):
    """The part of the asynchronous publisher that is about users as such."""

    _client: httpx.AsyncClient

    @abstractmethod
    async def _call(self, call: Call[T]) -> T:
        """Make a call, with its retries."""

    async def put_profile(self, user_id: str, profile: Profile) -> Profile:
        """Replace the profile of a user: what it leaves out is emptied."""
        return await self._call(user_calls.put_profile(user_id, profile))

    async def profile(self, user_id: str) -> Profile | None:
        """What is known of a user; None: nothing."""
        return await self._call(user_calls.profile(user_id))

    async def erase_user(self, user_id: str) -> bool:
        """Erase everything kept of a user; False if nothing was."""
        return await self._call(user_calls.erase(user_id))

    async def subscribe(self, topic: str, user_id: str) -> Subscription:
        """Subscribe a user to a topic."""
        return await self._call(user_calls.subscribe(topic, user_id))

    async def unsubscribe(self, topic: str, user_id: str) -> bool:
        """End it; False if the user did not subscribe."""
        return await self._call(user_calls.unsubscribe(topic, user_id))

    async def subscription(self, topic: str, user_id: str) -> Subscription | None:
        """Since when a user subscribes; None: it does not."""
        return await self._call(user_calls.subscription(topic, user_id))

    async def subscribe_many(self, topic: str, user_ids: Iterable[str]) -> Subscribed:
        """Subscribe at most 1,000 users to a topic."""
        return await self._call(user_calls.subscribe_many(topic, list(user_ids)))

    async def subscribers(
        self, topic: str, *, limit: int | None = None, cursor: str | None = None
    ) -> SubscriberPage:
        """A page of the subscribers of a topic."""
        return await self._call(user_calls.subscribers(topic, limit, cursor))

    async def put_segment(
        self, segment_id: str, filter: Mapping[str, Any], *, description: str | None = None
    ) -> Segment:
        """Make or replace a segment. docs/reference/users.md has the filters."""
        return await self._call(user_calls.put_segment(segment_id, filter, description))

    async def segment(self, segment_id: str) -> Segment | None:
        """A segment; None if there is none."""
        return await self._call(user_calls.get_segment(segment_id))

    async def segments(self, *, limit: int | None = None, cursor: str | None = None) -> SegmentPage:
        """A page of segments, by id."""
        return await self._call(user_calls.segments(limit, cursor))

    async def delete_segment(self, segment_id: str) -> bool:
        """Delete a segment; False if there was none."""
        return await self._call(user_calls.delete_segment(segment_id))

    async def preview_segment(self, segment_id: str) -> SegmentPreview:
        """Who fits a segment now."""
        return await self._call(user_calls.preview_segment(segment_id))

    async def digests(self, user_id: str) -> list[Digest]:
        """The open digests of a user, by due time."""
        return await self._call(user_calls.digests(user_id))

    async def flush_digest(self, user_id: str, digest_id: str) -> FlushedDigest:
        """Send a digest now."""
        return await self._call(user_calls.flush_digest(user_id, digest_id))

    async def remove_from_digest(self, user_id: str, digest_id: str, notification_id: str) -> bool:
        """Take a notification out of a digest; it stays in the feed. False if it is not in it."""
        return await self._call(user_calls.remove_from_digest(user_id, digest_id, notification_id))

    async def export_user(self, user_id: str) -> AsyncIterator[dict[str, Any]]:
        """Everything kept of a user, line by line, as it comes; each has a `kind`. Not tried again by itself.

        Raises:
            NotFoundError: nothing is kept of the user.
            UnexpectedAnswerError: it was cut off; another CarillonError: the server could not read on.
        """
        if self._client.is_closed:
            raise ClosedError("the publisher is closed")
        reader = user_calls.ExportReader()
        try:
            async with self._client.stream("GET", user_calls.export_path(user_id)) as answer:
                if answer.status_code != 200:
                    body = await answer.aread()
                    raise user_calls.export_refused(answer.status_code, dict(answer.headers), body)
                async for raw in answer.aiter_lines():
                    document = reader.line(raw)
                    if document is not None:
                        yield document
        except httpx.RequestError as exc:
            raise transport_error(exc) from exc
        reader.finish()
