"""The error tree."""

from __future__ import annotations

import pickle

import pytest

from carillon import errors
from carillon.errors import CarillonError, InvalidInputError, RemoteError, UnavailableError


def tree() -> list[type[CarillonError]]:
    """Every class of the tree that this module defines."""
    found = [CarillonError]
    for cls in found:
        found += [c for c in cls.__subclasses__() if c.__module__ == errors.__name__ and c not in found]
    return found


def example(cls: type[CarillonError]) -> CarillonError:
    if issubclass(cls, InvalidInputError):
        return cls("expected a title", "events/3/title", "1 to 255 characters", "300", "too_long")
    if issubclass(cls, UnavailableError):
        return cls("the append queue is full", 2.5)
    if issubclass(cls, RemoteError):
        return cls("moved", "slot 7 is not here", True, 0.25)
    return cls("what happened")


@pytest.mark.parametrize("cls", tree(), ids=lambda cls: cls.__name__)
def test_every_error_pickles_with_its_fields(cls: type[CarillonError]) -> None:
    """Ray rebuilds an exception as cls(*args): type, text and every field survive."""
    error = example(cls)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is cls
    assert str(again) == str(error) != ""
    assert again.__dict__ == error.__dict__
    assert again.args == error.args
    assert (again.code, again.temporary) == (error.code, error.temporary)
    rebuilt = cls(*error.args)
    assert rebuilt.__dict__ == error.__dict__


@pytest.mark.parametrize("cls", tree(), ids=lambda cls: cls.__name__)
def test_every_error_has_a_text_without_arguments(cls: type[CarillonError]) -> None:
    """Nothing is raised while an error is printed."""
    error = cls("moved") if cls is RemoteError else cls("") if issubclass(cls, InvalidInputError) else cls()
    assert isinstance(str(error), str)


def test_the_docstring_shows_the_tree() -> None:
    """Every class is listed, at the depth it has."""
    assert errors.__doc__ is not None
    depth_of: dict[str, int] = {}
    for line in errors.__doc__.splitlines():
        name = line.lstrip("│├└─ ").split(" ")[0]
        if name.endswith("Error"):
            depth_of[name] = (len(line) - len(line.lstrip("│├└─ "))) // 4
    expected = {cls.__name__: len(cls.__mro__) - len(CarillonError.__mro__) for cls in tree()}
    assert depth_of == expected


def test_codes_are_unique_but_for_the_remote() -> None:
    """A code names one class; RemoteError carries the peer's."""
    codes = [cls.code for cls in tree() if cls is not RemoteError and cls is not CarillonError]
    assert len(codes) == len(set(codes))


def test_a_code_of_ones_own_wins() -> None:
    """InvalidInputError takes a more exact code, subclasses keep theirs without one."""
    assert InvalidInputError("x", code="too_long").code == "too_long"
    assert errors.NotFoundError("x").code == "not_found"
