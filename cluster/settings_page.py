"""docs/reference/settings.md, from carillon/settings.py: `python -m cluster.settings_page` writes it.

tests/unit/test_docs.py holds the page to what this module makes.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Final, get_type_hints

from carillon.settings import Settings

PAGE: Final = Path(__file__).resolve().parent.parent / "docs" / "reference" / "settings.md"

_HEAD: Final = """# Settings

Made from `carillon/settings.py` by `python -m cluster.settings_page`; do not edit.

A setting is given as the environment variable in the table, or in the TOML file that `CARILLON_CONFIG`
names, as `[section]` and `field = value`. The environment wins. They are read once, at start; a value that is
malformed, out of its bounds or of no setting stops the start with a sentence. Bounds are inclusive. Lists are
comma-separated text.
"""
_KINDS: Final = {int: "whole number", float: "number", bool: "true or false", str: "text"}


def settings_page() -> str:
    """The whole page as Markdown."""
    parts = [_HEAD]
    for section in dataclasses.fields(Settings):
        make: Any = section.default_factory
        hints = get_type_hints(make)
        parts.append(f"\n## {section.name}\n\n{(make.__doc__ or '').splitlines()[0]}\n")
        parts.append("| variable | default | bounds | meaning |\n|---|---|---|---|")
        for field in dataclasses.fields(make):
            meta = field.metadata
            variable = f"CARILLON_{section.name}_{field.name}".upper()
            default = _default(field.default, meta["unit"])
            bounds = _bounds(hints[field.name], meta["low"], meta["high"])
            parts.append(f"| `{variable}` | {default} | {bounds} | {meta['doc']} |")
    return "\n".join(parts) + "\n"


def _default(value: Any, unit: str) -> str:
    if value == "":
        return "empty"
    text = (
        str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else value
    )
    return f"`{text}`{' ' + unit if unit else ''}"


def _bounds(kind: type, low: float | None, high: float | None) -> str:
    text = _KINDS[kind]
    if low is not None and high is not None:
        return f"{text}, {low:g} to {high:g}" if high < 1e5 else f"{text}, {low} to {high}"
    if low is not None:
        return f"{text}, at least {low}"
    return text if high is None else f"{text}, at most {high}"


if __name__ == "__main__":
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(settings_page(), encoding="utf-8")
    print(f"wrote {PAGE}")
