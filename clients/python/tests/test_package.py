"""The package by itself: what it needs, what it exports, what its examples do."""

from __future__ import annotations

import ast
import asyncio
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
from client_kit import KEY, FakeServer, Socket

import carillon_client
from carillon_client import errors

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "src").rglob("*.py"))
ALLOWED = {"carillon_client", "httpx", "websockets", "msgspec"}
EXAMPLE = re.compile(r"```python\n(.*?)```", re.DOTALL)
PAGES = [ROOT / "README.md", ROOT.parent.parent / "docs" / "how-to" / "use-the-python-client.md"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_it_needs_what_it_declares_and_nothing_else(path: Path) -> None:
    """Imports are the standard library's, its own, or declared ones: never a server package."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names = (
            [alias.name for alias in node.names] if isinstance(node, ast.Import)
            else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        )  # fmt: skip
        for name in names:
            top = name.split(".")[0]
            assert top in ALLOWED or top in sys.stdlib_module_names, f"{path}: {name}"


def test_it_loads_without_the_repository(tmp_path: Path) -> None:
    """Imported from elsewhere, it loads no module of the servers."""
    code = (
        "import sys, carillon_client, carillon_client.cli; "
        "servers = ('carillon', 'stores', 'channels', 'actors', 'serve', 'cluster'); "
        "print([name for name in sys.modules if name.split('.')[0] in servers])"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_everything_exported_is_there() -> None:
    """__all__ is sorted and true, and every error is exported."""
    assert carillon_client.__all__ == sorted(carillon_client.__all__, key=str)
    for name in carillon_client.__all__:
        assert hasattr(carillon_client, name)
    public = [
        n for n, v in vars(errors).items() if isinstance(v, type) and issubclass(v, errors.CarillonError)
    ]
    assert set(public) <= set(carillon_client.__all__)


@pytest.mark.parametrize(
    "error",
    [
        errors.InvalidRequestError(422, "invalid", "d", False, (errors.FieldError("a", "b", "c"),), "r", 1.0),
        errors.GaveUpError(3, errors.TransportError("x", False), True),
        errors.SubscriptionRefusedError(4001),
        errors.OperationError("c", "m", True),
    ],
)
def test_errors_survive_pickling(error: errors.CarillonError) -> None:
    """They cross process boundaries with their fields and text."""
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert vars(again).keys() == vars(error).keys()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_run(page: Path, fake: FakeServer) -> None:
    """Every Python example of the page runs against a server, as it is written."""

    async def two(socket: Socket) -> None:
        await socket.welcome(0)
        await socket.notify(1)
        await socket.notify(2)
        await socket.read()

    fake.sockets = [two]
    presence = {"userId": "ada", "status": "active"}
    sent = {
        "broadcastId": "b", "state": "running", "audience": {"topic": "goal.alerts"}, "event": {},
        "counts": {}, "users": {"done": 0, "total": None},
    }  # fmt: skip
    fake.answers = {
        ("POST", "/v1/broadcasts"): (202, sent),
        ("GET", "/v1/broadcasts/b"): (200, sent),
        ("POST", "/v1/tokens"): (201, {"token": "tok", "expiresAt": "x"}),
        ("GET", "/v1/presence/ada"): (200, presence),
        ("POST", "/v1/presence/query"): (200, {"users": [presence, {**presence, "userId": "grace"}]}),
        ("GET", "/v1/users/ada/notifications?limit=100&status=unread"): (
            200,
            {"notifications": [], "nextCursor": None},
        ),
    }
    subscribed = {"topic": "goals.rapid", "userId": "ada", "since": "x"}
    payers = {"segmentId": "payers", "filter": {}}
    item = {"notificationId": "n", "seq": 1, "type": "t", "title": "x"}
    digest = {"digestId": "d", "frequency": "daily", "dueAt": "x", "count": 1, "items": [item]}
    imported = {"complete": True, "lines": 2, "events": 3, "accepted": 3, "replayed": 0, "failed": 0}
    subscribers = "/v1/topics/goals.rapid/subscribers"
    fake.answers |= {
        ("PUT", "/v1/users/ada"): (200, {"userId": "ada", "attributes": {}}),
        ("GET", "/v1/users/ada"): (200, {"userId": "ada", "attributes": {}}),
        ("DELETE", "/v1/users/ada"): (200, {"success": True}),
        ("GET", "/v1/users/ada/export"): (200, {"kind": "end", "lines": 1}),
        ("PUT", f"{subscribers}/ada"): (200, subscribed),
        ("POST", subscribers): (200, {"subscribed": 2, "added": 2}),
        ("GET", f"{subscribers}?limit=100"): (200, {"subscribers": [subscribed], "nextCursor": None}),
        ("PUT", "/v1/segments/payers"): (200, payers),
        ("POST", "/v1/segments/payers/preview"): (
            200,
            {"count": 1, "exact": True, "ofUsers": 2, "userIds": ["ada"]},
        ),
        ("GET", "/v1/users/ada/digests"): (200, {"digests": [digest]}),
        ("DELETE", "/v1/users/ada/digests/d/items/n"): (200, {"success": True}),
        ("POST", "/v1/users/ada/digests/d/flush"): (200, {"digestId": "d", "count": 0}),
        ("POST", "/v1/events/import"): (200, imported),
    }
    examples = EXAMPLE.findall(page.read_text("utf-8"))
    assert examples
    for example in examples:
        text = example.replace("http://127.0.0.1:8000", fake.url).replace(
            "ws://127.0.0.1:8001/ws", fake.ws_url
        )
        names = {
            "key": KEY,
            "token": "tok",
            "events": [{"userId": "ada", "type": "t", "title": "x"}],
            "saved": None,
        }
        code = compile(text, str(page), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        result = eval(code, names)
        if result is not None:
            asyncio.run(asyncio.wait_for(result, 60))
