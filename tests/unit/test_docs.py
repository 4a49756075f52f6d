"""The documents say what the code does, and lead where they say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from carillon import client_frames, server_frames
from cluster.settings_page import PAGE, settings_page
from tests.unit.test_errors import tree

ROOT = Path(__file__).resolve().parent.parent.parent
DOCS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").glob("*.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)")
PACKAGES = (
    *("carillon", "stores", "channels", "actors", "serve", "cluster"),
    *("clients/python/src", "clients/web/packages/client/src"),
)


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def anchors(text: str) -> set[str]:
    heads = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("path", DOCS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(path: Path) -> None:
    """Files and headings that a document links to exist."""
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.exists(), f"{target} does not exist"
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), f"{target}: no such heading"


def test_every_page_is_in_the_index() -> None:
    """docs/README.md leads to every page."""
    index = read("docs/README.md")
    pages = [p.relative_to(ROOT / "docs") for p in (ROOT / "docs").rglob("*.md") if p.name != "README.md"]
    assert [str(p) for p in pages if f"]({p})" not in index] == []


def test_the_settings_page_is_in_step() -> None:
    """`python -m cluster.settings_page` would write what is there."""
    assert PAGE.read_text(encoding="utf-8") == settings_page()


def test_the_errors_page_has_every_error() -> None:
    """Class, code and whether it is temporary."""
    page = read("docs/reference/errors.md")
    for cls in tree():
        (row,) = re.findall(rf"^\| `{cls.__name__}` \|(.*)$", page, re.MULTILINE)
        code, temporary = (cell.strip() for cell in row.split("|")[:2])
        if cls.__name__ == "RemoteError":
            continue
        assert code.startswith(cls.code)
        assert temporary == ("yes" if cls.temporary else "no")
    assert len(re.findall(r"^\| `\w+Error` \|", page, re.MULTILINE)) == len(tree())


def test_the_websocket_page_has_every_frame_and_close_code() -> None:
    """What clients may send, what the server writes, and the codes it closes with."""
    page = read("docs/reference/websocket.md")
    source = read("carillon/server_frames.py")
    written = set(re.findall(r'"type":"([A-Z_]+)"', source))
    written |= {f"NOTIFICATION_{kind}" for kind in server_frames.STATE_KINDS}
    written -= {"NOTIFICATION_"}
    assert len(written) > 10
    for kind in (*written, *client_frames.TYPES):
        assert f"`{kind}`" in page, kind
    codes: set[str] = set()
    sources = [*(ROOT / "actors").glob("*.py"), *(ROOT / "serve").glob("*.py"), ROOT / "carillon/session.py"]
    for path in sources:
        codes |= set(re.findall(r"(?:close|_close|Close)\([^()]*?\b(4[0-2]\d\d)\b", path.read_text("utf-8")))
    assert len(codes) > 5
    for told in (page, read("docs/how-to/write-a-client.md")):
        assert {code for code in codes if f"| {code} |" not in told} == set()


def test_every_module_is_on_the_map() -> None:
    """ARCHITECTURE.md has one line for each file of ours, and none for a file that is gone."""
    text = read("ARCHITECTURE.md")
    named = set(re.findall(r"^\| `([\w/]+\.(?:py|sql|ts))` \|", text, re.MULTILINE))
    files = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for kind in ("*.py", "*.sql", "*.ts")
        for path in (ROOT / package).rglob(kind)
        if path.name != "__init__.py"
    }
    assert files - named == set(), "add a line to the map"
    assert named - files == set()
