"""The description of the API is complete and true to itself."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest

from carillon.api_keys import SCOPES
from carillon.events import EventBody, EventParser
from carillon.ids import Uuid7Source
from carillon.preferences import DEFAULTS
from serve.openapi import openapi_document, openapi_json
from serve.routes import all_routes
from serve.routing import OPEN, SERVICE, Router
from serve.schemas import COMPONENTS

ROOT = Path(__file__).resolve().parent.parent.parent
DOCUMENT = openapi_document()


def test_every_route_is_described() -> None:
    """What is dispatched is what is described, no more and no less."""
    described = {(m.upper(), path) for path, item in DOCUMENT["paths"].items() for m in item}
    assert described == {(route.method, route.path) for route in all_routes()}
    ids = [op["operationId"] for item in DOCUMENT["paths"].values() for op in item.values()]
    assert len(ids) == len(set(ids))
    assert openapi_json() is openapi_json()


@pytest.mark.parametrize("route", all_routes(), ids=lambda route: f"{route.method} {route.path}")
def test_examples_follow_their_schemas(route: Any) -> None:
    """Every example of the description is valid by the schema beside it."""
    for example, schema in ((route.body_example, route.body), (route.answer_example, route.answer)):
        if example is not None:
            jsonschema.Draft202012Validator({**schema, "components": {"schemas": COMPONENTS}}).validate(
                example
            )
    if route.path == "/v1/events":
        EventParser(Uuid7Source()).parse(json.dumps(route.body_example).encode(), "t", 0)


def test_schemas_are_schemas() -> None:
    """The components are valid JSON Schema."""
    for schema in COMPONENTS.values():
        jsonschema.Draft202012Validator.check_schema(schema)


def test_event_schema_names_every_field() -> None:
    """The described event has exactly the fields the decoder takes, later ones (null only) aside."""
    fields = {f.encode_name for f in msgspec.structs.fields(EventBody)}
    later = {"topic"}
    described = set(COMPONENTS["Event"]["properties"]) | set(COMPONENTS["EventToMany"]["properties"])
    assert described == fields - later
    assert set(COMPONENTS["Preferences"]["properties"]) == set(DEFAULTS)


def test_scopes_are_known() -> None:
    """Every route for services names a scope that a key can have."""
    for route in all_routes():
        assert (route.scope in SCOPES) == (route.door == SERVICE), route.path
        if route.door == OPEN and route.path != "/v1/inbound/{source}":  # its login is the signature
            assert not route.path.startswith(("/v1/", "/api/"))


def test_reference_names_every_route() -> None:
    """docs/reference/http.md documents every route, and no other."""
    text = (ROOT / "docs/reference/http.md").read_text()
    documented = set(re.findall(r"^\| `([A-Z]+) (/[^`?\s]*)", text, re.MULTILINE))
    assert documented == {(route.method, route.path) for route in all_routes()}


def test_router_prefers_literal_segments() -> None:
    """`/api/notifications/preferences` is not a notification id."""
    router = Router(all_routes())
    route, params = router.find("GET", ["api", "notifications", "preferences"])
    assert (route.path, params) == ("/api/notifications/preferences", {})
    route, params = router.find("POST", ["api", "notifications", "{}", "archive"])
    assert params == {"id": "{}"}
    assert router.find("GET", ["api", "notifications", "", "archive"]).status == 404
    assert router.find("GET", ["api"]).status == 404
