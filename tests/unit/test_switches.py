"""Which word on a channel counts: the order of docs/reference/preferences.md, read from the documents."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from carillon.messages import PRIORITIES
from carillon.preferences import CHANNELS
from carillon.switches import Fired, Preferences, remembered, switches

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


def _entries(document: Document) -> list[tuple[str, str, Any]]:
    """What a document says of the type, then of the category: (which, its name, its words)."""
    found = [
        ("type", KIND, document.get("types", {}).get(KIND)),
        ("category", CATEGORY, document.get("categories", {}).get(CATEGORY)),
    ]
    return [entry for entry in found if entry[2] is not None]


def _whole(document: Document) -> tuple[bool, str, str | None] | None:
    """Type or category as a whole: (on, the rule's name if it is off, what it is about)."""
    for which, name, entry in _entries(document):
        word = entry if isinstance(entry, bool) else entry.get("enabled")
        if word is not None:
            return word, f"{which}_off", name
    return None


def _single(document: Document, family: str) -> tuple[bool, str, str | None] | None:
    """The most specific word on one channel."""
    for which, name, entry in _entries(document):
        if not isinstance(entry, bool) and family in entry.get("channels", {}):
            return entry["channels"][family], f"{which}_channel_off", name
    word = document.get("channels", {}).get(family)
    word = word.get("enabled") if isinstance(word, dict) else word
    return None if word is None else (word, "channel_off", family)


def _global(document: Document) -> tuple[bool, str, str | None] | None:
    word = document.get("global")
    return None if word is None else (word, "global_off", None)


def _emergencies(document: Document, family: str) -> bool | None:
    word = document.get("channels", {}).get(family)
    return word.get("emergencyOnly") if isinstance(word, dict) else None


def _deciding(
    user: Document, defaults: Document, forced: Document, family: str, urgent: bool
) -> Fired | None:
    """The rule that closes or forces a channel; None: it is open, and nobody said a word against it."""
    word = _single(forced, family) or _whole(forced)
    if word is not None:
        return Fired("forced_on" if word[0] else "forced_off", "tenant", word[2], (family,))
    both = ((user, "user"), (defaults, "tenant"))
    for says in (_global, _whole, lambda d: _single(d, family)):
        words = [(found, whose) for document, whose in both if (found := says(document)) is not None]
        if words and not words[0][0][0]:
            (_, rule, about), whose = words[0]
            return Fired(rule, whose, about, (family,))
    if urgent:
        return None
    mine = _emergencies(user, family)
    if mine is not None:
        return Fired("emergency_only", "user", family, (family,)) if mine else None
    if _single(user, family) is None and _emergencies(defaults, family):
        return Fired("emergency_only", "tenant", family, (family,))
    return None


@settings(max_examples=1000)
@given(DOCUMENTS, DOCUMENTS, FORCED | st.just({}), st.booleans())
def test_the_word_that_counts_decides_each_channel(
    user: Document, defaults: Document, forced: Document, urgent: bool
) -> None:
    """Forced rules; then `global`, type or category as a whole, single channels, each the user's before the
    tenant's; then what is for emergencies. And that word, no other, is told."""
    mine, beneath, above = Preferences(user), Preferences(defaults), Preferences(forced)
    found = switches(mine, beneath, above, KIND, CATEGORY, urgent)
    rules = {f: _deciding(user, defaults, forced, f, urgent) for f in CHANNELS}
    assert found.why == {f: rule for f, rule in rules.items() if rule is not None}
    assert found.off == {f for f, rule in found.why.items() if rule.rule != "forced_on"}
    assert (found.forced is not None) == any(rule.rule == "forced_on" for rule in found.why.values())
    for _ in range(2):
        assert remembered(mine, beneath, above, KIND, CATEGORY, urgent) == found


@settings(max_examples=500)
@given(DOCUMENTS, DOCUMENTS, st.booleans())
def test_a_priority_is_overridden_by_the_most_specific_word(
    user: Document, defaults: Document, urgent: bool
) -> None:
    """The type's before the category's, the user's before the tenant's; an urgent one stays urgent. The rule
    that did it is told."""
    words = [
        (entry["priority"], whose)
        for document, whose in ((user, "user"), (defaults, "tenant"))
        for _, _, entry in _entries(document)
        if not isinstance(entry, bool) and "priority" in entry
    ]
    found = switches(Preferences(user), Preferences(defaults), Preferences({}), KIND, CATEGORY, urgent)
    if urgent or not words:
        assert (found.level, found.priority) == (None, None)
    else:
        level, whose = words[0]
        assert found.level == PRIORITIES.index(level)
        assert found.priority == Fired("priority", whose, level)
