"""The command line: `carillon send`, `carillon import`, `carillon tail`, `carillon presence`.

Exit status: 0 done; 1 it failed (one sentence on stderr says why); 2 the command line is wrong; 3 some of
many events were not sent; 130 interrupted (Ctrl-C ends `tail` with 0: that is its normal end).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO, cast

import msgspec

from carillon_client.async_publisher import AsyncPublisher
from carillon_client.cli_config import VARIABLES, Config, UsageError, read_config
from carillon_client.core.exchange import RetryPolicy
from carillon_client.errors import CarillonError, InvalidRequestError
from carillon_client.models import Change, Notification, NotSent, Position, Presence, Reset, SendReport, Sent
from carillon_client.publisher import Publisher
from carillon_client.subscriber import Subscriber

STDIN_PART = 1000
"""Events of stdin that are sent together."""


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="carillon",
        description="Send events to Carillon, watch a user's notifications, ask who is there.",
        epilog="URLs and credentials come from the options, else from "
        + ", ".join(VARIABLES.values())
        + ", else from .carillon/dev.json in this folder or above, which `make up` writes. "
        "Exit status: 0 done, 1 failed, 2 wrong command line, 3 some events were not sent, 130 interrupted.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    send = commands.add_parser(
        "send",
        help="send an event",
        description="Send an event and print what became of it. With - as USER, events are read from stdin, "
        "one JSON object a line.",
        epilog='Examples: carillon send ada "Build 17 is done" --type build.done --priority high; '
        "jq -c .[] events.json | carillon send - --json",
    )
    send.add_argument("user", metavar="USER", help="user id, several with commas between, or - for stdin")
    send.add_argument("title", metavar="TITLE", nargs="?", help="title of the notification")
    send.add_argument("--type", default="message", help="type of the event (default: message)")
    send.add_argument("--body", help="text below the title")
    send.add_argument("--priority", choices=("low", "normal", "high", "urgent"))
    send.add_argument("--category")
    send.add_argument("--link", help="where a click leads")
    send.add_argument("--data", metavar="JSON", type=_json_object, help="an object of yours")
    send.add_argument("--idempotency-key", metavar="KEY", help="the same key within 24 h has one effect")
    _common(send, "url", "key")

    importing = commands.add_parser(
        "import",
        help="send a file of events",
        description="Send the events of a file, one JSON object a line, as fast as they are stored. After an "
        "interruption run it again: what was stored is not stored twice within 24 h.",
        epilog="Example: carillon import events.ndjson",
    )
    importing.add_argument(
        "file", metavar="FILE", type=Path, help="lines of JSON, each with userId, type, title"
    )
    importing.add_argument(
        "--idempotency-key", metavar="KEY", help="names the file (default: a hash of its content)"
    )
    _common(importing, "url", "key")

    tail = commands.add_parser(
        "tail",
        help="print a user's notifications as they come",
        description="Print a user's notifications as they come, until Ctrl-C. Printing acknowledges.",
        epilog="Examples: carillon tail ada; carillon tail --token eyJ... --json --changes; "
        "carillon tail ada --position-file ada.pos (goes on where it stopped)",
    )
    tail.add_argument("user", metavar="USER", nargs="?", help="whose; not needed with a token")
    tail.add_argument("--changes", action="store_true", help="print read, seen, archived, ... too")
    tail.add_argument("--count", type=_count, metavar="N", help="end after N notifications")
    tail.add_argument(
        "--position-file", type=Path, metavar="FILE", help="go on from, and keep, the position here"
    )
    tail.add_argument("--device-id", metavar="ID", help="act as this device of the user")
    tail.add_argument("--msgpack", action="store_true", help="use MessagePack instead of JSON on the wire")
    _common(tail, "url", "ws_url", "key", "token")

    presence = commands.add_parser(
        "presence",
        help="ask who is there",
        description="Print the presence of users: active, idle or offline.",
        epilog="Example: carillon presence ada grace --json",
    )
    presence.add_argument("users", metavar="USER", nargs="+", help="user ids")
    _common(presence, "url", "key")
    return parser


_OPTIONS = {
    "url": ("--url", "URL", "of the ingress (default http://127.0.0.1:8000)"),
    "ws_url": ("--ws-url", "URL", "of the gateway (default ws://127.0.0.1:8001/ws)"),
    "key": (
        "--key",
        "KEY",
        "API key; others on this machine can see it in the process list, a variable they cannot",
    ),
    "token": ("--token", "TOKEN", "client token; without one the API key mints it"),
}


def _common(parser: argparse.ArgumentParser, *names: str) -> None:
    for name in names:
        option, metavar, text = _OPTIONS[name]
        parser.add_argument(option, dest=name, metavar=metavar, help=f"{text}; or {VARIABLES[name]}")
    parser.add_argument("--json", action="store_true", help="print JSON, one object a line")
    parser.add_argument(
        "--timeout",
        type=_seconds,
        default=30.0,
        metavar="S",
        help="seconds for a call with its retries (default 30)",
    )


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(f"expected JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("expected a JSON object")
    return cast("dict[str, Any]", value)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 1, got {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected seconds above 0, got {text!r}")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    parsed = build_parser().parse_args(arguments)
    try:
        config = read_config(parsed, os.environ, Path.cwd())
        commands = {"send": _send, "import": _import, "tail": _tail, "presence": _presence}
        return commands[parsed.command](parsed, config)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read us (head, less) has enough. The interpreter must not try to flush again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (UsageError, InvalidRequestError, ValueError) as exc:
        wrong = not isinstance(exc, InvalidRequestError)
        print(f"carillon: {exc}", file=sys.stderr)
        return 2 if wrong else 1
    except (CarillonError, OSError) as exc:
        print(f"carillon: {exc}", file=sys.stderr)
        return 1


def _print(line: str) -> None:
    print(line, flush=True)  # a reader behind a pipe sees each line as it comes


def _compact(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _plain(text: str) -> str:
    """Text of others on a terminal: control characters could move the cursor or worse."""
    return "".join(c if c.isprintable() else "�" for c in text)


# -- send -----------------------------------------------------------------------------------------------


def _send(parsed: argparse.Namespace, config: Config) -> int:
    from_stdin = parsed.user == "-"
    if not from_stdin and not parsed.title:
        raise UsageError("expected a TITLE after USER")
    if from_stdin and (parsed.title or parsed.idempotency_key):
        raise UsageError("with - the events, their titles and keys come from stdin")
    retry = RetryPolicy(deadline_s=parsed.timeout)
    with Publisher(config.url, config.need_key(), retry=retry) as publisher:
        if from_stdin:
            failed = sum(_tell(publisher.send_many(part), parsed.json) for part in _parts(sys.stdin))
            return 3 if failed else 0
        event: dict[str, Any] = {"type": parsed.type, "title": parsed.title}
        for option, member in (
            ("body", "body"), ("priority", "priority"), ("category", "category"), ("link", "link"),
            ("data", "data"), ("idempotency_key", "idempotencyKey"),
        ):  # fmt: skip
            event[member] = getattr(parsed, option)
        users = parsed.user.split(",")
        if len(users) > 1:
            return 3 if _tell(publisher.send_to(users, event), parsed.json) else 0
        return _tell(SendReport([publisher.send({**event, "userId": users[0]})]), parsed.json)


def _parts(lines: TextIO) -> Iterator[list[Any]]:
    part: list[Any] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            event = json.loads(line)
        except ValueError as exc:
            raise UsageError(f"line {number} of stdin is not JSON: {exc}") from exc
        part.append(event)
        if len(part) == STDIN_PART:
            yield part
            part = []
    if part:
        yield part


def _tell(report: SendReport, as_json: bool) -> int:
    for one in report:
        if isinstance(one, Sent):
            if as_json:
                told: dict[str, Any] = {
                    "id": one.id,
                    "seq": one.seq,
                    "status": one.status,
                    "channels": one.channels,
                }
                told |= {"userId": one.user_id} if one.user_id is not None else {}
                told |= {"reason": one.reason} if one.reason is not None else {}
                _print(_compact({**told, "idempotencyKey": one.idempotency_key}))
            else:
                to = f" to {_plain(one.user_id)}" if one.user_id is not None else ""
                _print(
                    f"{one.id} {one.status}{to} (seq {one.seq}, {', '.join(one.channels) or 'no channel'})"
                )
        else:
            if as_json:
                _print(_compact({"error": _error(one), "idempotencyKey": one.idempotency_key}))
            print(f"carillon: not sent: {one.error}", file=sys.stderr)
    return len(report.failed)


def _error(one: NotSent) -> dict[str, Any]:
    error = one.error
    return {
        "kind": type(error).__name__,
        "code": getattr(error, "code", None),
        "detail": str(error),
        "temporary": error.temporary,
        "maybeSent": getattr(error, "maybe_sent", False),
    }


# -- import ---------------------------------------------------------------------------------------------


def _import(parsed: argparse.Namespace, config: Config) -> int:
    file: Path = parsed.file
    size = file.stat().st_size
    with file.open("rb") as content:
        key = parsed.idempotency_key or f"import-{hashlib.file_digest(content, 'sha256').hexdigest()[:32]}"
    bar = sys.stderr.isatty()

    def progress(sent: int) -> None:
        print(f"\r{sent * 100 // max(1, size):3d} % of {size:,} bytes", end="", file=sys.stderr, flush=True)

    with Publisher(config.url, config.need_key(), retry=RetryPolicy(deadline_s=parsed.timeout)) as publisher:
        told = publisher.import_events(
            lambda: file.open("rb"), idempotency_key=key, sent=progress if bar else None
        )
    if bar:
        print(file=sys.stderr)
    if parsed.json:
        _print(_compact(told))
    else:
        statuses = ", ".join(f"{count:,} {_plain(name)}" for name, count in told.statuses.items())
        again = f", {told.replayed:,} of them before" if told.replayed else ""
        _print(f"{told.accepted:,} of {told.events:,} events accepted{again} ({statuses or 'none'})")
    for one in told.failures:
        print(f"carillon: line {one.line}: {_plain(str(one.error.get('detail')))}", file=sys.stderr)
    if told.failed > len(told.failures):
        print(f"carillon: {told.failed - len(told.failures):,} more lines failed", file=sys.stderr)
    if not told.complete:
        print(
            f"carillon: the server stopped reading after line {told.lines:,}: run it again", file=sys.stderr
        )
    return 3 if told.failed or not told.complete else 0


# -- presence -------------------------------------------------------------------------------------------


def _presence(parsed: argparse.Namespace, config: Config) -> int:
    with Publisher(config.url, config.need_key(), retry=RetryPolicy(deadline_s=parsed.timeout)) as publisher:
        found = publisher.presence_of_many(parsed.users)
    for one in found:
        _print(_compact(one) if parsed.json else _presence_line(one))
    return 0


def _presence_line(one: Presence) -> str:
    devices = ", ".join(f"{_plain(d.device_id)} {d.attention}" for d in one.devices)
    seen = f"last seen {one.last_seen_at}" if one.last_seen_at else "never seen"
    return f"{_plain(one.user_id)} {one.status} ({devices or seen})"


# -- tail -----------------------------------------------------------------------------------------------


def _tail(parsed: argparse.Namespace, config: Config) -> int:
    if not config.token and not parsed.user:
        raise UsageError("expected USER (with an API key) or a token")
    try:
        asyncio.run(_tail_until_signal(parsed, config))
    except KeyboardInterrupt:  # between the loop's end and ours
        return 0
    return 0


async def _tail_until_signal(parsed: argparse.Namespace, config: Config) -> None:
    work = asyncio.ensure_future(_tail_on(parsed, config))
    loop = asyncio.get_running_loop()
    stopped = False

    def stop() -> None:
        nonlocal stopped
        stopped = True
        work.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(
            NotImplementedError, RuntimeError
        ):  # not on Windows, not off the main thread
            loop.add_signal_handler(number, stop)
    try:
        await work
    except asyncio.CancelledError:
        if not stopped:
            raise


async def _tail_on(parsed: argparse.Namespace, config: Config) -> None:
    token: Any = config.token
    if not token:
        key, retry = config.need_key(), RetryPolicy(deadline_s=parsed.timeout)

        async def mint() -> str:
            async with AsyncPublisher(config.url, key, retry=retry) as publisher:
                return (await publisher.mint_token(parsed.user)).token

        token = mint
    file: Path | None = parsed.position_file
    position = _kept(file)
    encoding = "msgpack" if parsed.msgpack else "json"
    left = parsed.count
    async with Subscriber(
        config.ws_url, token=token, position=position, device_id=parsed.device_id, encoding=encoding
    ) as subscriber:
        try:
            async for event in subscriber.events():
                _show(event, parsed)
                _keep(file, subscriber.position)
                if isinstance(event, Notification) and left is not None:
                    left -= 1
                    if left == 0:
                        break
        finally:
            # Printed is processed, also if Ctrl-C came before the loop asked for the next.
            subscriber.processed()
            _keep(file, subscriber.position)


def _kept(file: Path | None) -> Position | None:
    return Position.parse(file.read_text()) if file is not None and file.exists() else None


def _keep(file: Path | None, position: Position | None) -> None:
    if file is not None and position is not None:
        beside = file.with_name(f"{file.name}.new")
        beside.write_text(str(position))
        beside.replace(file)


def _show(event: Notification | Change | Reset, parsed: argparse.Namespace) -> None:
    if isinstance(event, Reset):
        print("carillon: the server could not replay everything since the position given", file=sys.stderr)
    elif isinstance(event, Notification):
        if parsed.json:
            _print(_compact({"type": "NEW_NOTIFICATION", "notification": event.raw}))
        else:
            body = f": {_plain(event.body)}" if event.body else ""
            _print(f"{event.created_at} [{_plain(event.type)}] {_plain(event.title or '')}{body}")
    elif parsed.changes:
        if parsed.json:
            _print(_compact(event.raw))
        else:
            _print(f"{event.kind} {' '.join(event.notification_ids)}".rstrip())


if __name__ == "__main__":
    sys.exit(main())
