"""Which word on a channel counts: the order of docs/reference/preferences.md, read from the documents."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from carillon.messages import PRIORITIES
from carillon.preferences import CHANNELS
from carillon.switches import Preferences, remembered, switches

KIND, CATEGORY = "comment.reply", "social"
Document = dict[str, Any]

FAMILIES = st.sampled_from(["in_app", "push"])
SWITCHED = st.dictionaries(FAMILIES, st.booleans(), max_size=3)


def _objects(**members: st.SearchStrategy[Any]) -> st.SearchStrategy[Document]:
    return st.fixed_dictionaries({}, optional=members)


ENTRIES = st.booleans() | _objects(
    enabled=st.booleans(), channels=SWITCHED, priority=st.sampled_from(PRIORITIES[:3])
)
NAMED = {
    "types": _objects(**{KIND: ENTRIES, "other": ENTRIES}),
    "categories": _objects(**{CATEGORY: ENTRIES, "elsewhere": ENTRIES}),
}
CHANNEL = st.booleans() | _objects(enabled=st.booleans(), emergencyOnly=st.booleans())
DOCUMENTS = _objects(
    **{"global": st.sampled_from([True, True, True, False])},
    channels=st.dictionaries(FAMILIES, CHANNEL, min_size=1, max_size=2),
    **NAMED,
)
FORCED = _objects(**NAMED)


def _entries(document: Document) -> list[Any]:
    """What a document says of the type, then of the category."""
    found = [document.get("types", {}).get(KIND), document.get("categories", {}).get(CATEGORY)]
    return [entry for entry in found if entry is not None]


def _whole(document: Document) -> bool | None:
    """Type or category as a whole."""
    for entry in _entries(document):
        word = entry if isinstance(entry, bool) else entry.get("enabled")
        if word is not None:
            return word
    return None


def _single(document: Document, family: str) -> bool | None:
    """The most specific word on one channel."""
    for entry in _entries(document):
        if not isinstance(entry, bool) and family in entry.get("channels", {}):
            return entry["channels"][family]
    word = document.get("channels", {}).get(family)
    return word.get("enabled") if isinstance(word, dict) else word


def _emergencies(document: Document, family: str) -> bool:
    word = document.get("channels", {}).get(family)
    return isinstance(word, dict) and bool(word.get("emergencyOnly"))


def _closed(user: Document, defaults: Document, forced: Document, family: str, urgent: bool) -> bool:
    single = _single(forced, family)
    word = _whole(forced) if single is None else single
    if word is not None:
        return not word
    for says in (lambda d: d.get("global"), _whole, lambda d: _single(d, family)):
        words = [says(document) for document in (user, defaults)]
        if next((word for word in words if word is not None), True) is False:
            return True
    if urgent:
        return False
    if _emergencies(user, family):
        return True
    return _single(user, family) is None and _emergencies(defaults, family)


@settings(max_examples=1000)
@given(DOCUMENTS, DOCUMENTS, FORCED | st.just({}), st.booleans())
def test_the_word_that_counts_decides_each_channel(
    user: Document, defaults: Document, forced: Document, urgent: bool
) -> None:
    """Forced rules; then `global`, type or category as a whole, single channels, each the user's before the
    tenant's; then what is for emergencies."""
    mine, beneath, above = Preferences(user), Preferences(defaults), Preferences(forced)
    found = switches(mine, beneath, above, KIND, CATEGORY, urgent)
    assert found.off == {f for f in CHANNELS if _closed(user, defaults, forced, f, urgent)}
    assert found.off <= found.why.keys(), "what is closed says why"
    for _ in range(2):
        assert remembered(mine, beneath, above, KIND, CATEGORY, urgent) == found


@settings(max_examples=500)
@given(DOCUMENTS, DOCUMENTS, st.booleans())
def test_a_priority_is_overridden_by_the_most_specific_word(
    user: Document, defaults: Document, urgent: bool
) -> None:
    """The type's before the category's, the user's before the tenant's; an urgent one stays urgent."""
    words = [
        entry["priority"]
        for document in (user, defaults)
        for entry in _entries(document)
        if not isinstance(entry, bool) and "priority" in entry
    ]
    found = switches(Preferences(user), Preferences(defaults), Preferences({}), KIND, CATEGORY, urgent)
    assert found.level == (None if urgent or not words else PRIORITIES.index(words[0]))
