"""Client of Carillon: publish events, subscribe to a user's notifications.

with Publisher("http://127.0.0.1:8000", key) as publisher:
    publisher.send(Event(user_id="ada", type="hello", title="Hello"))

async with Subscriber("ws://127.0.0.1:8001/ws", token=token) as subscriber:
    async for notification in subscriber:
        print(notification.title)
"""

from carillon_client.async_publisher import AsyncPublisher
from carillon_client.core.delivery import BatchLimits
from carillon_client.core.exchange import RetryPolicy
from carillon_client.core.subscription import SubscriptionLimits
from carillon_client.errors import (
    AuthenticationError,
    CarillonError,
    ClosedError,
    FieldError,
    GaveUpError,
    IdempotencyConflictError,
    InvalidRequestError,
    NotFoundError,
    OperationError,
    OperationTimeoutError,
    PermissionDeniedError,
    ProblemError,
    QueueFullError,
    SubscriptionError,
    SubscriptionRefusedError,
    TokenExpiredError,
    TransportError,
    UnavailableError,
    UnexpectedAnswerError,
    VersionConflictError,
)
from carillon_client.models import (
    Amendment,
    Broadcast,
    BroadcastCounts,
    BroadcastFailure,
    BroadcastPage,
    BroadcastUsers,
    Cancelled,
    Change,
    Device,
    Edited,
    Event,
    FailedLine,
    FeedPage,
    ImportReport,
    Notification,
    NotificationHistory,
    NotSent,
    Position,
    Presence,
    PresenceDevice,
    Reset,
    Retracted,
    SendReport,
    Sent,
    Token,
)
from carillon_client.publisher import Publisher
from carillon_client.subscriber import Subscriber

__all__ = [
    "Amendment",
    "AsyncPublisher",
    "AuthenticationError",
    "BatchLimits",
    "Broadcast",
    "BroadcastCounts",
    "BroadcastFailure",
    "BroadcastPage",
    "BroadcastUsers",
    "Cancelled",
    "CarillonError",
    "Change",
    "ClosedError",
    "Device",
    "Edited",
    "Event",
    "FailedLine",
    "FeedPage",
    "FieldError",
    "GaveUpError",
    "IdempotencyConflictError",
    "ImportReport",
    "InvalidRequestError",
    "NotFoundError",
    "NotSent",
    "Notification",
    "NotificationHistory",
    "OperationError",
    "OperationTimeoutError",
    "PermissionDeniedError",
    "Position",
    "Presence",
    "PresenceDevice",
    "ProblemError",
    "Publisher",
    "QueueFullError",
    "Reset",
    "Retracted",
    "RetryPolicy",
    "SendReport",
    "Sent",
    "Subscriber",
    "SubscriptionError",
    "SubscriptionLimits",
    "SubscriptionRefusedError",
    "Token",
    "TokenExpiredError",
    "TransportError",
    "UnavailableError",
    "UnexpectedAnswerError",
    "VersionConflictError",
]
