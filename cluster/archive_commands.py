"""The part of the command line that is about the archive; cluster/archive.py carries it out."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any


def add_commands(
    commands: Any,
    command: Callable[..., argparse.ArgumentParser],
    dsn: Callable[[argparse.ArgumentParser], None],
) -> None:
    """The part of the command line."""
    archive = commands.add_parser(
        "archive",
        help="retention: what is old moves to files, and back",
        description="Old notifications in files: move them there, look, search, restore, verify, erase.",
    )
    some = archive.add_subparsers(dest="subcommand", required=True, metavar="COMMAND")
    run = command(
        some,
        "run",
        "archive_run",
        "Move what is due to the archive now. The coordinator does it by itself once a day.",
    )
    listing = command(some, "list", "archive_list", "List what is archived, by tenant and month.")
    search = command(some, "search", "archive_search", "Search in the archive of a tenant.")
    restore = command(
        some,
        "restore",
        "archive_restore",
        "Put archived notifications back into the tables: a month, or all of one user, or both.",
    )
    verify = command(
        some, "verify", "archive_verify", "Read the whole archive and tell what is wrong with it."
    )
    erase = command(some, "erase", "archive_erase", "Erase what is archived of a user, for good.")
    for parser in (run, listing, verify):
        parser.add_argument("--tenant", help="of this tenant only")
    for parser in (search, restore, erase):
        parser.add_argument("tenant", help="the tenant")
    for parser in (listing, search, restore, verify):
        parser.add_argument("--month", metavar="YYYY-MM", help="of this month only (UTC, by the ids)")
    for parser in (search, restore):
        parser.add_argument("--user", help="of this user only")
    erase.add_argument("user", help="the user")
    run.add_argument("--dry-run", action="store_true", help="only tell what would move")
    restore.add_argument("--dry-run", action="store_true", help="only tell what would come back")
    for parser in (run, restore, verify):
        parser.add_argument("--quiet", action="store_true", help="no progress lines")
    search.add_argument("--id", help="the notification with this id")
    search.add_argument("--type", help="only this type")
    search.add_argument("--text", help="each word of it begins a word of title or body, in any case")
    search.add_argument(
        "--since", metavar="TIME", help="created then or later: 2026-03-01 or 2026-03-01T12:00:00Z"
    )
    search.add_argument("--until", metavar="TIME", help="created before then")
    search.add_argument(
        "--limit", type=int, default=100, metavar="N", help="stop after N (default 100; 0: never)"
    )
    search.add_argument(
        "--json", action="store_true", help="whole archived notifications, a line of JSON each"
    )
    listing.add_argument("--json", action="store_true", help="every part, as one JSON document")
    for parser in (run, listing, search, restore, verify, erase):
        parser.add_argument(
            "--root",
            metavar="URL",
            help="where the archive lies (default: CARILLON_ARCHIVE_ROOT, else `archive` in the data folder)",
        )
        dsn(parser)
