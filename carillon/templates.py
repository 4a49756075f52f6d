"""Templates: what one looks like, which text of it a user gets, and what its parameters must be.

A template is a JSON document per tenant with texts per locale and channel. Pure and without Jinja2: what is
in the texts is the business of carillon/template_language.py, in a process of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

import msgspec
from msgspec import Struct

from carillon.errors import InvalidInputError
from carillon.event_rules import (
    LOCALE,
    MAX_BODY_BYTES,
    TEXTS,
    Text,
    has_control,
    is_array,
    is_object,
    text_error,
    tree_errors,
)
from carillon.experiments import choose
from carillon.external import EXTERNAL, IN_APP, PUSH
from carillon.problems import DocumentError, FieldError, Problem, problem, shown

DEFAULT: Final = "default"
"""The content that is used when no locale fits."""
MEMBERS: Final = ("title", "body", "link", "imageUrl")
"""What a template writes of a notification."""
HTML_MEMBERS: Final = ("title", "body")
"""Those in which HTML is escaped; the others are URLs."""
CHANNELS: Final = (IN_APP, *EXTERNAL)
PARAM_TYPES: Final = ("any", "text", "number", "boolean", "object", "array")
MAX_DOCUMENT_BYTES: Final = 128 * 1024
MAX_LOCALES: Final = 100
MAX_VARIANTS: Final = 10
MAX_WEIGHT: Final = 1000
MAX_PARAMS: Final = 100
MAX_SOURCE: Final = 16_384

_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_REFERENCE: Final = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,63})(?:@([1-9][0-9]{0,8}))?")
_PARAM: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_UNSAFE_URL: Final = re.compile(r"[\s\x00-\x20]*(javascript|data|vbscript)\s*:", re.IGNORECASE)
_NOTHING: Final[dict[str, Any]] = {}


class TemplateDocumentError(DocumentError):
    """A template document that breaks rules. Args (positional): the errors, in the order found."""


class Template(Struct, frozen=True):
    """One version of a template as stored: valid, and complete with its parameters."""

    id: str
    version: int
    document: dict[str, Any]
    created_ms: int = 0


class Job(Struct, frozen=True):
    """Texts to be rendered together, as they travel to the process that renders."""

    sources: dict[str, str]
    """By member; `HTML_MEMBERS` are escaped if `html`."""
    params: dict[str, Any]
    locale: str
    html: bool
    template: str = ""
    """Names the template: once one ran out of time, others of its jobs are not tried."""


class Rendered(Struct, frozen=True):
    """What a template made of its parameters for one locale."""

    members: dict[str, str]
    """For the feed and the sockets."""
    channels: dict[str, dict[str, str]]
    """By channel, the members that differ from `members` there."""
    locale: str
    """The content that was used."""
    version: int = 0
    variant: str | None = None
    template: str = ""


# -- names --------------------------------------------------------------------------------------------


def check_id(template: str) -> str:
    """The id, if it can be one. Raises InvalidInputError."""
    if not _ID.fullmatch(template):
        expected = "1-64 of A-Z a-z 0-9 . _ -, the first a letter or digit"
        raise InvalidInputError(
            f"expected a template id of {expected}, got {shown(template)}",
            "templateId",
            expected,
            shown(template),
        )
    return template


def parse_reference(text: Any) -> tuple[str, int | None] | None:
    """What an event's `template` names: "welcome" or "welcome@3"; None if it can be neither."""
    match = _REFERENCE.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        return None
    return match[1], None if match[2] is None else int(match[2])


def parse_locale(text: Any) -> str | None:
    """A locale as templates name it (pt_br -> pt-BR, ZH-hant -> zh-Hant); None if it is none."""
    if not isinstance(text, str) or not LOCALE.fullmatch(text):
        return None
    first, *rest = text.replace("_", "-").split("-")
    parts = [part.title() if len(part) == 4 and part.isalpha() else part.upper() for part in rest]
    return "-".join((first.lower(), *parts))


def chain(locale: str | None) -> tuple[str, ...]:
    """Where the text for a locale is looked for: pt-BR -> pt -> default."""
    found: list[str] = []
    while locale:
        found.append(locale)
        locale = locale.rpartition("-")[0]
    return (*found, DEFAULT)


# -- the document -------------------------------------------------------------------------------------


def validate(document: Any) -> None:
    """Check a document, its texts' language aside.

    Raises:
        TemplateDocumentError: it breaks a rule; `errors` names each.
    """
    if not is_object(document):
        raise TemplateDocumentError([FieldError("", "an object", shown(document))])
    errors = tree_errors(document)
    if not errors:
        errors = _check_document(document)
    if not errors and len(msgspec.json.encode(document)) > MAX_DOCUMENT_BYTES:
        errors = [FieldError("", f"at most {MAX_DOCUMENT_BYTES} bytes", "more")]
    if errors:
        raise TemplateDocumentError(errors[:20])


