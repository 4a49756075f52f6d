"""`broadcast`: list, show, pause, resume, cancel and watch broadcasts, through the HTTP API.

Exit status: 0 done, 1 it failed or there is no such broadcast, 2 the command line is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import urllib.parse
from typing import Any, Final

from carillon.clock import SystemClock
from carillon.errors import SettingsError
from carillon.settings import Settings
from cluster.api_calls import Api, Commands, add_api_options, command

BAR: Final = 30
"""Characters of the bar."""
ENDED: Final = frozenset(("done", "cancelled", "failed"))
OUTCOMES: Final = ("delivered", "queued", "deferred", "suppressed", "failed")


def add_commands(commands: Commands) -> list[argparse.ArgumentParser]:
    """Add `broadcast` to the command line; returns the parsers that work on a run in a data folder."""
    parser = commands.add_parser(
        "broadcast",
        help="what is sent to many",
        description="List, show, watch, pause, resume and cancel broadcasts.",
    )
    below = parser.add_subparsers(dest="subcommand", required=True, metavar="COMMAND")
    listing = command(below, "list", "broadcast_list", "List broadcasts, newest first.")
    listing.add_argument("--limit", type=int, default=20, metavar="N", help="at most so many (default 20)")
    listing.add_argument("--state", help="only those in this state, e.g. running")
    show = command(below, "show", "broadcast_show", "Show one broadcast and users it could not reach.")
    watch = command(below, "watch", "broadcast_watch", "Follow a broadcast until it has ended.")
    watch.add_argument(
        "--every", type=float, default=1.0, metavar="S", help="seconds between looks (default 1)"
    )
    acts = [
        command(below, "pause", "broadcast_pause", "Pause a broadcast: nothing more is stored for it."),
        command(below, "resume", "broadcast_resume", "Let a paused broadcast go on where it stood."),
        command(below, "cancel", "broadcast_cancel", "End a broadcast, for good. What is stored stays."),
    ]
    for one in (show, watch, *acts):
        one.add_argument("id", help="its id, as listed")
    for one in (listing, show, *acts):
        one.add_argument("--json", action="store_true", help="JSON as the API answers it")
    parsers = [listing, show, watch, *acts]
    add_api_options(parsers)
    return parsers


def _path(options: argparse.Namespace, rest: str = "") -> str:
    return f"/v1/broadcasts/{urllib.parse.quote(options.id, safe='')}{rest}"


def _whom(audience: Any) -> str:
    """The audience in a few words."""
    if isinstance(audience, str):
        return audience
    if "userIds" in audience:
        return f"{len(audience['userIds'])} users"
    return " ".join(f"{name}={value}" for name, value in audience.items())


def _done(users: dict[str, Any]) -> str:
    total = "?" if users["total"] is None else f"{users['total']:,}"
    return f"{users['done']:,}/{total}"


def _list(options: argparse.Namespace, settings: Settings) -> int:
    if not 1 <= options.limit <= 100:
        raise SettingsError(f"expected --limit to be from 1 to 100, got {options.limit}")
    query = {"limit": options.limit} | ({"state": options.state} if options.state else {})
    page = Api(options, settings).call("GET", f"/v1/broadcasts?{urllib.parse.urlencode(query)}")
    if options.json:
        print(json.dumps(page["broadcasts"], indent=1))
        return 0
    for one in page["broadcasts"]:
        event = one["event"]
        print(
            f"{one['broadcastId']}  {one['createdAt']}  {one['state']:9}  {_done(one['users']):>17}"
            f"  {_whom(one['audience'])}  {event['type']}  {event.get('title') or event.get('template')}"
        )
    if page["nextCursor"]:
        print(f"there are more than {options.limit}: see --limit", file=sys.stderr)
    elif not page["broadcasts"]:
        print("no broadcasts", file=sys.stderr)
    return 0


def _show(options: argparse.Namespace, settings: Settings) -> int:
    api = Api(options, settings)
    one = api.call("GET", _path(options))
    failures = api.call("GET", _path(options, "/failures"))["failures"] if one["counts"]["failed"] else []
    if options.json:
        print(json.dumps({**one, "failures": failures}, indent=1))
        return 0
    _print(one)
    for failure in failures:
        print(f"  {failure['userId']}  {failure['failedAt']}  {failure['code']}  {failure['detail']}")
    return 0


def _print(one: dict[str, Any]) -> None:
    rows = {
        "broadcastId": one["broadcastId"],
        "state": one["state"] + (f": {one['reason']}" if one["reason"] else ""),
        "audience": _whom(one["audience"]),
        "event": json.dumps(one["event"], ensure_ascii=False),
        "users": _done(one["users"]),
        **{name: f"{count:,}" for name, count in one["counts"].items()},
        "rate": "-" if one["ratePerS"] is None else f"{one['ratePerS']:,.0f} users/s",
        "remaining": "-" if one["remainingS"] is None else f"{one['remainingS']:,.0f} s",
        **{name: one[name] or "-" for name in ("startAt", "startedAt", "endedAt", "createdAt")},
    }
    for name, value in rows.items():
        print(f"{name + ':':13}{value}")


def _act(options: argparse.Namespace, settings: Settings) -> int:
    one = Api(options, settings).call_again("POST", _path(options, f"/{options.subcommand}"), {})
    if options.json:
        print(json.dumps(one, indent=1))
    else:
        print(f"{one['broadcastId']}  {one['state']}  {_done(one['users'])}")
    return 0


def progress_line(one: dict[str, Any], rate_per_s: float | None) -> str:
    """One line that tells how far a broadcast is.

    Args:
        rate_per_s: of the last moments; None: as the API tells it.
    """
    done, total = one["users"]["done"], one["users"]["total"]
    share = 0.0 if not total else done / total
    bar = "#" * round(BAR * share)
    line = f"[{bar:{BAR}}] {share:4.0%}  {_done(one['users'])}"
    rate = one["ratePerS"] if rate_per_s is None else rate_per_s
    if one["state"] == "running" and rate:
        line += f"  {rate:,.0f}/s"
        if total:
            line += f"  {max(0, total - done) / rate:,.0f} s to go"
    elif one["state"] != "running":
        line += f"  {one['state']}"
    told = [f"{one['counts'][name]:,} {name}" for name in OUTCOMES if one["counts"][name]]
    return "  ".join([line, *told])


def _watch(options: argparse.Namespace, settings: Settings) -> int:
    if not 0.05 <= options.every <= 3600:
        raise SettingsError(f"expected --every to be from 0.05 to 3600, got {options.every}")
    api, terminal = Api(options, settings), sys.stdout.isatty()
    clock = SystemClock()
    before: tuple[float, int] | None = None
    while True:
        one = api.call_again("GET", _path(options), None)
        at, done = clock.monotonic(), one["users"]["done"]
        # Of several seconds: pages are committed in lumps.
        rate = None if before is None or at - before[0] < 0.5 else (done - before[1]) / (at - before[0])
        ended = one["state"] in ENDED
        line = progress_line(one, rate or None)
        print(f"\r\x1b[2K{line}" if terminal else line, end="\n" if ended or not terminal else "", flush=True)
        if ended:
            break
        before = (at, done)
        time.sleep(options.every)
    if one["reason"]:
        print(one["reason"], file=sys.stderr)
    return 0 if one["state"] != "failed" else 1


HANDLERS: Final = {
    "broadcast_list": _list,
    "broadcast_show": _show,
    "broadcast_watch": _watch,
    "broadcast_pause": _act,
    "broadcast_resume": _act,
    "broadcast_cancel": _act,
}
"""By the name that cluster/cli.py uses."""
