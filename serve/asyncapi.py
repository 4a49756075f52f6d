"""AsyncAPI 3.0 of the WebSocket and the event stream, from serve/frame_schemas.py."""

from __future__ import annotations

import functools
from typing import Any, Final

import msgspec

from actors.gateway_handshake import JSON_PROTOCOL, MSGPACK_PROTOCOL
from carillon.client_frames import MAX_DEPTH, MAX_INT
from serve.frame_schemas import CLIENT_FRAMES, SERVER_FRAMES
from serve.schemas import COMPONENTS, Schema, text

Document = dict[str, Any]

_POSITION: Final[dict[str, Schema]] = {
    "epoch": {"type": "string", "description": "With lastSeq: the position to go on from."},
    "lastSeq": {"type": "integer", "minimum": 0, "maximum": MAX_INT},
    "lastRev": {"type": "integer", "minimum": 0, "maximum": MAX_INT},
}
_WHO: Final[dict[str, Schema]] = {
    "token": {"type": "string", "description": "A client token, if no Authorization header brings it."},
    "ticket": {"type": "string", "description": "Of POST /api/tickets, instead of a token; once."},
    "deviceId": {**text(1, 128), "description": "The id used under /api/devices; absent: a random one."},
}


def asyncapi_document() -> Document:
    """The document, from the server's point of view: it sends SERVER_FRAMES and receives CLIENT_FRAMES."""
    frames = {**SERVER_FRAMES, **CLIENT_FRAMES}
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Carillon",
            "version": "1",
            "description": (
                "Frames between clients and a gateway: compact JSON objects, `type` first, one a message; or "
                "the same objects as MessagePack. Ignore frames and members you do not know. In what clients "
                "send there are nowhere NUL, lone surrogates, integers beyond ±(2^53-1) or nesting beyond "
                f"{MAX_DEPTH}. Positions, close codes and limits: docs/how-to/write-a-client.md."
            ),
        },
        "defaultContentType": "application/json",
        "servers": {
            "gateway": {"host": "localhost:8001", "protocol": "ws", "description": "A gateway."},
            "ingress": {"host": "localhost:8080", "protocol": "http", "description": "Its own door."},
        },
        "channels": {
            "socket": {
                "address": "/ws",
                "servers": [{"$ref": "#/servers/gateway"}],
                "description": (
                    f"Subprotocol {JSON_PROTOCOL} (text) or {MSGPACK_PROTOCOL} (binary); none means JSON, "
                    "and NOTIFICATION_UPDATED comes as NEW_NOTIFICATION."
                ),
                "messages": _refs(frames, "#/components/messages"),
                "bindings": {
                    "ws": {
                        "method": "GET",
                        "query": {"type": "object", "properties": {**_WHO, **_POSITION}},
                        "headers": {
                            "type": "object",
                            "properties": {
                                "Authorization": {
                                    "type": "string",
                                    "description": "Bearer and a client token.",
                                },
                                "Sec-WebSocket-Protocol": {"enum": [JSON_PROTOCOL, MSGPACK_PROTOCOL]},
                            },
                        },
                    }
                },
            },
            "stream": {
                "address": "/api/stream",
                "servers": [{"$ref": "#/servers/ingress"}],
                "description": "Server-sent events: each event's data is one frame, its id epoch:seq:rev.",
                "messages": _refs(SERVER_FRAMES, "#/components/messages"),
            },
        },
        "operations": {
            "tell": _operation("send", "socket", SERVER_FRAMES, "Frames to a client."),
            "hear": _operation("receive", "socket", CLIENT_FRAMES, "Frames from a client."),
            "stream": _operation("send", "stream", SERVER_FRAMES, "Frames to a client that has only HTTP."),
        },
        "components": {
            "messages": {
                kind: {
                    "name": kind,
                    "summary": schema["description"],
                    "payload": {"$ref": f"#/components/schemas/{kind}"},
                }
                for kind, schema in frames.items()
            },
            "schemas": {**frames, "Notification": COMPONENTS["Notification"]},
        },
    }


@functools.cache
def asyncapi_json() -> bytes:
    """The document as JSON; it never changes while the process lives."""
    return msgspec.json.encode(asyncapi_document())


def _refs(frames: dict[str, Schema], at: str) -> Document:
    return {kind: {"$ref": f"{at}/{kind}"} for kind in frames}


def _operation(action: str, channel: str, frames: dict[str, Schema], summary: str) -> Document:
    return {
        "action": action,
        "channel": {"$ref": f"#/channels/{channel}"},
        "summary": summary,
        "messages": [{"$ref": f"#/channels/{channel}/messages/{kind}"} for kind in frames],
    }
