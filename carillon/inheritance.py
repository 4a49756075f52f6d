"""What holds for a user: the user's preferences with the tenant's defaults beneath; and changes of a part.

Pure. `complete` is for those who read: what decides are both documents (carillon/switches.py). It is exact
for an event of a category, of a type, or of neither. Of one whose type the one document names and whose
category the other does, the user's word counts before the tenant's, whatever it is about, which no single
document can say. The same is true of a channel that the tenant keeps for emergencies and the user opens for
one category.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, cast

from carillon.preferences import CHANNELS, DEFAULTS

Document = Mapping[str, Any]

_SHOWN: Final = ("sound", "badge", "vibration")
"""Members of a channel that the whole document has, too."""
_OF_IN_APP: Final = ("durationMs", "autoDismiss")


def complete(document: Document, defaults: Document | None = None) -> dict[str, Any]:
    """A stored document with every member, in the order of `DEFAULTS`.

    Args:
        defaults: the tenant's document; it fills in what the user's leaves out, in every part.
    """
    beneath = defaults or {}
    found = {name: document.get(name, beneath.get(name, default)) for name, default in DEFAULTS.items()}
    # Nothing is to be done about do-not-disturb of a tenant: it is the user's alone.
    found["doNotDisturbUntil"] = document.get("doNotDisturbUntil")
    if beneath:
        found["channels"] = _channels(document, beneath)
        found["categories"] = _entries(document, beneath, "categories")
        found["types"] = _entries(document, beneath, "types")
    return found


def _channels(user: Document, tenant: Document) -> dict[str, Any]:
    mine, theirs = _part(user, "channels"), _part(tenant, "channels")
    found: dict[str, Any] = {}
    for channel in CHANNELS:
        if channel not in theirs:
            if channel in mine:
                found[channel] = mine[channel]
            continue
        near, far = _expanded(mine.get(channel, {})), _expanded(theirs[channel])
        made = dict(near)
        _inherit(made, far, ("enabled", *_OF_IN_APP))
        # Who opens a channel opens it for everything.
        _inherit(made, far, ("emergencyOnly",) if "enabled" not in near else ())
        # The word on everything of the user counts before the tenant's on the channel.
        _inherit(made, far, tuple(name for name in _SHOWN if name not in user))
        if made:
            found[channel] = made["enabled"] if made.keys() == {"enabled"} else made
    return found


def _entries(user: Document, tenant: Document, section: str) -> dict[str, Any]:
    """Categories, or types."""
    mine, theirs = _part(user, section), _part(tenant, section)
    found = dict(mine)
    decided = {name for name, word in _part(user, "channels").items() if "enabled" in _expanded(word)}
    for name, word in theirs.items():
        near, far = _entry(mine.get(name, {})), _entry(word)
        made = dict(near)
        _inherit(made, far, ("enabled", "priority", *(() if "digest" in user else ("digest",))))
        open_ = dict(_part(near, "channels"))
        # The user's word on a channel counts before the tenant's on that of a category or type.
        _inherit(open_, _part(far, "channels"), tuple(c for c in CHANNELS if c not in decided))
        if open_:
            made["channels"] = open_
        if made:
            found[name] = made["enabled"] if made.keys() == {"enabled"} else made
    return found


def _inherit(made: dict[str, Any], beneath: Document, names: tuple[str, ...]) -> None:
    for name in names:
        if name in beneath:
            made.setdefault(name, beneath[name])


def _part(document: Document, name: str) -> dict[str, Any]:
    return document.get(name) or {}


def _expanded(word: Any) -> dict[str, Any]:
    """A switch in its long form."""
    return {"enabled": word} if isinstance(word, bool) else word


def _entry(word: Any) -> dict[str, Any]:
    """What is said of a category or type, its channels all in one place."""
    long = _expanded(word)
    channels = {name: long[name] for name in CHANNELS if name in long} | _part(long, "channels")
    found = {name: value for name, value in long.items() if name not in CHANNELS and name != "channels"}
    return found | {"channels": channels} if channels else found


def patched(document: Document, patch: Document) -> dict[str, Any]:
    """A stored document with a change of a part of it: JSON merge patch (RFC 7396), null takes a member out.

    A short form that is changed inside is taken for its long one: `false` of a channel, category or type is
    `{"enabled": false}`, a digest's `"daily"` is `{"frequency": "daily"}`, and `push` of a stored category or
    type is `push` of its `channels`.

    Args:
        patch: any JSON object; what comes of it may be no valid document.
    """
    before, after = dict(document), dict(patch)
    words: Any = patch.get("channels")
    if isinstance(words, dict) and "channels" in before:
        inside = cast("dict[str, Any]", words)
        before["channels"] = {
            name: _expanded(word) if isinstance(inside.get(name), dict) else word
            for name, word in before["channels"].items()
        }
    for section in ("categories", "types"):
        words = patch.get(section)
        if isinstance(words, dict) and section in before:
            before[section], after[section] = dict(before[section]), dict(cast("dict[str, Any]", words))
            for name in before[section].keys() & after[section].keys():
                if isinstance(after[section][name], dict):
                    before[section][name], after[section][name] = _aligned(
                        _entry(before[section][name]), after[section][name]
                    )
    return merge_patch(*_with_long_digest(before, after))


def _aligned(entry: dict[str, Any], change: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A stored category or type and its change, both with the channels in one place and a digest in its long
    form.

    Without that a change could name a channel in one place while the word that counts is in the other.
    """
    entry, change = _with_long_digest(entry, change)
    short = {name: change[name] for name in CHANNELS if name in change}
    inside: Any = change.get("channels", {})
    if not short or not (inside is None or isinstance(inside, dict)):
        return entry, change  # a change that is no valid one is told as it came
    if inside is None:  # all of them out, and then these in
        entry = {name: word for name, word in entry.items() if name != "channels"}
    rest = {name: word for name, word in change.items() if name not in short}
    return entry, rest | {"channels": short | cast("dict[str, Any]", inside or {})}


def _with_long_digest(stored: Document, change: Document) -> tuple[dict[str, Any], dict[str, Any]]:
    found = dict(stored)
    if isinstance(change.get("digest"), dict) and isinstance(found.get("digest"), str):
        found["digest"] = {"frequency": found["digest"]}
    return found, dict(change)


def merge_patch(target: Any, patch: Any) -> Any:
    """RFC 7396, section 2."""
    if not isinstance(patch, dict):
        return patch
    made: dict[str, Any] = dict(cast("dict[str, Any]", target)) if isinstance(target, dict) else {}
    for name, value in cast("dict[str, Any]", patch).items():
        if value is None:
            made.pop(name, None)
        else:
            made[name] = merge_patch(made.get(name), value)
    return made
