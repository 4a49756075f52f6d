"""Commands that call the HTTP API: how they are declared, and the calls.

Which run they speak to: that of `--url` and `--key`, or the one in the data folder.
"""

from __future__ import annotations

import argparse
import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any, Final, TypeAlias

from carillon.errors import ClusterError, SettingsError
from carillon.settings import Settings
from cluster.run_folder import RunFolder

TRIES: Final = 5
"""Calls that may run twice and fail for a temporary reason are made so often."""


Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def command(below: Commands, name: str, handler: str, text: str) -> argparse.ArgumentParser:
    """A command below another; its help is the first sentence of `text`."""
    parser = below.add_parser(name, help=text[0].lower() + text[1:].split(".")[0], description=text)
    parser.set_defaults(handler=handler)
    return parser


def add_api_options(parsers: Sequence[argparse.ArgumentParser]) -> None:
    """Let commands name the API that they call."""
    for one in parsers:
        one.add_argument("--url", help="of the HTTP API (default: that of the run in the data folder)")
        one.add_argument("--key", help="API key (default: that of the run in the data folder)")


class Api:
    """The HTTP API as a service sees it."""

    def __init__(self, options: argparse.Namespace, settings: Settings) -> None:
        url, key = options.url, options.key
        if not (url and key):
            try:
                facts = json.loads(RunFolder(settings.cluster.runtime_dir).dev_file.read_text())
                url, key = url or facts["directUrl"], key or facts["apiKey"]
            except (OSError, ValueError, KeyError):
                facts = {}
        if not (url and key):
            raise ClusterError(f"no API: give --url and --key, or run `up` in {settings.cluster.runtime_dir}")
        if not url.startswith(("http://", "https://")):
            raise SettingsError(f"expected --url to begin with http:// or https://, got {url!r}")
        self._url = url.rstrip("/")
        self._key = key

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """One call. Raises ClusterError with the problem's own sentence."""
        request = urllib.request.Request(  # noqa: S310  checked above
            self._url + path,
            data=None if body is None else json.dumps(body).encode(),
            method=method,
            headers={"Authorization": f"Bearer {self._key}", "Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=30.0) as answer:  # noqa: S310
                return json.load(answer)
        except urllib.error.HTTPError as exc:
            raise _CallError(exc.code, _told(exc)) from exc
        except (OSError, ValueError) as exc:
            raise _CallError(503, f"{self._url} does not answer: {exc}") from exc

    def call_again(self, method: str, path: str, body: Any) -> Any:
        """The same, again and again while the reason is temporary. Only for calls that may run twice."""
        for number in range(1, TRIES + 1):
            try:
                return self.call(method, path, body)
            except _CallError as exc:
                if exc.status not in (429, 503) or number == TRIES:
                    raise
                time.sleep(0.2 * 2**number)
        raise AssertionError


class _CallError(ClusterError):
    """The API refused. Args (positional): status, sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


def _told(exc: urllib.error.HTTPError) -> str:
    try:
        document = json.loads(exc.read(10_000))
        return f"{exc.code}: {document['detail'] or document['title']}"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{exc.code} {exc.reason}"
