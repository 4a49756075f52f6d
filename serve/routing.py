"""The table of routes: what is dispatched is what is documented.

Each `Route` says how it is called, who may, and what it takes and gives; `Router` dispatches by it,
serve/openapi.py writes it down, and a test holds docs/reference/http.md to it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from carillon.problems import Problem, problem
from serve.http import Request, Response
from serve.services import Services

Handler = Callable[[Services, Request], Awaitable[Response]]

SERVICE: Final = "service"
"""Door for services: an API key."""
CLIENT: Final = "client"
"""Door for clients: a token."""
OPEN: Final = "open"
"""No login."""


@dataclass(frozen=True)
class Query:
    """A query parameter."""

    name: str
    schema: dict[str, Any]
    doc: str


def paging(default: int, most: int) -> tuple[Query, Query]:
    """The query parameters of a list that is read page by page: `limit`, and `cursor` as text."""
    limit = {"type": "integer", "minimum": 1, "maximum": most, "default": default}
    cursor = Query("cursor", {"type": "string"}, "`nextCursor` of the page before.")
    return Query("limit", limit, "Page size."), cursor


@dataclass(frozen=True)
class Route:
    """One call of the API."""

    method: str
    path: str
    """With {names} in braces, each one segment."""
    handler: Handler
    door: str
    summary: str
    scope: str = ""
    """Scope an API key needs (door SERVICE)."""
    doc: str = ""
    query: Sequence[Query] = ()
    headers: Sequence[Query] = ()
    body: dict[str, Any] | None = None
    """JSON schema of the request body; None: it takes none."""
    body_required: bool = True
    body_example: Any = None
    status: int = 200
    answer: dict[str, Any] | None = None
    """JSON schema of the answer; None: an answer without a JSON body."""
    answer_example: Any = None
    answer_type: str = "application/json"
    other_answers: Mapping[int, tuple[str, dict[str, Any]]] = field(default_factory=dict)
    """Other statuses of success: what each means, and its schema."""
    problems: Sequence[int] = field(default=())
    """Statuses of problem documents beyond those every route of the door can give."""
    tag: str = ""
    counts: bool = False
    """The handler counts events against the rate limits itself; other calls are one each of the key's."""


class Router:
    """Finds the route of a path and method.

    Args:
        routes: literal segments win over {names} at the same place.
    """

    def __init__(self, routes: Sequence[Route]) -> None:
        self.routes = tuple(routes)
        self._tree: dict[str, Any] = {}
        for route in routes:
            node = self._tree
            for segment in route.path.split("/")[1:]:
                key = "{}" if segment.startswith("{") else segment
                node = node.setdefault(key, {})
            methods = node.setdefault("", {})
            if route.method in methods:
                raise ValueError(f"two routes for {route.method} {route.path}")
            methods[route.method] = (route, tuple(s[1:-1] for s in route.path.split("/")[1:] if s[:1] == "{"))

    def find(self, method: str, segments: Sequence[str]) -> tuple[Route, dict[str, str]] | Problem:
        """The route and its path parameters, or the problem: not_found, method_not_allowed with Allow."""
        values: list[str] = []
        methods = _descend(self._tree, segments, 0, values)
        if methods is None:
            return problem("not_found", "there is no such route; GET /docs lists them")
        found = methods.get("GET" if method == "HEAD" else method)
        if found is None:
            allowed = sorted(methods)
            return problem(
                "method_not_allowed",
                f"expected one of {', '.join(allowed)}, got {method[:20]}",
                headers=[("Allow", ", ".join(allowed))],
            )
        route, names = found
        return route, dict(zip(names, values, strict=True))


def _descend(
    node: dict[str, Any], segments: Sequence[str], at: int, values: list[str]
) -> dict[str, tuple[Route, tuple[str, ...]]] | None:
    if at == len(segments):
        return node.get("")
    segment = segments[at]
    if segment in node and segment not in ("", "{}"):
        found = _descend(node[segment], segments, at + 1, values)
        if found is not None:
            return found
    if "{}" in node and segment:
        values.append(segment)
        found = _descend(node["{}"], segments, at + 1, values)
        if found is not None:
            return found
        values.pop()
    return None
