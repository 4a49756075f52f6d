"""The worked examples of the documents are what a running system does.

A page has an example between `<!-- worked example: NAME -->` and the end of the block that follows. When the
page is what is wrong, `WRITE_EXAMPLES=1 pytest tests/integration/test_worked_examples.py` writes it anew.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.integration.client_world import ClientWorld
from tests.integration.examples import EXAMPLES, Transcript

DOCS = Path(__file__).resolve().parent.parent.parent / "docs"
BLOCK = re.compile(r"<!-- worked example: (\w+) -->\n+```\n(.*?)```\n", re.DOTALL)
STREAM = {"stream": "events", "stream_block_s": 0.05, "stream_claim_s": 5.0, "stream_tenant": "acme"}
# Nothing that waits comes of age while an example runs, however slow the machine is.
SHARD = {"policy_refresh_s": 0.05, "ack_window_s": 300.0, "grace_s": 300.0, "clean_close_grace_s": 300.0}

_VARYING = (
    (re.compile(r"\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b"), "id"),
    (re.compile(r"in_[0-9a-f]{24}"), "source"),
    (re.compile(r"\b[0-9]{13}-[0-9]+\b"), "entry"),
)
_TIMES = (
    re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d+)?Z?"),
    re.compile(r"\b\d\d:\d\d\b"),
    re.compile(r"t=\d+,v1=[0-9a-f]+"),
)


def alike(text: str) -> str:
    """What is the same in every run: ids by the order in which they appear, no times, no line breaks."""
    for pattern, name in _VARYING:
        known: dict[str, str] = {}
        text = pattern.sub(
            lambda found, known=known, name=name: known.setdefault(found[0], f"<{name} {len(known)}>"), text
        )
    for pattern in _TIMES:
        text = pattern.sub("<time>", text)
    return " ".join(text.split())


def blocks() -> dict[str, tuple[Path, str]]:
    """Every example in the documents: its page, and what stands there."""
    found: dict[str, tuple[Path, str]] = {}
    for page in sorted(DOCS.rglob("*.md")):
        for name, text in BLOCK.findall(page.read_text(encoding="utf-8")):
            assert name not in found, f"{name} is shown twice"
            found[name] = page, text
    return found


def test_every_example_is_shown() -> None:
    """None is run for nobody, and none is shown that nobody runs."""
    assert blocks().keys() == EXAMPLES.keys()


@pytest.mark.parametrize("name", EXAMPLES)
async def test_an_example_is_what_happens(
    name: str, request: pytest.FixtureRequest, postgres_dsn: str
) -> None:
    """The same calls to a system of today have the same answers, but for ids and times."""
    sections: dict[str, dict[str, Any]] = {"shard": SHARD}
    if name == "redis_stream":
        sections |= {"redis": {"url": request.getfixturevalue("redis_url")}, "inbound": STREAM}
    async with (
        ClientWorld(postgres_dsn, **sections) as world,
        httpx.AsyncClient(timeout=30, trust_env=False) as http,
    ):
        transcript = Transcript(world, http)
        await EXAMPLES[name](transcript)
    made = transcript.text() + "\n"
    page, shown = blocks()[name]
    if os.environ.get("WRITE_EXAMPLES"):
        whole = page.read_text(encoding="utf-8")
        head = f"<!-- worked example: {name} -->\n\n```\n"
        begin, rest = whole.split(head)
        page.write_text(begin + head + made + rest[rest.index("```\n") :], encoding="utf-8")
        return
    assert alike(made) == alike(shown)