def _check_document(document: dict[str, Any]) -> list[FieldError]:
    errors: list[FieldError] = []
    for name, value in document.items():
        if name == "locale":
            if parse_locale(value) != value:
                errors.append(FieldError(name, "a locale such as en or pt-BR", shown(value)))
        elif name == "escape":
            if value not in ("html", "none"):
                errors.append(FieldError(name, "html|none", shown(value)))
        elif name == "description":
            error = text_error(name, value, Text(0, 1000, control=True))
            errors.extend([] if error is None else [error])
        elif name == "params":
            errors.extend(_check_params(value))
        elif name == "content":
            errors.extend(_check_content(name, value))
        elif name == "variants":
            errors.extend(_check_variants(value))
        else:
            errors.append(FieldError(shown(name), "a member of a template", "an unknown field"))
    if ("content" in document) == ("variants" in document):
        got = "both" if "content" in document else "nothing"
        errors.append(FieldError("content", "texts by locale, or variants", got))
    return errors


def _check_params(value: Any) -> list[FieldError]:
    if not is_object(value) or len(value) > MAX_PARAMS:
        return [FieldError("params", f"an object of at most {MAX_PARAMS} parameters", shown(value))]
    errors: list[FieldError] = []
    for name, rule in value.items():
        path = f"params/{shown(name, 64)}"
        if not _PARAM.fullmatch(name):
            errors.append(FieldError(path, "a name of letters, digits and _", shown(name, 64)))
        elif not is_object(rule):
            errors.append(FieldError(path, "{type, required, default}", shown(rule)))
        else:
            errors.extend(_check_param(path, rule))
    return errors


def _check_param(path: str, rule: dict[str, Any]) -> list[FieldError]:
    errors: list[FieldError] = []
    for name, value in rule.items():
        if name == "type":
            if value not in PARAM_TYPES:
                errors.append(FieldError(f"{path}/type", "|".join(PARAM_TYPES), shown(value)))
        elif name == "required":
            if not isinstance(value, bool):
                errors.append(FieldError(f"{path}/required", "true or false", shown(value)))
        elif name != "default":
            errors.append(
                FieldError(f"{path}/{shown(name)}", "type, required or default", "an unknown field")
            )
    if not errors and rule.get("default") is not None and not _is_a(rule["default"], rule.get("type", "any")):
        errors.append(FieldError(f"{path}/default", rule["type"], shown(rule["default"])))
    return errors


def _check_variants(value: Any) -> list[FieldError]:
    if not is_array(value) or not 2 <= len(value) <= MAX_VARIANTS:
        return [FieldError("variants", f"an array of 2 to {MAX_VARIANTS} variants", shown(value))]
    errors: list[FieldError] = []
    names: set[str] = set()
    for index, variant in enumerate(value):
        path = f"variants/{index}"
        if not is_object(variant) or set(variant) != {"name", "weight", "content"}:
            errors.append(FieldError(path, "{name, weight, content}", shown(variant)))
            continue
        name, weight = variant["name"], variant["weight"]
        if not isinstance(name, str) or not _ID.fullmatch(name) or name in names:
            errors.append(
                FieldError(f"{path}/name", "a name of its own, as an id of a template", shown(name))
            )
        else:
            names.add(name)
        if type(weight) is not int or not 1 <= weight <= MAX_WEIGHT:
            errors.append(FieldError(f"{path}/weight", f"1 to {MAX_WEIGHT}", shown(weight)))
        errors.extend(_check_content(f"{path}/content", variant["content"]))
    return errors


def _check_content(path: str, value: Any) -> list[FieldError]:
    if not is_object(value) or not value:
        return [FieldError(path, "an object of locales", shown(value))]
    if len(value) > MAX_LOCALES:
        return [FieldError(path, f"at most {MAX_LOCALES} locales", f"{len(value)} locales")]
    errors: list[FieldError] = []
    if DEFAULT not in value:
        errors.append(FieldError(f"{path}/{DEFAULT}", "texts for when no locale fits", "nothing"))
    for locale, texts in value.items():
        below = f"{path}/{shown(locale, 40)}"
        if locale != DEFAULT and parse_locale(locale) != locale:
            expected = parse_locale(locale) or "a locale such as pt or pt-BR"
            errors.append(FieldError(below, expected, shown(locale, 40)))
        elif not is_object(texts):
            errors.append(FieldError(below, "an object of texts", shown(texts)))
        else:
            errors.extend(_check_texts(below, {k: v for k, v in texts.items() if k != "channels"}))
            if "title" not in texts:
                errors.append(FieldError(f"{below}/title", "a text", "nothing"))
            channels = texts.get("channels", {})
            if not is_object(channels):
                errors.append(FieldError(f"{below}/channels", "an object of channels", shown(channels)))
                continue
            for channel, own in channels.items():
                at = f"{below}/channels/{shown(channel, 40)}"
                if channel not in CHANNELS:
                    errors.append(FieldError(at, ", ".join(CHANNELS), "an unknown channel"))
                elif not is_object(own):
                    errors.append(FieldError(at, "an object of texts", shown(own)))
                else:
                    errors.extend(_check_texts(at, own))
    return errors


