"""How notifications present themselves: which word counts, read from the documents."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from carillon import server_frames
from carillon.preferences import validate
from carillon.presentation import AS_THE_APP, OfApp, OfPush, of_app, of_push
from carillon.switches import NOTHING, Preferences

Document = dict[str, Any]

SOUNDS = st.sampled_from([True, False, "chime", "bell"])
HEARD = {"sound": SOUNDS, "badge": st.booleans(), "vibration": st.booleans()}
CHANNEL = st.booleans() | st.fixed_dictionaries(
    {},
    optional=HEARD
    | {"enabled": st.booleans(), "durationMs": st.integers(0, 60_000), "autoDismiss": st.booleans()},
)
DOCUMENTS = st.fixed_dictionaries(
    {}, optional=HEARD | {"channels": st.dictionaries(st.sampled_from(["in_app", "push"]), CHANNEL)}
)


def said(user: Document, defaults: Document, channel: str, name: str) -> list[Any]:
    """Every word on one matter, the nearest first."""
    found: list[Any] = []
    for document in (user, defaults):
        of_channel = document.get("channels", {}).get(channel)
        for words in (of_channel if isinstance(of_channel, dict) else {}, document):
            found += [words[name]] if name in words else []
    return found


def nearest(user: Document, defaults: Document, channel: str, name: str, default: Any) -> Any:
    """The nearest word, a sound by its name."""
    word = next(iter(said(user, defaults, channel, name)), default)
    return {True: "default", False: ""}.get(word, word) if name == "sound" else word


@given(DOCUMENTS, DOCUMENTS)
def test_a_push_presents_itself_as_the_nearest_word_says(user: Document, defaults: Document) -> None:
    """Of push, else of everything, the user's before the tenant's; as ever if nobody says a word."""
    validate(user)
    found = of_push(Preferences(user).push, Preferences(defaults).push)
    assert found == OfPush(
        nearest(user, defaults, "push", "sound", True),
        nearest(user, defaults, "push", "badge", True),
        nearest(user, defaults, "push", "vibration", None),
    )


@given(DOCUMENTS, DOCUMENTS)
def test_the_app_is_told_the_nearest_words(user: Document, defaults: Document) -> None:
    """Of in_app, else of everything; time on the screen is of in_app alone, and the app's if nobody says."""
    mine, beneath = Preferences(user).in_app, Preferences(defaults).in_app
    found = of_app(mine, beneath)
    assert found == OfApp(
        nearest(user, defaults, "in_app", "sound", True),
        nearest(user, defaults, "in_app", "vibration", True),
        nearest(user, defaults, "in_app", "durationMs", None),
        nearest(user, defaults, "in_app", "autoDismiss", None),
    )
    told = json.loads(server_frames.presentation(*found))
    assert told["sound"] == next(iter(said(user, defaults, "in_app", "sound")), True)
    plain = {"sound": True, "vibration": True, "durationMs": None, "autoDismiss": None}
    assert (found == AS_THE_APP) == (told == {"type": "PRESENTATION"} | plain)


def test_a_push_of_which_nobody_says_anything_is_as_the_app_has_it() -> None:
    """Sound and badge, and no word on vibration: the payload stays what it was."""
    assert of_push(NOTHING.push, NOTHING.push) == ("default", True, None)
    loud = Preferences({"channels": {"push": {"vibration": True}}, "vibration": False})
    assert of_push(loud.push, NOTHING.push).vibration is True
    assert of_push(NOTHING.push, Preferences({"vibration": False}).push).vibration is False
