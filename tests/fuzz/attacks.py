"""What is done to a gateway: made from one `random.Random`, with what must come of it.

An attack that breaks the protocol in a known way says which close code is due, and what of the frames before
it is to be answered: an independent reading of RFC 6455 beside the gateway's. Mutations of valid streams
promise nothing of that kind; what must hold for all is in arena.py.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from random import Random
from typing import Any

from tests.fuzz.wire import BINARY, CLOSE, CONT, PING, PONG, TEXT, frame, request

PROTOCOL_ERROR, BAD_DATA, TOO_BIG = 1002, 1007, 1009
OPEN, NOBODY = "open", "nobody"
"""With a valid token of the attacker; without one."""


@dataclass
class Attack:
    """One connection's worth of trouble.

    Attributes:
        who: OPEN attacks start behind a good handshake and WELCOME; NOBODY's bring their own.
        data: what is sent, in pieces cut by `cuts`.
        codes: one of these must close it; None: whatever, also nothing.
        status: HTTP statuses one of which must come; None: no matter.
        answers: `id`s of PONG frames due before the end, in order. pongs: payloads of control pongs.
        exact: nothing but those answers may come.
        slow_s: a pause before every piece.
        waits: the attacker says no more and waits for the server to end it.
    """

    name: str
    who: str
    data: bytes
    codes: frozenset[int] | None = None
    status: frozenset[int] | None = None
    answers: list[Any] = field(default_factory=list)
    pongs: list[bytes] = field(default_factory=list)
    exact: bool = False
    cuts: list[int] = field(default_factory=list)
    slow_s: float = 0.0
    waits: bool = False

    def pieces(self) -> list[bytes]:
        """`data`, cut."""
        at = [0, *sorted(self.cuts), len(self.data)]
        return [self.data[a:b] for a, b in pairwise(at) if b > a] or [b""]


@dataclass
class Facts:
    """What attackers know.

    Attributes:
        token: the attacker's own, valid. victim: a user name. victim_ids: the victim's notifications.
        secret: of a tenant of the attacker's own.
    """

    token: str
    victim: str
    victim_ids: list[str]
    secret: str
    max_message: int = 65_536


# -- behind a good handshake ------------------------------------------------------------------------------


def _message(dice: Random, payload: bytes, opcode: int = TEXT) -> tuple[bytes, list[bytes]]:
    """A valid message, perhaps in fragments with pings between: (bytes, pongs due)."""
    if dice.random() < 0.5:
        return frame(payload, opcode, mask=dice.randbytes(4)), []
    data, pongs = b"", []
    cuts = sorted(dice.randrange(len(payload) + 1) for _ in range(dice.randrange(1, 4)))
    parts = [payload[a:b] for a, b in zip([0, *cuts], [*cuts, len(payload)], strict=True)]
    for index, part in enumerate(parts):
        last = index == len(parts) - 1
        data += frame(part, CONT if index else opcode, fin=last, mask=dice.randbytes(4))
        if not last and dice.random() < 0.4:
            said = dice.randbytes(dice.choice((0, 1, 125)))
            data += frame(said, PING, mask=dice.randbytes(4))
            pongs.append(said)
    return data, pongs


def _prefix(dice: Random, attack: Attack) -> None:
    for _ in range(dice.randrange(4)):
        kind = dice.randrange(4)
        if kind == 0:
            said = dice.randbytes(dice.randrange(126))
            attack.data += frame(said, PING, mask=dice.randbytes(4))
            attack.pongs.append(said)
        elif kind == 1:
            attack.data += frame(dice.randbytes(dice.randrange(126)), PONG, mask=dice.randbytes(4))
        else:
            ref = dice.choice((dice.randrange(2**53), f"ü{dice.randrange(1000)}"))
            pad = "x" * dice.choice((0, 0, 0, 100, 200, 70_000 - 5000 - 128))
            text = json.dumps({"type": "PING", "id": ref, "pad": pad}, ensure_ascii=dice.random() < 0.5)
            data, pongs = _message(dice, text.encode())
            attack.data += data
            attack.pongs += pongs
            attack.answers.append(ref)


BAD_TEXT = (
    b"\xff", b"\xc0\x80", b"\xc3", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe2\x82", b"\xf8\x88\x80\x80\x80",
    b"\x80", b"\xed\xbf\xbf",
)  # fmt: skip
BAD_CODES = (0, 1, 999, 1004, 1005, 1006, 1015, 1016, 2000, 2999, 5000, 65_535)


def _violation(dice: Random, facts: Facts) -> tuple[str, bytes, set[int]]:
    """A breach of RFC 6455: (name, bytes, codes it may be closed with)."""
    key = dice.randbytes(4)
    small = dice.randbytes(dice.randrange(20))
    control = dice.choice((PING, PONG, CLOSE))
    kind = dice.randrange(15)
    if kind == 0:
        rsv = dice.randrange(1, 8)
        return f"reserved bits {rsv:03b}", frame(small, TEXT, rsv=rsv, mask=key), {PROTOCOL_ERROR}
    if kind == 1:
        opcode = dice.choice((3, 4, 5, 6, 7, 11, 12, 13, 14, 15))
        return f"opcode {opcode}", frame(small, opcode, mask=key), {PROTOCOL_ERROR}
    if kind == 2:
        return "fragmented control frame", frame(small, control, fin=False, mask=key), {PROTOCOL_ERROR}
    if kind == 3:
        long = dice.randbytes(dice.choice((126, 127, 300)))
        return "long control frame", frame(long, control, mask=key), {PROTOCOL_ERROR}
    if kind == 4:
        return "not masked", frame(b'{"type":"PING"}', mask=None), {PROTOCOL_ERROR}
    if kind == 5:
        return (
            "continuation of nothing",
            frame(small, CONT, fin=dice.random() < 0.5, mask=key),
            {PROTOCOL_ERROR},
        )
    if kind == 6:
        first = frame(b"{", TEXT, fin=False, mask=key)
        return "new message inside of another", first + frame(b"{}", dice.choice((TEXT, BINARY)), mask=key), {
            PROTOCOL_ERROR
        }  # fmt: skip
    if kind == 7:
        told = dice.choice((facts.max_message + 1, 2**31, 2**32, 2**62))
        return f"length {told}", frame(b"", TEXT, mask=key, length=told, size_bytes=8), {TOO_BIG}
    if kind == 8:
        told = dice.choice((2**63, 2**64 - 1))
        return (
            f"length {told}",
            frame(b"", TEXT, mask=key, length=told, size_bytes=8),
            {TOO_BIG, PROTOCOL_ERROR},
        )
    if kind == 9:
        half = b"x" * (facts.max_message // 2 + 1)
        data = frame(half, TEXT, fin=False, mask=key) + frame(half, CONT, mask=key)
        return "too long in fragments", data, {TOO_BIG}
    if kind == 10:
        bad = b'{"type":"PING","id":"' + dice.choice(BAD_TEXT) + b'"}'
        return "not UTF-8", _message(dice, bad)[0], {BAD_DATA}
    if kind == 11:
        return "half a close code", frame(b"\x03", CLOSE, mask=key), {PROTOCOL_ERROR}
    if kind == 12:
        code = dice.choice(BAD_CODES)
        return f"close code {code}", frame(code.to_bytes(2, "big"), CLOSE, mask=key), {PROTOCOL_ERROR}
    if kind == 13:
        data = frame(b"\x03\xe8" + dice.choice(BAD_TEXT), CLOSE, mask=key)
        return "close reason not UTF-8", data, {BAD_DATA}
    return "extended length 2^63 of a ping", frame(b"", PING, mask=key, length=2**63, size_bytes=8), {
        PROTOCOL_ERROR, TOO_BIG,
    }  # fmt: skip


def violation(dice: Random, facts: Facts) -> Attack:
    """Some valid frames, one breach, and more that must find nobody listening."""
    attack = Attack("", OPEN, b"", exact=True)
    _prefix(dice, attack)
    attack.name, data, codes = _violation(dice, facts)
    # Pings of the packet in which a message turns out to be bad may be answered, or not.
    attack.exact = "UTF-8" not in attack.name
    attack.codes = frozenset(codes)
    attack.data += data
    for _ in range(dice.randrange(3)):
        # Text is looked at when its message is complete: a worse breach in the same packet comes first.
        more = dice.randbytes(50) if attack.exact else b""
        attack.data += dice.choice((frame(b'{"type":"PING","id":"late"}'), more))
    return attack


def good_close(dice: Random, facts: Facts) -> Attack:
    """A valid close: echoed."""
    attack = Attack("good close", OPEN, b"", exact=True)
    _prefix(dice, attack)
    code = dice.choice((1000, 1001, 1003, 1011, 3000, 4999))
    reason = "é" * dice.randrange(61)
    attack.data += frame(code.to_bytes(2, "big") + reason.encode(), CLOSE, mask=dice.randbytes(4))
    attack.codes = frozenset({code})
    return attack


def mutation(dice: Random, facts: Facts) -> Attack:
    """A valid stream with random damage: flipped, cut, doubled, inserted."""
    attack = Attack("mutation", OPEN, b"")
    for _ in range(dice.randrange(1, 5)):
        _prefix(dice, attack)
    data = bytearray(attack.data)
    for _ in range(dice.randrange(1, 6)):
        at = dice.randrange(len(data) + 1)
        kind = dice.randrange(4)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << dice.randrange(8)
        elif kind == 1:
            del data[at : at + dice.randrange(1, 30)]
        elif kind == 2:
            data[at:at] = data[at : at + 40]
        else:
            data[at:at] = dice.randbytes(dice.randrange(1, 20))
    attack.answers, attack.pongs = [], []
    attack.data = bytes(data)
    return attack


def noise(dice: Random, facts: Facts) -> Attack:
    """Random bytes, or frames of random bytes."""
    attack = Attack("noise", OPEN, b"")
    if dice.random() < 0.5:
        attack.data = dice.randbytes(dice.choice((1, 10, 200, 5000)))
    else:
        for _ in range(dice.randrange(1, 30)):
            attack.data += frame(
                dice.randbytes(dice.choice((0, 1, 5, 125, 126, 3000))),
                dice.randrange(16),
                fin=dice.random() < 0.8,
                mask=dice.randbytes(4) if dice.random() < 0.97 else None,
            )
    return attack


def flood(dice: Random, facts: Facts) -> Attack:
    """Very many tiny things: empty fragments, pings, closes."""
    kind = dice.randrange(4)
    if kind == 0:
        data = frame(b"", TEXT, fin=False) + frame(b"", CONT, fin=False) * 2000
    elif kind == 1:
        data = frame(b"", PING) * 2000
    elif kind == 2:
        data = frame(b"\x03\xe8", CLOSE) * 200
    else:
        data = frame(b"[" * 30_000) + frame(b'{"a":' * 10_000)
    return Attack("flood", OPEN, data)


def foreign(dice: Random, facts: Facts) -> Attack:
    """Well-formed frames about what is another user's."""
    attack = Attack("foreign ids", OPEN, b"")
    for _ in range(dice.randrange(1, 6)):
        some = dice.choice(facts.victim_ids)
        document: dict[str, Any] = dice.choice(
            (
                {"type": "MARK_READ", "notificationIds": facts.victim_ids},
                {"type": "MARK_SEEN", "notificationIds": [some]},
                {"type": "ARCHIVE", "notificationId": some},
                {"type": "DISMISS", "notificationId": some},
                {"type": "CLICK", "notificationId": some},
                {"type": "ACK", "notificationIds": facts.victim_ids},
                {"type": "ACK", "seq": 2**53 - 1},
                {"type": "MARK_ALL_READ", "upToSeq": 2**53 - 1},
                {"type": "MARK_ALL_READ", "userId": facts.victim, "tenant": "acme", "sub": facts.victim},
                {"type": "RESUME", "epoch": "", "lastSeq": 0},
                {"type": "RESUME", "epoch": "e1", "lastSeq": 0, "lastRev": 0, "userId": facts.victim},
                {"type": "WATCH_PRESENCE", "userIds": [facts.victim]},
                {"type": "AUTH", "token": "x"},
                {"type": "AUTH", "token": forged(dice, facts)},
                {"type": "SUBSCRIBE", "topic": facts.victim},
            )
        )
        attack.data += frame(json.dumps(document).encode(), mask=dice.randbytes(4))
    return attack


