"""`dead-letters`: list, show and replay what could not be delivered, through the HTTP API.

Exit status: 0 done, 1 it failed or there is no such dead letter, 2 the command line is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
import urllib.parse
from typing import Any, Final

from carillon.errors import SettingsError
from carillon.settings import Settings
from cluster.api_calls import Api, Commands, add_api_options, command

FILTERS: Final = {
    "user": ("userId", "of this user"),
    "type": ("type", "of this type"),
    "channel": ("channel", "of this channel, e.g. push"),
    "reason": ("reason", "with this text in the reason"),
    "since": ("since", "died at or after this time (RFC 3339, e.g. 2026-01-02T00:00:00Z)"),
    "until": ("until", "died before this time"),
}
"""Option -> (name in the API, what it says)."""


def add_commands(commands: Commands) -> list[argparse.ArgumentParser]:
    """Add `dead-letters` to the command line; returns the parsers that work on a run in a data folder."""
    parser = commands.add_parser(
        "dead-letters",
        help="what could not be delivered, and again",
        description="List, show and replay deliveries that were given up.",
    )
    below = parser.add_subparsers(dest="subcommand", required=True, metavar="COMMAND")
    listing = command(below, "list", "dead_letters_list", "List dead letters, newest first.")
    listing.add_argument("--limit", type=int, default=50, metavar="N", help="at most so many (default 50)")
    show = command(below, "show", "dead_letters_show", "Show one dead letter with every try.")
    show.add_argument("id", help="its id, as listed")
    replay = command(
        below,
        "replay",
        "dead_letters_replay",
        "Deliver dead letters again: those named, those of a filter, or all. Going on after an interruption "
        "is making the same call again.",
    )
    replay.add_argument("id", nargs="*", help="ids, as listed")
    replay.add_argument("--all", action="store_true", help="every dead letter of the tenant")
    replay.add_argument("--quiet", action="store_true", help="no progress lines")
    for one in (listing, replay):
        for name, (_, text) in FILTERS.items():
            one.add_argument(f"--{name}", metavar=name.upper(), help=f"only those {text}")
    for one in (listing, show):
        one.add_argument("--json", action="store_true", help="JSON as the API answers it")
    parsers = [listing, show, replay]
    add_api_options(parsers)
    return parsers


def _chosen(options: argparse.Namespace) -> dict[str, str]:
    given = {name: getattr(options, option) for option, (name, _) in FILTERS.items()}
    return {name: value for name, value in given.items() if value}


def _list(options: argparse.Namespace, settings: Settings) -> int:
    if options.limit < 1:
        raise SettingsError(f"expected --limit to be at least 1, got {options.limit}")
    api = Api(options, settings)
    found: list[dict[str, Any]] = []
    query: dict[str, Any] = _chosen(options)
    while len(found) < options.limit:
        query["limit"] = min(100, options.limit - len(found))
        page = api.call("GET", f"/v1/dead-letters?{urllib.parse.urlencode(query)}")
        found += page["deadLetters"]
        query["cursor"] = page["nextCursor"]
        if not query["cursor"]:
            break
    if options.json:
        print(json.dumps(found, indent=1))
        return 0
    for one in found:
        print(
            f"{one['id']}  {one['diedAt']}  {one['channel']}  {one['userId']}  {one['type']}  {one['reason']}"
        )
    if query.get("cursor"):
        print(f"there are more than {options.limit}: see --limit", file=sys.stderr)
    elif not found:
        print("no dead letters", file=sys.stderr)
    return 0


def _show(options: argparse.Namespace, settings: Settings) -> int:
    path = f"/v1/dead-letters/{urllib.parse.quote(options.id, safe='')}"
    one = Api(options, settings).call("GET", path)
    if options.json:
        print(json.dumps(one, indent=1))
        return 0
    for name, value in one.items():
        if name != "tries":
            print(f"{name + ':':16}{'-' if value is None else value}")
    for t in one["tries"]:
        print(
            f"  try {t['attempt']}  {t['startedAt']}  {t['provider']}  {t['deviceId']}  {t['outcome']}"
            f"  {t['status'] or '-'}  {t['error'] or '-'}  {t['durationMs']} ms"
        )
    return 0


def _replay(options: argparse.Namespace, settings: Settings) -> int:
    chosen = _chosen(options)
    if bool(options.id) + bool(chosen) + options.all != 1:
        print("carillon: expected ids, a filter, or --all (and one of them only)", file=sys.stderr)
        return 2
    api = Api(options, settings)
    replayed = skipped = 0
    if options.id:
        for at in range(0, len(options.id), 100):
            done = api.call_again("POST", "/v1/dead-letters/replay", {"ids": options.id[at : at + 100]})
            replayed, skipped = replayed + done["replayed"], skipped + done["skipped"]
            _progress(options, replayed, skipped, len(options.id) - replayed - skipped)
    else:
        # The list is newest first, so what dies again meanwhile lies behind the cursor: this ends.
        body: dict[str, Any] = {"filter": chosen}
        while True:
            done = api.call_again("POST", "/v1/dead-letters/replay", body)
            replayed, skipped = replayed + done["replayed"], skipped + done["skipped"]
            _progress(options, replayed, skipped, done["remaining"])
            body["cursor"] = done["cursor"]
            if not done["cursor"]:
                break
    print(f"{replayed} replayed, {skipped} skipped")
    return 0


def _progress(options: argparse.Namespace, replayed: int, skipped: int, remaining: int) -> None:
    if not options.quiet:
        print(f"{replayed} replayed, {skipped} skipped, {remaining} to go", file=sys.stderr)


HANDLERS: Final = {
    "dead_letters_list": _list,
    "dead_letters_show": _show,
    "dead_letters_replay": _replay,
}
"""By the name that cluster/cli.py uses."""
