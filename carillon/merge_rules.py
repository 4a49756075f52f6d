"""The member `merge` of a tenant's policy: which types are merged, how often that disturbs, in what words.

    {"merge": {"post.like": {"how": "aggregate", "windowS": 3600, "renotifyS": 300, "texts": {
        "default": {"title": {"=2": "{actor} and {actor2} liked your post",
                              "other": "{actor} and {others} others liked your post"}},
        "de": {"title": "{actor} und {others} weitere mögen deinen Beitrag"}}}}}

Without texts a notification says what its newest event says; `count` and `actors` let clients say more in
the language of their user. A text is one for all numbers, or one by plural form, as in templates: `=2` for
exactly two, else the form of CLDR for the language. Of an aggregate that is the form of `others`, the count
without the newest actor (ICU's `offset:1`); else that of `count`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from carillon.event_rules import (
    DEDUPES,
    MAX_BODY_BYTES,
    MAX_WINDOW_S,
    MIN_WINDOW_S,
    Text,
    is_object,
    text_error,
)
from carillon.problems import FieldError, shown
from carillon.templates import parse_locale

DROP, COUNT, REPLACE, ACCUMULATE = DEDUPES
AGGREGATE: Final = "aggregate"
HOW: Final = (*DEDUPES, AGGREGATE)

MAX_TYPES: Final = 200
MAX_LOCALES: Final = 50
MAX_TITLE: Final = 255
MAX_BODY: Final = 1024
DEFAULT: Final = "default"
FORMS: Final = ("zero", "one", "two", "few", "many", "other")
"""CLDR's plural forms; `other` exists in every language."""
WORDS: Final = ("actor", "actor2", "actor3", "others", "count", "title", "body")
"""What a text may name."""

_TYPE: Final = Text(1, 64)
_WORD: Final = re.compile(r"\{([^{}]*)\}")
_EXACT: Final = re.compile(r"=[0-9]{1,6}")


class MergeRule(NamedTuple):
    """A tenant's rule for one type.

    Attributes:
        how: None: only events that ask for it are merged.
        window_ms: 0: the cluster's.
        renotify_ms: None: the cluster's.
        texts: locale -> title and body, each by plural form ("other" alone: for all numbers).
    """

    how: str | None
    window_ms: int
    renotify_ms: int | None
    texts: Mapping[str, Mapping[str, Mapping[str, str]]]


def merge_rules(document: Mapping[str, Any]) -> dict[str, MergeRule] | None:
    """The rules of a valid policy document by type; None if it has none."""
    rules: dict[str, Any] | None = document.get("merge")
    if not rules:
        return None
    return {kind: _rule(some) for kind, some in rules.items()}


def _rule(some: Mapping[str, Any]) -> MergeRule:
    renotify_s = some.get("renotifyS")
    texts: dict[str, dict[str, Mapping[str, str]]] = {
        locale: {name: {"other": value} if isinstance(value, str) else value for name, value in parts.items()}
        for locale, parts in some.get("texts", {}).items()
    }
    return MergeRule(
        some.get("how"),
        round(some.get("windowS", 0) * 1000),
        None if renotify_s is None else round(renotify_s * 1000),
        texts,
    )


# -- words ----------------------------------------------------------------------------------------------


def speaks_languages(rule: MergeRule | None) -> bool:
    """Whether the language of the user matters to a rule's texts."""
    return rule is not None and len(rule.texts) > 1


