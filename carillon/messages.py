"""The messages that actors exchange over links (docs/reference/links.md is the wire contract).

Each is a MessagePack array whose first element is the integer tag, followed by the fields in the order of
its class. Fields are only ever appended, with a default; a tag is never reused.

Ids of notifications are 16 raw bytes here and UUID text at the edges. Times are milliseconds since the
Unix epoch. `slot` is `carillon.ids.slot_of(tenant, user)`.

The messages lie in messages_*.py by subject; all of them are imported from here, and `type_union` names those
that travel. docs/reference/links.md lists the tags.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct

from carillon.messages_events import PRIORITIES, Dedupe, Event, Outcome, Outcomes, Publish
from carillon.messages_members import (
    Address,
    ClusterMap,
    Join,
    Leave,
    Member,
    MemberStats,
    Renew,
    StatsQuery,
    StatsReply,
)
from carillon.messages_policies import PolicyHeld, PolicyRead
from carillon.messages_push import (
    LEFT,
    Push,
    PushAccepted,
    PushJob,
    PushLeft,
    PushOutcome,
    PushResult,
    PushTarget,
)
from carillon.messages_sockets import (
    Attach,
    AttachRefused,
    ClientAck,
    ClientChange,
    ClientMode,
    ClientReady,
    ClientResume,
    ClientTopic,
    ClientVisibility,
    ClientWatch,
    CloseSocket,
    Deliver,
    Detach,
    DeviceTold,
    PresenceTold,
    PresenceWatch,
    SocketDrained,
    WatchAnswer,
    WatchedUser,
    Write,
)
from carillon.messages_users import (
    Amend,
    Amended,
    Change,
    ChangeResult,
    DeviceAck,
    DeviceDelete,
    DevicePresence,
    DevicePut,
    DeviceVisibility,
    DigestChange,
    Logout,
    PlanQuery,
    PlanReply,
    PreferencesPut,
    PresenceMode,
    PresenceQuery,
    PresenceReply,
    ProfilePut,
    Replay,
    ReplayResult,
    SessionsRevoke,
    Unsubscribe,
    UserErase,
    UserPresence,
)

__all__ = [
    "LEFT", "PRIORITIES", "Address", "Amend", "Amended", "Attach", "AttachRefused", "Change",
    "ChangeResult", "ClientAck", "ClientChange", "ClientMode", "ClientReady", "ClientResume",
    "ClientTopic", "ClientVisibility", "ClientWatch", "CloseSocket", "ClusterMap", "Dedupe", "Deliver",
    "Detach", "DeviceAck", "DeviceDelete", "DevicePresence", "DevicePut", "DeviceTold",
    "DeviceVisibility", "DigestChange", "Done", "Envelope", "Event", "Failure", "Join", "Leave", "Logout",
    "Member", "MemberStats", "Message", "Outcome", "Outcomes", "Ping", "PlanQuery", "PlanReply",
    "PolicyHeld", "PolicyRead", "PreferencesPut", "PresenceMode", "PresenceQuery", "PresenceReply",
    "PresenceTold", "PresenceWatch",
    "ProfilePut", "Publish", "Push", "PushAccepted", "PushJob", "PushLeft", "PushOutcome", "PushResult",
    "PushTarget", "Renew", "Replay", "ReplayResult", "SessionsRevoke", "SocketDrained", "StatsQuery",
    "StatsReply", "Unsubscribe", "UserErase", "UserPresence", "WatchAnswer", "WatchedUser", "Write",
    "make_envelope_decoder", "type_union",
]  # fmt: skip


class Done(Struct, array_like=True, tag=8):
    """Plain success."""

    count: int = 1


class Failure(Struct, array_like=True, tag=90):
    """Reply to any request that failed; raised as `RemoteError` at the caller."""

    code: str
    message: str
    temporary: bool
    retry_after_s: float = 0.0


class Ping(Struct, array_like=True, tag=91):
    """One-way keep-alive of an idle link; receiving it is all it is for."""


type_union = (
    Publish | Outcomes | Change | ChangeResult | DevicePut | DeviceDelete | PreferencesPut | Done
    | PresenceQuery | PresenceReply | SessionsRevoke | Logout | Replay | ReplayResult | Attach | Detach
    | ClientReady | ClientResume | ClientAck | ClientChange | ClientVisibility | ClientWatch
    | SocketDrained | Deliver | CloseSocket | AttachRefused | Push | PushAccepted | PushOutcome
    | PushLeft | Join | Renew | ClusterMap | Leave | StatsQuery | StatsReply | Failure | Ping
    | DeviceAck | DeviceVisibility | DeviceTold | PresenceWatch | PresenceTold | WatchAnswer
    | PresenceMode | ClientMode
    | PlanQuery | PlanReply | Unsubscribe | Amend | Amended | DigestChange
    | ProfilePut | UserErase | ClientTopic | PolicyRead | PolicyHeld
)  # fmt: skip
Message = type_union


class Envelope(Struct, array_like=True):
    """What a frame carries: `[request, body]`.

    `request` is 0 for a one-way message, n > 0 for request n of the sender, -n for the reply to request n
    of the receiver.
    """

    request: int
    body: Message


def make_envelope_decoder() -> msgspec.msgpack.Decoder[Any]:
    """A decoder of `Envelope` (one per process: it is not to be pickled)."""
    return msgspec.msgpack.Decoder(Envelope)