# -- the handshake ----------------------------------------------------------------------------------------


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def jwt(header: dict[str, Any], claims: dict[str, Any], secret: str | None) -> str:
    """A token by hand; no secret: no signature."""
    body = f"{_b64(json.dumps(header).encode())}.{_b64(json.dumps(claims).encode())}"
    signature = b"" if secret is None else hmac.digest(secret.encode(), body.encode(), hashlib.sha256)
    return f"{body}.{_b64(signature)}"


def forged(dice: Random, facts: Facts) -> str:
    """A token for the victim that no server may take."""
    claims: dict[str, Any] = {
        "sub": facts.victim,
        "tenant": "acme",
        "exp": 4_000_000_000,
        "iat": 1_700_000_000,
    }
    head: dict[str, Any] = {"alg": "HS256", "typ": "JWT"}
    parts = facts.token.split(".")
    kind = dice.randrange(12)
    if kind == 0:
        return jwt({"alg": dice.choice(("none", "None", "NONE", "nOnE", "")), "typ": "JWT"}, claims, None)
    if kind == 1:
        return jwt(head, claims, dice.choice(("", "secret", "0" * 32)))
    if kind == 2:
        return jwt(head, claims, facts.secret)  # of another tenant, signed with the attacker's own secret
    if kind == 3:
        return f"{parts[0]}.{_b64(json.dumps(claims).encode())}.{parts[2]}"
    if kind == 4:
        return jwt(
            {"alg": dice.choice(("RS256", "ES256", "HS512", "EdDSA")), "kid": "../../x"}, claims, facts.secret
        )
    if kind == 5:
        return jwt(
            {**head, "jwk": {"kty": "oct", "k": _b64(b"k" * 32)}, "jku": "http://127.0.0.1:1/"},
            claims,
            "k" * 32,
        )
    if kind == 6:
        return ".".join(parts[:2]) + "."
    if kind == 7:
        return dice.choice(
            ("", ".", "..", "a.b.c", "null", "Bearer", "x" * 9000, "%00", "\u00e9.\u00e9.\u00e9")
        )
    if kind == 8:
        odd = dice.choice((None, 1, [], {}, "", "a\x00b", "x" * 129, facts.victim + "\n"))
        return jwt(head, claims | {dice.choice(("sub", "tenant")): odd}, facts.secret)
    if kind == 9:
        return jwt(head, claims | {"exp": dice.choice((0, -1, 1e308, "9", None, True, [4e9]))}, facts.secret)
    if kind == 10:
        return jwt({**head, "crit": ["exp"], "b64": False}, claims, facts.secret)
    raw = list(facts.token)
    # Not the last character: some of its bits are padding.
    at = dice.randrange(len(parts[0]) + len(parts[1]) + 2, len(raw) - 2)
    raw[at] = "A" if raw[at] != "A" else "B"
    return "".join(raw)


