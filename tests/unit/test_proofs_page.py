"""docs/reference/proofs.md: every rule has the property test and the worked example that it says."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from carillon import explain

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = ROOT / "docs/reference/proofs.md"
ROW = re.compile(r"^\| (.+?) \| `(\w+\.py)::(\w+)` \| \[([^]]+)\]\(([^)]+)\) \|$", re.MULTILINE)
ROWS = ROW.findall(PAGE.read_text(encoding="utf-8"))
TOLD = [row for row in ROWS if row[0].startswith("`") and row[0].strip("`") in explain.RULES]


def property_tests(name: str) -> set[str]:
    """The tests of a file that are given whatever hypothesis thinks of."""
    tree = ast.parse((ROOT / "tests/unit" / name).read_text(encoding="utf-8"))
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            calls = [one.func for one in node.decorator_list if isinstance(one, ast.Call)]
            if any(isinstance(call, ast.Name) and call.id == "given" for call in calls):
                found.add(node.name)
    return found


def example(name: str) -> str:
    """What the pages show of a worked example."""
    for page in (ROOT / "docs").rglob("*.md"):
        found = re.search(
            rf"<!-- worked example: {name} -->\n+```\n(.*?)```\n", page.read_text(encoding="utf-8"), re.DOTALL
        )
        if found:
            return found[1]
    raise AssertionError(f"no page has the worked example {name}")


def test_every_rule_has_its_row() -> None:
    """What explain can tell, and nothing that it cannot; every row of the page is one that tests read."""
    assert [row[0].strip("`") for row in TOLD] == list(dict.fromkeys(row[0].strip("`") for row in TOLD))
    assert {row[0].strip("`") for row in TOLD} == set(explain.RULES), "a rule lacks its row, or its words"
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    assert len(lines) - 2 == len(ROWS), "a row that cannot be read is checked by nobody"


@pytest.mark.parametrize("file", sorted({row[1] for row in ROWS}))
def test_every_proof_is_a_property_test(file: str) -> None:
    """The test is there, and hypothesis drives it."""
    assert {row[2] for row in ROWS if row[1] == file} <= property_tests(file)


@pytest.mark.parametrize("row", TOLD, ids=lambda row: row[0].strip("`"))
def test_every_example_tells_its_rule(row: tuple[str, str, str, str, str]) -> None:
    """The worked example has the rule among those that fired, under the heading that is linked."""
    rule, name, target = row[0].strip("`"), row[3], row[4]
    assert f'"rule": "{rule}"' in example(name)
    page, _, anchor = target.partition("#")
    text = (PAGE.parent / page).resolve().read_text(encoding="utf-8")
    before = text[: text.index(f"<!-- worked example: {name} -->")]
    heading = re.findall(r"^## (.+)$", before, re.MULTILINE)[-1]
    assert re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") == anchor
