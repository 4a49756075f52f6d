"""What a tenant wants: push while its users are connected, who may watch whose presence, and rules about the
users' preferences (carillon/tenant_rules.py).

The policy document is kept as `policy` in `tenants.settings`. Validated strictly and stored as it came; what
it leaves out is the cluster's default (`shard.when_away`, `shard.when_away_delay_s`, `shard.hold_s`,
`presence.watch`), and no rule at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec

from carillon import retention
from carillon.audience import NAME, platform_errors
from carillon.decision import TenantRules
from carillon.errors import InvalidInputError
from carillon.event_rules import Text, is_array, is_object, text_error, tree_errors
from carillon.jwks_url import check_jwks_url
from carillon.merge_rules import MergeRule, merge_problems, merge_rules
from carillon.problems import DocumentError, FieldError, shown
from carillon.settings import WATCH, WHEN_AWAY, ShardSettings
from carillon.tenant_rules import RULES, rules_of, rules_problems, window_errors

MAX_TYPES: Final = 200
"""Types that one document may name."""
MAX_DELAY_S: Final = 86_400
MAX_HOLD_S: Final = 3_600
"""Suppression is bounded: nothing waits longer than this for a user who looks away."""

SUBSCRIBE: Final = ("nobody", "any", "prefix")
"""To which topics clients may subscribe."""
MAX_PREFIXES: Final = 100

_TYPE: Final = Text(1, 64)
_AS_GIVEN: Final = (*RULES, "merge", retention.MEMBER)
"""Members that are told as they were given."""


@dataclass(frozen=True, slots=True)
class Policy:
    """How push follows the attention of a connected user.

    Attributes:
        when_away: `in_app` (an acknowledgement of any device suffices), `both` (push at once) or `push_after`
            (push after `delay_ms` unless seen), while every device of the user is hidden or idle.
        delay_ms: see `push_after`.
        hold_ms: how long after its creation a push that an active user acknowledged may still come, should
            the user look away without having seen it; 0: the acknowledgement ends it.
        platforms: devices that get the push; empty: all.
    """

    when_away: str
    delay_ms: int
    hold_ms: int
    platforms: frozenset[str] = frozenset()

    def gets(self, platform: str | None) -> bool:
        """Whether a device of a platform gets the push; of one that is not known: yes."""
        return not self.platforms or not platform or platform in self.platforms


@dataclass(frozen=True, slots=True)
class WatchRule:
    """Who may watch whose presence.

    Attributes:
        watch: `nobody`, `tenant` (all users of the tenant each other) or `callback` (`url` decides).
        url: asked by POST, with `callback`.
    """

    watch: str = "nobody"
    url: str = ""


@dataclass(frozen=True, slots=True)
class TopicRule:
    """To which topics a client may subscribe by itself.

    Attributes:
        subscribe: `nobody`, `any` (topic) or `prefix` (those that begin with one of `prefixes`).
        prefixes: with `prefix`.
    """

    subscribe: str = "nobody"
    prefixes: tuple[str, ...] = ()

    def allows(self, topic: str) -> bool:
        """Whether a client may subscribe to a topic."""
        return self.subscribe == "any" or topic.startswith(self.prefixes)  # of none: false


@dataclass(frozen=True, slots=True)
class TenantPolicy:
    """A tenant's policy, what differs for single types of notifications, and its rule of presence.

    Attributes:
        rules: about its users' preferences; None: there are none, and nothing has to be looked at.
        merge: by type which events are merged; None: none but those that ask for it.
        text: the document, to see whether another one differs; "" if the tenant never stored one.
        topics: to which topics clients may subscribe.
    """

    default: Policy
    types: dict[str, Policy]
    presence: WatchRule = WatchRule()
    rules: TenantRules | None = None
    text: bytes = b""
    topics: TopicRule = TopicRule()
    merge: dict[str, MergeRule] | None = None

    def of(self, kind: str) -> Policy:
        """The policy for notifications of one type."""
        return self.types.get(kind, self.default)


class PolicyError(DocumentError):
    """A policy document that breaks rules. Args (positional): the errors, in the order found."""


def cluster_default(settings: ShardSettings) -> Policy:
    """What holds for whatever no tenant decides."""
    return Policy(settings.when_away, round(settings.when_away_delay_s * 1000), round(settings.hold_s * 1000))


def build(
    document: dict[str, Any] | None, default: Policy, presence: WatchRule = WatchRule()
) -> TenantPolicy:
    """The policy of a stored (hence valid) document; None if the tenant stored none.

    Args:
        default, presence: what holds where the document says nothing.
    """
    if not document:
        return TenantPolicy(default, {}, presence, text=b"" if document is None else b"{}")
    own = _over(default, document)
    if "presence" in document:
        rule = document["presence"]
        presence = WatchRule(rule["watch"], rule.get("url", ""))
    types = {kind: _over(own, some) for kind, some in document.get("types", {}).items()}
    text = msgspec.json.encode(document, order="sorted")
    topics = document.get("topics", {})
    told = TopicRule(topics.get("subscribe", "nobody"), tuple(topics.get("prefixes", ())))
    return TenantPolicy(own, types, presence, rules_of(document), text, told, merge_rules(document))


def _over(base: Policy, some: dict[str, Any]) -> Policy:
    delay_s, hold_s = some.get("whenAwayDelayS"), some.get("holdS")
    return Policy(
        some.get("whenAway", base.when_away),
        base.delay_ms if delay_s is None else round(delay_s * 1000),
        base.hold_ms if hold_s is None else round(hold_s * 1000),
        frozenset(some.get("devices", ())),
    )


def complete(
    document: dict[str, Any] | None, default: Policy, presence: WatchRule = WatchRule()
) -> dict[str, Any]:
    """A stored document with every member, those left out as they hold now; types as they were given."""
    own = _over(default, document or {})
    return {
        "whenAway": own.when_away,
        "whenAwayDelayS": own.delay_ms / 1000,
        "holdS": own.hold_ms / 1000,
        "types": (document or {}).get("types", {}),
        "presence": (document or {}).get("presence", {"watch": presence.watch}),
        "topics": (document or {}).get("topics", {"subscribe": "nobody"}),
    } | {name: document[name] for name in _AS_GIVEN if document and name in document}


def validate(document: Any, callback_hosts: str | None = None) -> str:
    """Check a document and return the text to store (members left out stay left out).

    Args:
        callback_hosts: `presence.callback_hosts`; None leaves that to whoever asks the URL.

    Raises:
        PolicyError: it breaks a rule; `errors` names each.
    """
    if not is_object(document):
        raise PolicyError([FieldError("", "an object", shown(document))])
    errors = tree_errors(document) or _rules("", document)
    if not errors:
        errors = rules_problems(document)
        if "merge" in document:
            errors += merge_problems(document["merge"])
    types = document.get("types", {})
    if not errors and not is_object(types):
        errors.append(FieldError("types", "an object", shown(types)))
    elif not errors and len(types) > MAX_TYPES:
        errors.append(FieldError("types", f"at most {MAX_TYPES} entries", f"{len(types)} entries"))
    elif not errors:
        for kind, some in types.items():
            path = f"types/{shown(kind, 64)}"
            wrong = text_error(path, kind, _TYPE)
            if wrong is not None:
                errors.append(wrong)
            elif not is_object(some):
                errors.append(FieldError(path, "an object", shown(some)))
            else:
                errors.extend(_rules(f"{path}/", some))
    url = document.get("presence", {}).get("url") if not errors else None
    if url is not None and callback_hosts is not None and not callback_allowed(url, callback_hosts):
        wanted = "a URL whose host the operator allows (presence.callback_hosts)"
        errors.append(FieldError("presence/url", wanted, shown(url)))
    if errors:
        raise PolicyError(errors)
    return msgspec.json.encode(document).decode()


def _rules(prefix: str, some: dict[str, Any]) -> list[FieldError]:
    errors: list[FieldError] = []
    for name, value in some.items():
        path = f"{prefix}{shown(name)}"
        if name == "whenAway":
            if not isinstance(value, str) or value not in WHEN_AWAY:
                errors.append(FieldError(path, "|".join(WHEN_AWAY), shown(value)))
        elif name in ("whenAwayDelayS", "holdS"):
            most = MAX_DELAY_S if name == "whenAwayDelayS" else MAX_HOLD_S
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0 <= value <= most:
                errors.append(FieldError(path, f"seconds from 0 to {most}", shown(value)))
        elif name == retention.MEMBER and not prefix:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0 <= value <= retention.MAX_DAYS or value != int(value):
                errors.append(
                    FieldError(path, f"days from 0 (for ever) to {retention.MAX_DAYS}", shown(value))
                )
        elif name == "devices" and prefix:
            errors.extend(platform_errors(path, value))
        elif name == "window" and prefix:
            errors.extend(window_errors(path, value))
        elif name == "presence" and not prefix:
            errors.extend(_presence_errors(value))
        elif name == "topics" and not prefix:
            errors.extend(_topics_errors(value))
        elif (name != "types" and name not in _AS_GIVEN) or prefix:
            errors.append(FieldError(path, "a member of the policy", "an unknown field"))
    return errors


def callback_allowed(url: str, hosts: str) -> bool:
    """Whether a tenant's URL may be asked.

    Args:
        hosts: `presence.callback_hosts`. Tenants set their policy themselves: without this list each of them
            could have our servers send requests to whatever only they can reach.
    """
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    host = (parts.hostname or "").lower()
    allowed = {one.strip().lower() for one in hosts.split(",")} - {""}
    default = port == (443 if parts.scheme == "https" else 80)
    return f"{host}:{port}" in allowed or (default and host in allowed)


def _topics_errors(rule: Any) -> list[FieldError]:
    if not is_object(rule):
        return [FieldError("topics", "an object", shown(rule))]
    errors = [
        FieldError(f"topics/{shown(name)}", "subscribe or prefixes", "an unknown field")
        for name in rule
        if name not in ("subscribe", "prefixes")
    ]
    subscribe, prefixes = rule.get("subscribe"), rule.get("prefixes")
    if not isinstance(subscribe, str) or subscribe not in SUBSCRIBE:
        errors.append(FieldError("topics/subscribe", "|".join(SUBSCRIBE), shown(subscribe)))
    elif (subscribe == "prefix") != ("prefixes" in rule):
        got = shown(prefixes) if "prefixes" in rule else "nothing"
        errors.append(FieldError("topics/prefixes", "a list with prefix, and only then", got))
    elif "prefixes" in rule and (not is_array(prefixes) or not 1 <= len(prefixes) <= MAX_PREFIXES):
        errors.append(FieldError("topics/prefixes", f"1 to {MAX_PREFIXES} texts", shown(prefixes)))
    else:
        told = [text_error(f"topics/prefixes/{at}", one, NAME) for at, one in enumerate(prefixes or ())]
        errors.extend(one for one in told if one is not None)
    return errors


def _presence_errors(rule: Any) -> list[FieldError]:
    if not is_object(rule):
        return [FieldError("presence", "an object", shown(rule))]
    watch, url = rule.get("watch"), rule.get("url")
    errors = [
        FieldError(f"presence/{shown(name)}", "a member of presence", "an unknown field")
        for name in rule
        if name not in ("watch", "url")
    ]
    if not isinstance(watch, str) or watch not in WATCH:
        errors.append(FieldError("presence/watch", "|".join(WATCH), shown(watch)))
    elif (watch == "callback") != ("url" in rule):
        got = shown(url) if "url" in rule else "nothing"
        errors.append(FieldError("presence/url", "a URL with callback, and only then", got))
    elif "url" in rule:
        try:
            check_jwks_url(url if isinstance(url, str) else "")
        except InvalidInputError as exc:
            errors.append(FieldError("presence/url", exc.expected, shown(url)))
    return errors