def bad_token(dice: Random, facts: Facts) -> Attack:
    """A good handshake with a token that is none: closed with 4001 or 4101, and told nothing before."""
    token = forged(dice, facts)
    way = dice.randrange(4)
    behind = b"".join(
        frame(json.dumps(document).encode())
        for document in ({"type": "RESUME", "epoch": "e1", "lastSeq": 0}, {"type": "MARK_ALL_READ", "id": 1})
    )
    plain = "".join(
        c if (c.isascii() and c.isalnum()) or c in "-_." else "".join(f"%{b:02X}" for b in c.encode())
        for c in token
    )
    if way == 0:
        data = request(f"/ws?token={plain}")
    elif way == 1 and token.isascii() and token.isprintable() and len(token) < 8000:
        data = request("/ws", f"Authorization: Bearer {token}")
    elif way == 2:
        data = request(f"/ws?ticket={plain[:200]}")
    else:
        data = request(f"/notifications/{facts.victim}")
        data += frame(json.dumps({"type": "AUTH", "token": token}).encode())
    attack = Attack("bad token", NOBODY, data + behind, waits=True)
    # A token of wrong form in an AUTH frame is a bad frame: ERROR, and then the first frame that is no AUTH.
    attack.codes = frozenset({4001, 4101})
    if len(data) > 9000:
        attack.codes = attack.codes | {PROTOCOL_ERROR}
    return attack


