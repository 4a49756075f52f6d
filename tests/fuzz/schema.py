"""Frames held against what GET /asyncapi.json says of them."""

from __future__ import annotations

import copy
import functools
from typing import Any

import jsonschema

from serve.asyncapi import asyncapi_document
from serve.frame_schemas import SERVER_FRAMES


def _is_integer(checker: Any, value: Any) -> bool:
    return type(value) is int


_VALIDATOR = jsonschema.validators.extend(
    jsonschema.Draft202012Validator,
    # 4.0 is an integer in JSON Schema, but not to those who tell floats and integers apart.
    type_checker=jsonschema.Draft202012Validator.TYPE_CHECKER.redefine("integer", _is_integer),
)


def _exact(schema: Any) -> Any:
    """The schema with `$` in patterns meaning the very end, as in ECMAScript; Python's allows a line end."""
    if isinstance(schema, dict):
        return {
            name: value.removesuffix("$") + r"\Z" if name == "pattern" else _exact(value)
            for name, value in schema.items()
        }
    return [_exact(item) for item in schema] if isinstance(schema, list) else schema


@functools.cache
def client_validator(kind: str) -> Any:
    """Of a frame that clients send, or the server."""
    document = _exact(copy.deepcopy(asyncapi_document()))
    return _VALIDATOR(
        {"$ref": f"#/components/schemas/{kind}", "components": document["components"]},
        format_checker=jsonschema.FormatChecker(["uuid"]),
    )


def check_server_frame(frame: dict[str, Any]) -> str:
    """Hold a frame of the server against its schema; returns its type. Raises AssertionError."""
    kind = frame["type"]
    assert kind in SERVER_FRAMES, f"{kind} is not described"
    errors = [error.message for error in client_validator(kind).iter_errors(frame)]
    assert not errors, f"{frame}: {errors}"
    unknown = set(frame) - set(SERVER_FRAMES[kind]["properties"])
    assert not unknown, f"{kind} has {unknown}, which are not described"
    return kind
