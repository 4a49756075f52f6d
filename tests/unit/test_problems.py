"""Problem documents."""

from __future__ import annotations

import pickle

import pytest

from carillon import errors
from carillon.events import ProblemError, refused
from carillon.preferences import PreferencesError
from carillon.problems import (
    CODES,
    FieldError,
    problem,
    problem_document,
    problem_json,
    problem_of,
    retry_after,
    shown,
)


def test_document_has_every_member() -> None:
    """Every document has the same members, `detail` never empty."""
    document = problem_document(problem("not_found"), "r1")
    assert list(document) == ["type", "title", "status", "detail", "code", "temporary", "requestId", "errors"]
    assert document["detail"] == document["title"]
    assert document["requestId"] == "r1"


@pytest.mark.parametrize("code", CODES)
def test_temporary_means_retry_after(code: str) -> None:
    """Exactly the temporary problems tell when to come back."""
    told = problem(code)
    assert told.temporary == (told.status in (429, 503) or code == "in_progress")
    assert (retry_after(told) is not None) == told.temporary


def test_retry_after_is_whole_seconds_rounded_up() -> None:
    """Coming back early would find the same: seconds are rounded up, at least 1."""
    assert retry_after(problem("busy", retry_after_s=0.2)) == "1"
    assert retry_after(problem("unavailable", retry_after_s=2.1)) == "3"


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (errors.InvalidInputError("m", "p", "e", "g"), 422, "invalid"),
        (errors.NotFoundError("m"), 404, "not_found"),
        (errors.UnauthenticatedError("m"), 401, "unauthenticated"),
        (errors.TokenExpiredError("m"), 401, "token_expired"),
        (errors.NotPermittedError("m"), 403, "not_permitted"),
        (errors.IdempotencyConflictError("m"), 422, "idempotency_conflict"),
        (errors.InProgressError("m"), 409, "in_progress"),
        (errors.BusyError("m", 3.0), 429, "busy"),
        (errors.StoreUnavailableError("m", 3.0), 503, "store_unavailable"),
        (errors.LinkClosedError("m"), 503, "link_closed"),
        (errors.LinkTimeoutError("m"), 503, "link_timeout"),
        (errors.RemoteError("not_found", "m"), 404, "not_found"),
        (errors.RemoteError("new_code", "m", temporary=True), 503, "unavailable"),
        (errors.RemoteError("internal", "KeyError: secret"), 500, "internal"),
        (errors.SettingsError("m"), 500, "internal"),
        (KeyError("secret"), 500, "internal"),
    ],
)
def test_errors_map_to_problems(error: Exception, status: int, code: str) -> None:
    """Each error of the tree has its problem; what was not raised on purpose tells nothing of itself."""
    told = problem_of(error)
    assert (told.status, told.code) == (status, code)
    if code == "internal":
        assert b"secret" not in problem_json(told)


def test_every_error_of_the_tree_is_mapped() -> None:
    """No error of carillon.errors ends in a status outside of the table."""
    for name in dir(errors):
        kind = getattr(errors, name)
        if isinstance(kind, type) and issubclass(kind, errors.CarillonError):
            error = kind("code", "m") if kind is errors.RemoteError else kind("m")
            assert 400 <= problem_of(error).status < 600


def test_refused_values_can_be_written() -> None:
    """Whatever was refused is told back short and encodable."""
    for value in ("x" * 1000, "a\0b", "\ud800", 10**5000, None, True, 1.5, [], {}):
        text = shown(value)
        assert len(text) <= 90
        problem_json(problem("invalid", text, [FieldError("p", "e", text)]))


def test_errors_survive_pickling() -> None:
    """Errors that may cross a process keep their text and fields."""
    for error in (refused("why", [FieldError("a", "b", "c")]), PreferencesError([FieldError("a", "b", "c")])):
        again = pickle.loads(pickle.dumps(error))
        assert (str(again), again.args, again.code) == (str(error), error.args, error.code)
    assert isinstance(refused("why"), ProblemError)