def _check_texts(path: str, texts: dict[str, Any]) -> list[FieldError]:
    errors: list[FieldError] = []
    for name, source in texts.items():
        if name not in MEMBERS:
            errors.append(FieldError(f"{path}/{shown(name)}", ", ".join(MEMBERS), "an unknown field"))
        else:
            error = text_error(f"{path}/{name}", source, Text(1, MAX_SOURCE, control=True))
            errors.extend([] if error is None else [error])
    return errors


def contents(document: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each set of texts by locale, with its path."""
    if "content" in document:
        yield "content", document["content"]
    for index, variant in enumerate(document.get("variants", ())):
        yield f"variants/{index}/content", variant["content"]


def content_for(template: Template, tenant: str, user: str) -> tuple[str | None, dict[str, Any]]:
    """The variant of a user (None: there are none) and its texts."""
    variants = template.document.get("variants")
    if variants is None:
        return None, template.document["content"]
    shares = [(one["name"], one["weight"]) for one in variants]
    chosen = variants[choose(f"{tenant}\0{template.id}\0{user}", shares)]
    return chosen["name"], chosen["content"]


def content_of(template: Template, variant: str | None) -> tuple[str | None, dict[str, Any]] | None:
    """The texts of a variant by name; the first if None. None if there is no such variant."""
    variants = template.document.get("variants")
    if variants is None:
        return None if variant is not None else (None, template.document["content"])
    for one in variants:
        if variant in (None, one["name"]):
            return one["name"], one["content"]
    return None


def sources(document: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Every text of a valid document, with its path."""
    for above, content in contents(document):
        for locale, texts in content.items():
            for name, value in texts.items():
                if name != "channels":
                    yield f"{above}/{locale}/{name}", value
            for channel, own in texts.get("channels", _NOTHING).items():
                for name, value in own.items():
                    yield f"{above}/{locale}/channels/{channel}/{name}", value


def completed(document: dict[str, Any], used: Mapping[str, set[str]]) -> dict[str, Any]:
    """A valid document with its parameters: those declared, or, if there are none, those that are used.

    Args:
        used: by path of a text, the names in it.

    Raises:
        TemplateDocumentError: a text uses what is not declared.
    """
    declared = document.get("params")
    if declared is None:
        names = sorted({name for some in used.values() for name in some})
        return {**document, "params": {name: {} for name in names}}
    errors = [
        FieldError(path, f"a parameter of params ({', '.join(declared) or 'none'})", name)
        for path, names in used.items()
        for name in sorted(names - set(declared))
    ]
    if errors:
        raise TemplateDocumentError(errors[:20])
    return document


# -- parameters ---------------------------------------------------------------------------------------


def _is_a(value: Any, kind: str) -> bool:
    if kind == "text":
        return isinstance(value, str)
    if kind == "number":
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind == "boolean":
        return isinstance(value, bool)
    if kind == "object":
        return isinstance(value, dict)
    return kind != "array" or isinstance(value, list)


def check_params(
    document: Mapping[str, Any], params: Mapping[str, Any] | None, *, offered: bool = False
) -> dict[str, Any]:
    """The parameters to render with, defaults filled in.

    Args:
        offered: they are what a template of this kind may use: those that it does not name are left out, and
            null is a value.

    Raises:
        TemplateDocumentError: one is missing, of another type, or unknown.
    """
    given = params or _NOTHING
    rules: dict[str, dict[str, Any]] = document["params"]
    errors: list[FieldError] = []
    full: dict[str, Any] = {}
    for name, rule in rules.items():
        value = given.get(name)
        kind = rule.get("type", "any")
        if value is None and offered and name in given and "default" not in rule:
            full[name] = None
            continue
        if value is None:
            if "default" in rule:
                full[name] = rule["default"]
            elif rule.get("required", True):
                errors.append(FieldError(f"params/{name}", "a value" if kind == "any" else kind, "nothing"))
            continue
        if not _is_a(value, kind):
            errors.append(FieldError(f"params/{name}", kind, shown(value)))
        full[name] = value
    for name in given:
        if name not in rules and not offered:
            expected = f"a parameter of the template ({', '.join(rules) or 'it has none'})"
            errors.append(FieldError(f"params/{shown(name, 64)}", expected[:500], "an unknown field"))
    if errors:
        raise TemplateDocumentError(errors[:20])
    return full


# -- rendering ----------------------------------------------------------------------------------------


def pick(content: Mapping[str, Any], locale: str | None, channel: str) -> tuple[str, dict[str, str]]:
    """The texts for a user: the first locale of the chain that is there, its channel's texts over its own.

    Title and body are never of two languages; URLs a locale leaves out come from the rest of the chain.
    """
    steps = [name for name in chain(locale) if name in content]
    first = content[steps[0]]
    found: dict[str, str] = {}
    for name in MEMBERS:
        for at in steps if name not in HTML_MEMBERS else steps[:1]:
            texts = content[at]
            text = texts.get("channels", _NOTHING).get(channel, _NOTHING).get(name) or texts.get(name)
            if text is not None:
                found[name] = text
                break
    assert "title" in first
    return steps[0], found


def language(document: Mapping[str, Any], used: str) -> str:
    """The language of the content that was picked: its locale, for `default` that of the document."""
    return document.get("locale", "en") if used == DEFAULT else used


def plan_jobs(
    template: Template, content: Mapping[str, Any], locale: str | None, params: dict[str, Any]
) -> tuple[str, list[tuple[str, Job]]]:
    """What is to be rendered for a locale: (the content used, jobs by channel; the first is in-app's).

    Feeds and sockets may put a text into a page, so HTML is escaped there unless the template says otherwise;
    phones show text as it is.
    """
    document = template.document
    html = document.get("escape", "html") == "html"
    used, texts = pick(content, locale, IN_APP)
    told, name = language(document, used), f"{template.id}@{template.version}"
    base = Job(texts, params, told, html, name)
    jobs = [(IN_APP, base)]
    push = pick(content, locale, PUSH)[1]
    if push != texts or (html and any("{" in push.get(member, "") for member in HTML_MEMBERS)):
        base = Job(push, params, told, False, name)
        jobs.append((PUSH, base))
    for channel in EXTERNAL:  # those that are push through one provider alone
        own = {**base.sources, **_own_texts(content, used, channel)}
        if channel != PUSH and own != base.sources:
            jobs.append((channel, Job(own, params, told, False, name)))
    return used, jobs


def _own_texts(content: Mapping[str, Any], locale: str, channel: str) -> dict[str, str]:
    return content[locale].get("channels", _NOTHING).get(channel, _NOTHING)


def assemble(used: str, version: int, made: list[tuple[str, dict[str, str]]]) -> Rendered:
    """What came of `plan_jobs`, by channel.

    Raises:
        TemplateDocumentError: a text breaks a limit of notifications.
    """
    errors: list[FieldError] = []
    full: list[tuple[str, dict[str, str]]] = []
    for channel, texts in made:
        kept = {name: text.strip() for name, text in texts.items()}
        kept = {name: text for name, text in kept.items() if text or name == "title"}
        where = "" if channel == IN_APP else f"{channel}/"
        errors.extend(error for name, text in kept.items() for error in _wrong(f"{where}{name}", name, text))
        full.append((channel, kept))
    if errors:
        raise TemplateDocumentError(errors[:20])
    members = full[0][1]
    channels: dict[str, dict[str, str]] = {}
    for channel, texts in full[1:]:
        over = channels.get("push", _NOTHING) if channel != "push" else _NOTHING
        # An empty text says that the channel tells nothing where the others do.
        told = {name: texts.get(name, "") for name in MEMBERS}
        differs = {n: text for n, text in told.items() if text != over.get(n, members.get(n, ""))}
        if differs:
            channels[channel] = {**over, **differs}
    return Rendered(members, channels, used, version)


def _wrong(path: str, name: str, text: str) -> list[FieldError]:
    errors = tree_errors(text, path)
    if errors:
        return errors
    if name == "body":
        size = len(text.encode())
        return (
            [FieldError(path, f"at most {MAX_BODY_BYTES} bytes", f"{size} bytes")]
            if size > MAX_BODY_BYTES
            else []
        )
    error = text_error(path, text, TEXTS[name])
    if error is not None:
        return [error]
    if name in ("link", "imageUrl") and (_UNSAFE_URL.match(text) or has_control(text)):
        return [FieldError(path, "a URL that runs no script", shown(text))]
    return []


def failed(errors: list[FieldError] | str, path: str = "template") -> Problem:
    """The problem of an event whose template could not be rendered: 422, told at its member."""
    if isinstance(errors, str):
        return problem(
            "template_failed", f"{path}: {errors}", [FieldError(path, "a template that renders", errors)]
        )
    first = errors[0]
    return problem("template_failed", f"{first.path}: expected {first.expected}, got {first.got}", errors)


def refused(error: TemplateDocumentError) -> Problem:
    """The problem of parameters that do not fit."""
    return problem("invalid", str(error), error.errors)
