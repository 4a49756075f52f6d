"""The part of the command line that is about templates; cluster/templates.py carries it out."""

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
    template = commands.add_parser("template", help="templates", description="Administer templates.")
    some = template.add_subparsers(dest="subcommand", required=True, metavar="COMMAND")
    put = command(some, "put", "template_put", "Store a template: a new version of it.")
    show = command(some, "show", "template_show", "Print a template's document.")
    listing = command(some, "list", "template_list", "List the templates of a tenant.")
    versions = command(
        some, "versions", "template_versions", "List the versions of a template, newest first."
    )
    delete = command(some, "delete", "template_delete", "Delete a template with all its versions.")
    preview = command(some, "preview", "template_preview", "Render a template without sending anything.")
    for parser in (put, show, listing, versions, delete, preview):
        parser.add_argument("tenant", help="the tenant")
        if parser is not listing:
            parser.add_argument(
                "template", help="its id: letters, digits, dots, dashes, underscores; at most 64"
            )
        dsn(parser)
    put.add_argument("--file", metavar="FILE", required=True, help="the JSON document")
    for parser in (show, preview):
        parser.add_argument(
            "--version", type=int, metavar="N", help="this version (default: the present one)"
        )
    preview.add_argument("--file", metavar="FILE", help="a JSON document to try instead of the stored one")
    preview.add_argument("--locale", help="e.g. pt-BR (default: the template's own)")
    preview.add_argument(
        "--param", action="append", metavar="NAME=VALUE", help="a parameter; JSON, or text as it is"
    )
    preview.add_argument("--params", metavar="FILE", help="a JSON object of parameters")