def other_user(dice: Random, facts: Facts) -> Attack:
    """The attacker's token at the victim's path."""
    data = request(f"/notifications/{facts.victim}?token={facts.token}")
    return Attack("another user's path", NOBODY, data, frozenset({4002}), waits=True)


def no_token(dice: Random, facts: Facts) -> Attack:
    """Frames before AUTH, or none at all."""
    documents = ({"type": "PING"}, {"type": "RESUME", "epoch": "e", "lastSeq": 0}, {"type": "MARK_ALL_READ"})
    data = request(dice.choice(("/ws", "/ws/notifications", f"/notifications/{facts.victim}")))
    if dice.random() < 0.7:
        data += frame(json.dumps(dice.choice(documents)).encode())
    return Attack("no token", NOBODY, data, frozenset({4001}), waits=True)


REFUSED = frozenset({0, 400, 403, 404, 405, 414, 417, 426, 431, 501, 505})
"""0: it hangs up without a word, as on whatever is not HTTP at all."""


def bad_handshake(dice: Random, facts: Facts) -> Attack:
    """Requests that are no upgrade."""
    good = request("/ws").decode()
    token = f"Authorization: Bearer {facts.token}"

    def without(name: str) -> str:
        return "\r\n".join(line for line in good.split("\r\n") if not line.startswith(name))

    def with_(name: str, value: str) -> str:
        return good.replace(
            next(line for line in good.split("\r\n") if line.startswith(name)), f"{name}: {value}"
        )

    choices: tuple[Callable[[], str], ...] = (
        lambda: without(dice.choice(("Upgrade", "Connection", "Sec-WebSocket-Key", "Sec-WebSocket-Version"))),
        lambda: with_("Sec-WebSocket-Version", dice.choice(("12", "8", "", "13, 13", "x"))),
        lambda: with_("Sec-WebSocket-Key", dice.choice(("", "x", "AAAA", "=" * 24, "A" * 1000))),
        lambda: with_("Connection", dice.choice(("close", "keep-alive", ""))),
        lambda: with_("Upgrade", dice.choice(("h2c", "", "websockets"))),
        lambda: good.replace(
            "GET", dice.choice(("POST", "PUT", "get", "CONNECT", "OPTIONS", "G\x00T", "")), 1
        ),
        lambda: good.replace(
            "HTTP/1.1", dice.choice(("HTTP/1.0", "HTTP/2", "HTTP/1.1 x", "", "http/1.1")), 1
        ),
        lambda: good.replace(
            "/ws",
            dice.choice(
                (
                    "/",
                    "",
                    "//ws",
                    "/ws/",
                    "/WS",
                    "/ws/../ws",
                    "*",
                    "/v1/events",
                    "http://localhost/ws",
                    "/notifications/",
                    "/notifications/a/b",
                    "/notifications/%ff",
                    "/ws?a=%ff",
                    "/ws?" + "a&" * 200,
                    "/\u00e9",
                    "/ws?" + "x" * 9000,
                )
            ),
            1,
        ),
        lambda: good.replace(
            "\r\n\r\n", "\r\n" + "".join(f"H{n}: {'x' * 50}\r\n" for n in range(1000)) + "\r\n"
        ),
        lambda: good.replace("Host: localhost", "Host: localhost\r\n " + "folded"),
        lambda: good.replace("Host: localhost", "Host localhost"),
        lambda: good.replace("Host: localhost", "Ho st: x"),
        lambda: good.replace("Host: localhost", "Host: a\x00b"),
        lambda: good.replace("\r\n\r\n", f"\r\n{token}\r\n{token}\r\n\r\n"),
        lambda: good.replace("\r\n\r\n", "\r\nContent-Length: 5\r\n\r\nhello"),
        lambda: good.replace("\r\n\r\n", "\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
        lambda: good.replace("\r\n\r\n", "\r\nOrigin: https://a\r\nOrigin: https://b\r\n\r\n"),
        lambda: "\r\n\r\n",
        lambda: "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + "\x00" * 40 + "\r\n\r\n",  # TLS
        lambda: "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    )
    text = dice.choice(choices)()
    return Attack("bad handshake", NOBODY, text.encode("latin-1"), None, REFUSED, waits=True)


def broken_handshake(dice: Random, facts: Facts) -> Attack:
    """A good request with random damage: refused, or taken for what it says."""
    data = bytearray(
        request("/ws?deviceId=d&epoch=e&lastSeq=1&lastRev=2", "Sec-WebSocket-Protocol: carillon.v1.json")
    )
    for _ in range(dice.randrange(1, 8)):
        at = dice.randrange(len(data))
        if dice.random() < 0.5:
            data[at] = dice.randrange(256)
        else:
            del data[at : at + dice.randrange(1, 5)]
    return Attack("broken handshake", NOBODY, bytes(data) + b"\r\n\r\n", waits=True)


def slow_loris(dice: Random, facts: Facts) -> Attack:
    """A request that never ends, in drops: cut off in time."""
    data = request("/ws")[: -dice.randrange(1, 5)]
    attack = Attack("slow loris", NOBODY, data, waits=True, slow_s=0.02)
    attack.cuts = sorted(dice.sample(range(1, len(data)), min(len(data) - 1, dice.randrange(1, 15))))
    return attack


def silent(dice: Random, facts: Facts) -> Attack:
    """A connection that says nothing."""
    return Attack("silent", NOBODY, b"", waits=True)


KINDS: tuple[tuple[Callable[[Random, Facts], Attack], int], ...] = (
    (violation, 30), (good_close, 4), (mutation, 14), (noise, 8), (flood, 2), (foreign, 6), (bad_token, 12),
    (other_user, 1), (no_token, 3), (bad_handshake, 12), (broken_handshake, 8), (slow_loris, 2), (silent, 1),
)  # fmt: skip


def make(dice: Random, facts: Facts) -> Attack:
    """Any attack."""
    kinds, weights = zip(*KINDS, strict=True)
    attack = dice.choices(kinds, weights)[0](dice, facts)
    if not attack.cuts and len(attack.data) > 1 and dice.random() < 0.5:
        attack.cuts = [dice.randrange(1, len(attack.data)) for _ in range(dice.randrange(1, 6))]
    return attack
