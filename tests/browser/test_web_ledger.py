"""The web client's ledger: a notification that comes to tabs and a service worker is shown by one of them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.browser.chromium import Chromium, Tab, find_chromium
from tests.browser.fake_demo import FakeDemo
from tests.browser.web import LEDGER, build_package

pytestmark = pytest.mark.skipif(
    find_chromium() is None, reason="no Chromium in PATH: apt-get install chromium"
)

WORKER = """
import { claim } from "./ledger.js";
onmessage = async ({ data, ports }) => ports[0].postMessage(await Promise.all(data.map((id) => claim(id))));
"""
START = """(async () => {
    window.claim = (await import("/demo/ledger.js")).claim;
    const registered = await navigator.serviceWorker.register("/demo/worker.js", { type: "module" });
    const worker = registered.installing ?? registered.waiting ?? registered.active;
    await new Promise((resolve) => {
        const look = () => worker.state === "activated" && resolve();
        worker.onstatechange = look;
        look();
    });
    window.claims = {
        tab: (ids) => Promise.all(ids.map((id) => claim(id))),
        worker: (ids) => new Promise((resolve) => {
            const { port1, port2 } = new MessageChannel();
            port1.onmessage = ({ data }) => resolve(data);
            worker.postMessage(ids, [port2]);
        }),
    };
})()"""


async def test_one_of_all_is_the_first(tmp_path: Path) -> None:
    """Of two tabs and a service worker at once, one claims each notification; none claims it again."""
    await build_package()
    worker = tmp_path / "worker.js"
    worker.write_text(WORKER)
    async with FakeDemo() as fake, Chromium() as browser:
        fake.files = {"ledger.js": LEDGER, "worker.js": worker}
        tabs = [await browser.open(fake.url) for _ in range(2)]
        for tab in tabs:
            await tab.run(START)
        ids = [f"01a1ff0d-5b4a-7000-853b-{n:012d}" for n in range(40)]

        async def claims(tab: Tab, who: str) -> list[bool]:
            return await tab.run(f"claims.{who}({ids})")

        everybody = [(tabs[0], "tab"), (tabs[1], "tab"), (tabs[1], "worker")]
        first = await asyncio.gather(*(claims(tab, who) for tab, who in everybody))
        assert [sum(each) for each in zip(*first, strict=True)] == [1] * len(ids)
        for tab, who in everybody:
            assert not any(await claims(tab, who))
        assert browser.problems == []


async def test_what_is_old_is_forgotten_and_a_browser_without_it_shows_all() -> None:
    """Entries of more than 30 days are dropped; where IndexedDB fails, notifications are shown."""
    await build_package()
    async with FakeDemo() as fake, Chromium() as browser:
        fake.files = {"ledger.js": LEDGER}
        tab = await browser.open(fake.url)
        await tab.run("(async () => { window.claim = (await import('/demo/ledger.js')).claim; })()")
        assert await tab.run("claim('a')")
        month = 31 * 24 * 3_600_000
        await tab.run(f"{{ const now = Date.now; Date.now = () => now() + {month}; }}")
        assert not await tab.run("claim('a')")  # found before it is forgotten
        assert await tab.run("claim('b')")
        assert await tab.run("claim('a')")
        await tab.run("indexedDB.constructor.prototype.open = () => { throw new Error('private'); }")
        assert await tab.run("claim('a')")
        assert await tab.run("claim('a')")
