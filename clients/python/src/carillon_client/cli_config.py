"""Where the command line finds its URLs and credentials.

Options, then environment, then `.carillon/dev.json`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEV_FILE = Path(".carillon") / "dev.json"
DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_WS_URL = "ws://127.0.0.1:8001/ws"

VARIABLES = {
    "url": "CARILLON_URL",
    "ws_url": "CARILLON_WS_URL",
    "key": "CARILLON_API_KEY",
    "token": "CARILLON_TOKEN",
}
"""Variable of each option."""

_DEV_NAMES = {"url": "httpUrl", "ws_url": "wsUrl", "key": "apiKey"}


class UsageError(Exception):
    """The command line cannot be carried out as it is."""


@dataclass(frozen=True)
class Config:
    """What a command works with. Empty text: not known."""

    url: str
    ws_url: str
    key: str
    token: str

    def need_key(self) -> str:
        """The API key. Raises UsageError."""
        if not self.key:
            raise UsageError("no API key: give --key or CARILLON_API_KEY, or run where .carillon/dev.json is")
        return self.key


def find_dev_file(folder: Path) -> Path | None:
    """The `.carillon/dev.json` of this folder or the nearest one above that has one."""
    for place in (folder, *folder.parents):
        if (place / DEV_FILE).is_file():
            return place / DEV_FILE
    return None


def read_config(arguments: argparse.Namespace, environ: Mapping[str, str], folder: Path) -> Config:
    """Put the three sources together.

    An explicit URL never meets a key from dev.json: a development key must not be sent to another system.

    Raises:
        UsageError: dev.json is there and cannot be read.
    """
    given: dict[str, str] = {}
    for name, variable in VARIABLES.items():
        given[name] = getattr(arguments, name, None) or environ.get(variable, "")
    dev: dict[str, Any] = {}
    if not given["url"] and not given["ws_url"]:
        path = find_dev_file(folder)
        if path is not None:
            try:
                dev = json.loads(path.read_text())
            except (OSError, ValueError) as exc:
                raise UsageError(f"cannot read {path}: {exc}") from exc
    for name, member in _DEV_NAMES.items():
        if not given[name] and isinstance(dev.get(member), str):
            given[name] = dev[member]
    return Config(
        given["url"] or DEFAULT_URL, given["ws_url"] or DEFAULT_WS_URL, given["key"], given["token"]
    )