def render(rule: MergeRule, locale: str | None, members: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Title and body of a notification into which others were merged, as far as the rule has words for it.

    A text that names somebody who is not known (no actor, no body) is left out: what the newest event says
    stays. Texts of the event for single channels go with what replaces them.

    Args:
        locale: of the user; None: the rule's default.
        members: of the notification; `actors` of an aggregate.
    """
    used, texts = _texts_for(rule, locale)
    aggregate = _counts_actors(members)
    others = count - 1 if aggregate else count
    names = [actor.get("name") or actor.get("id") for actor in members.get("actors") or ()]
    values: dict[str, Any] = {
        "count": count, "others": count - 1, "title": members.get("title"), "body": members.get("body"),
    } | {f"actor{n + 1 if n else ''}": name for n, name in enumerate(names[:3])}  # fmt: skip
    if not aggregate:
        data = data_of(members)
        values["actor"] = data.get("actorName") or members.get("actorId")
    found: dict[str, Any] = {}
    for name, forms in texts.items():
        text = forms.get(f"={count}") or forms.get(_form(used, others)) or forms["other"]
        if all(values.get(word) is not None for word in _WORD.findall(text)):
            found[name] = _cut(name, _WORD.sub(lambda m: str(values[m[1]]), text))
    own = members.get("channelContent")
    if found and own is not None:
        found["channelContent"] = {
            channel: {k: v for k, v in some.items() if k not in found} for channel, some in own.items()
        }
    return found


def data_of(members: Mapping[str, Any]) -> dict[str, Any]:
    """The member `data`."""
    data: dict[str, Any] | None = members.get("data")
    return data or {}


def _counts_actors(members: Mapping[str, Any]) -> bool:
    """Whether a notification's count is one of actors."""
    return "actors" in members


def _cut(name: str, text: str) -> str:
    if name == "title":
        return text[:MAX_TITLE]
    return text.encode()[:MAX_BODY_BYTES].decode(errors="ignore")


def _texts_for(rule: MergeRule, locale: str | None) -> tuple[str, Mapping[str, Mapping[str, str]]]:
    """pt-BR -> pt -> default, and the language whose plurals hold."""
    locale = parse_locale(locale)
    while locale:
        found = rule.texts.get(locale)
        if found is not None:
            return locale, found
        locale = locale.rpartition("-")[0]
    return "en", rule.texts[DEFAULT]


@functools.lru_cache(maxsize=4096)
def _form(locale: str, number: int) -> str:
    """The plural form of a number in a language; English for one that is not known."""
    import babel

    try:
        return str(babel.Locale.parse(locale.replace("-", "_")).plural_form(number))
    except (ValueError, babel.UnknownLocaleError):
        parent = locale.rpartition("-")[0]
        return _form(parent or "en", number)


# -- validation -----------------------------------------------------------------------------------------


def merge_problems(rules: Any) -> list[FieldError]:
    """What is wrong with the member `merge` of a policy document."""
    if not is_object(rules) or len(rules) > MAX_TYPES:
        return [FieldError("merge", f"an object of at most {MAX_TYPES} types", shown(rules))]
    errors: list[FieldError] = []
    for kind, some in rules.items():
        path = f"merge/{shown(kind, 64)}"
        wrong = text_error(path, kind, _TYPE)
        if wrong is not None:
            errors.append(wrong)
        elif not is_object(some):
            errors.append(FieldError(path, "an object", shown(some)))
        else:
            errors += _rule_problems(path, some)
    return errors


def _rule_problems(path: str, some: dict[str, Any]) -> list[FieldError]:
    errors: list[FieldError] = []
    for name, value in some.items():
        below = f"{path}/{shown(name)}"
        if name == "how":
            if value not in HOW:
                errors.append(FieldError(below, "|".join(HOW), shown(value)))
        elif name in ("windowS", "renotifyS"):
            low = MIN_WINDOW_S if name == "windowS" else 0
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not low <= value <= MAX_WINDOW_S:
                errors.append(FieldError(below, f"seconds from {low:g} to {MAX_WINDOW_S}", shown(value)))
        elif name == "texts":
            errors += _texts_problems(below, value)
        else:
            errors.append(FieldError(below, "how, windowS, renotifyS or texts", "an unknown field"))
    return errors


def _texts_problems(path: str, value: Any) -> list[FieldError]:
    if not is_object(value) or len(value) > MAX_LOCALES:
        return [FieldError(path, f"an object of at most {MAX_LOCALES} locales", shown(value))]
    errors: list[FieldError] = []
    if value and DEFAULT not in value:
        errors.append(FieldError(f"{path}/{DEFAULT}", "texts for when no locale fits", "nothing"))
    for locale, parts in value.items():
        below = f"{path}/{shown(locale, 40)}"
        if locale != DEFAULT and parse_locale(locale) != locale:
            expected = parse_locale(locale) or "a locale such as pt or pt-BR"
            errors.append(FieldError(below, expected, shown(locale, 40)))
        elif not is_object(parts) or not parts or not parts.keys() <= {"title", "body"}:
            errors.append(FieldError(below, "title, body or both", shown(parts)))
        else:
            for name, text in parts.items():
                errors += _text_problems(f"{below}/{name}", text, MAX_TITLE if name == "title" else MAX_BODY)
    return errors


def _text_problems(path: str, value: Any, most: int) -> list[FieldError]:
    forms: Any = {"other": value} if isinstance(value, str) else value
    if not is_object(forms) or "other" not in forms:
        return [FieldError(path, "a text, or texts by plural form with `other`", shown(value))]
    errors: list[FieldError] = []
    for form, text in forms.items():
        below = path if isinstance(value, str) else f"{path}/{shown(form, 40)}"
        if form not in FORMS and _EXACT.fullmatch(form) is None:
            errors.append(FieldError(below, f"{', '.join(FORMS)} or =2, =3, ...", shown(form, 40)))
            continue
        wrong = text_error(below, text, Text(1, most, control=True))
        if wrong is not None:
            errors.append(wrong)
            continue
        unknown = [word for word in _WORD.findall(text) if word not in WORDS]
        if unknown or "{" in _WORD.sub("", text) or "}" in _WORD.sub("", text):
            known = ", ".join(f"{{{word}}}" for word in WORDS)
            errors.append(FieldError(below, f"braces around {known} only", shown(text)))
    return errors
