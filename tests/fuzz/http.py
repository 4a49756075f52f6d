"""HTTP/1.1 as no client should speak it, for the replica's own door."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

BODY = b'{"userId":"ada","type":"t","title":"Hello"}'


def plain(path: str, *lines: str, method: str = "GET", body: bytes = b"") -> bytes:
    """A request; Content-Length is added for a body."""
    head = [f"{method} {path} HTTP/1.1", "Host: localhost", *lines]
    if body:
        head.append(f"Content-Length: {len(body)}")
    return ("\r\n".join([*head, "", ""])).encode("latin-1") + body


def requests(key: str, token: str) -> tuple[Callable[[Random], bytes], ...]:
    """Makers of valid requests with credentials of a service and of a client."""
    service, client = f"Authorization: Bearer {key}", f"Authorization: Bearer {token}"
    return (
        lambda dice: plain("/v1/events", service, method="POST", body=BODY),
        lambda dice: plain("/v1/events?dryRun=false", service, method="POST", body=b"[" + BODY + b"]"),
        lambda dice: (
            plain("/v1/events", service, "Transfer-Encoding: chunked", method="POST")
            + b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
        ),
        lambda dice: plain("/api/notifications?limit=5", client),
        lambda dice: plain(f"/api/sync?since={dice.randrange(9)}&rev=0&epoch=e", client),
        lambda dice: plain("/api/notifications/read", client, method="POST", body=b'{"notificationIds":[]}'),
        lambda dice: plain("/healthz", f"X-Request-Id: r{dice.randrange(1000)}"),
        lambda dice: plain("/api/notifications", "Origin: https://example.org", method="OPTIONS"),
        lambda dice: plain("/v1/presence/ada", service),
    )


SNIPPETS = (
    b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b"\xff", b"%00", b"%", b"/../", b"//", b"?", b"#",
    b"Content-Length: 5\r\n", b"Content-Length: -1\r\n", b"Content-Length: 99999999999999999999\r\n",
    b"Content-Length: 0x5\r\n", b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: gzip, chunked\r\n",
    b"Transfer-Encoding : chunked\r\n", b"Connection: close\r\n", b"Connection: upgrade\r\nUpgrade: h2c\r\n",
    b"Upgrade: websocket\r\nConnection: Upgrade\r\n", b"Expect: 100-continue\r\n", b"Host: a\r\n",
    b" folded\r\n",
    b"Authorization: Bearer x\r\n", b"Authorization: Basic YTpi\r\n", b"X-Request-Id: a\x0bb\r\n",
    b"Idempotency-Key: \xc3\xa9\r\n", b"HTTP/1.1", b"HTTP/9.9", b"GET / HTTP/1.1\r\n\r\n",
    b"ffffffffffffffff\r\n",
    b"Range: bytes=0-1\r\n", b"Origin: null\r\n", b"Cookie: a=b\r\n", b"X: " + b"x" * 9000 + b"\r\n",
)  # fmt: skip


def damaged(dice: Random, makers: tuple[Callable[[Random], bytes], ...]) -> bytes:
    """One to three requests on one connection, with damage at random places, mostly in the heads."""
    data = bytearray(b"".join(dice.choice(makers)(dice) for _ in range(dice.randrange(1, 4))))
    for _ in range(dice.randrange(1, 5)):
        head = data.find(b"\r\n\r\n")
        within = head + 4 if head >= 0 and dice.random() < 0.8 else len(data)
        at = dice.randrange(within + 1) if within else 0
        kind = dice.randrange(5)
        if kind == 0 and at < len(data):
            data[at] = dice.randrange(256)
        elif kind == 1:
            del data[at : at + dice.randrange(1, 10)]
        elif kind == 2:  # whole lines: at the beginning of one
            line = data.rfind(b"\r\n", 0, at)
            data[line + 2 : line + 2] = dice.choice(SNIPPETS)
        else:
            data[at:at] = dice.choice(SNIPPETS)
    return bytes(data)
