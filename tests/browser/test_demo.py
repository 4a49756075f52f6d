"""The demo as a person uses it: the real system, a real browser."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest

from benchmarks.target import Target
from benchmarks.wire import get_json
from tests.browser.chromium import Chromium, Tab
from tests.support import eventually

pytestmark = pytest.mark.timeout(600)  # the first test waits for the system to start

STATE = "document.getElementById('state').dataset.state"
BADGE = "Number(document.getElementById('badge').dataset.count)"


@pytest.fixture
async def browser() -> AsyncIterator[Chromium]:
    """A browser; no page of it may have thrown."""
    async with Chromium() as chromium:
        yield chromium
        assert chromium.problems == []


async def users_of(system: Target) -> list[str]:
    """The demo users."""
    config = await get_json(system.http_door("direct"), "/demo/config.json")
    return [user["userId"] for user in config["users"]]


async def open_as(browser: Chromium, system: Target, user: str) -> Tab:
    """The page, with `user` picked by clicking, connected."""
    tab = await browser.open(f"{system.direct_url}/demo")
    await tab.click(f"[data-user='{user}']")
    await tab.wait(f"{STATE} === 'open'")
    return tab


async def send(tab: Tab, to: str, title: str) -> None:
    """Fill the form and press the button; wait until the server has answered."""
    await tab.run(f"document.getElementById('send-user').value = '{to}'")
    await tab.fill("#send-title-input", title)
    await tab.click("#send-button")
    await tab.wait("document.getElementById('send-hint').textContent.startsWith('№')")
    await tab.run("document.getElementById('send-hint').textContent = ''")


async def disconnected(system: Target, user: str) -> None:
    """Wait until the server knows that no device of the user is connected.

    A tab that closes is hidden for a moment before. What is sent in that moment goes to the phone after the
    delay for hidden devices (30 s), not when the grace period ends.
    """
    headers = {"Authorization": f"Bearer {system.api_key}"}
    async with httpx.AsyncClient(
        base_url=system.direct_url, headers=headers, trust_env=False, timeout=60
    ) as http:

        async def is_gone() -> bool:
            return (await http.get(f"/v1/presence/{user}")).json()["devices"] == []

        await eventually(is_gone, what=f"{user} to be gone")


def row(title: str) -> str:
    """An expression: the feed shows this title exactly once."""
    titles = "[...document.querySelectorAll('#feed .title')]"
    return f"{titles}.filter(n => n.textContent === '{title}').length === 1"


async def test_an_event_to_oneself_is_seen_and_with_the_tab_closed_goes_to_push(
    system: Target, browser: Chromium
) -> None:
    """Feed and badge show it while the page is open; with the tab closed the next reaches the phone."""
    ana, ben = (await users_of(system))[:2]
    tab = await open_as(browser, system, ana)
    before = await tab.run(BADGE)
    await send(tab, ana, "while I look")
    await tab.wait(row("while I look"))
    await tab.wait(f"{BADGE} === {before + 1}")
    # Acknowledged is not seen: had the person left before, it would follow to the phone.
    await tab.wait("document.getElementById('wire').textContent.includes('NOTIFICATIONS_SEEN')")

    watcher = await open_as(browser, system, ben)
    pushed = "[...document.querySelectorAll('#pushes .title')].map(n => n.textContent)"
    await tab.close()
    await disconnected(system, ana)
    await send(watcher, ana, "while I am away")
    await watcher.wait(f"{pushed}.includes('while I am away')", timeout_s=120)
    # It was seen, so it never went to the phone.
    assert "while I look" not in await watcher.run(pushed)

    again = await open_as(browser, system, ana)
    await again.wait(row("while I am away"))
    await again.wait(f"{BADGE} === {before + 2}")


async def test_tabs_are_in_step_and_reading_survives_a_reload(system: Target, browser: Chromium) -> None:
    """Read in one tab is read in the other at once, and still after a reload."""
    chloe = (await users_of(system))[2]
    first = await open_as(browser, system, chloe)
    second = await open_as(browser, system, chloe)
    await send(first, chloe, "for both tabs")
    for tab in (first, second):
        await tab.wait(row("for both tabs"))
    await first.click("#read-all")
    for tab in (first, second):
        await tab.wait(f"{BADGE} === 0")
    await second.call("Page.reload")
    await second.wait(f"document.readyState === 'complete' && {STATE} === 'open' && {row('for both tabs')}")
    assert await second.run(BADGE) == 0
    await first.click("#feed button[aria-label='Archive: for both tabs']")
    await second.wait(f"!({row('for both tabs')})")


async def test_offline_and_back_resumes(system: Target, browser: Chromium) -> None:
    """What arrived while the connection was closed is there after going online, by resume, exactly once."""
    ana, ben = (await users_of(system))[:2]
    tab = await open_as(browser, system, ben)
    await send(tab, ben, "before the pause")
    await tab.wait(row("before the pause"))
    await tab.click("#link-button")
    await tab.wait(f"{STATE} === 'none'")
    other = await open_as(browser, system, ana)
    await send(other, ben, "during the pause")
    await tab.click("#link-button")
    await tab.wait(row("during the pause"))
    wire = await tab.run("document.getElementById('wire').textContent")
    assert '"recovered":true' in wire


async def test_preferences_hold_for_the_next_event(system: Target, browser: Chromium) -> None:
    """A type that is switched off in the panel is explained as suppressed, and comes again when it is on."""
    user = (await users_of(system))[1]
    tab = await open_as(browser, system, user)
    await tab.run(f"document.getElementById('send-user').value = '{user}'")
    saved = "document.getElementById('preferences-hint').textContent.startsWith('saved')"
    explained = "document.getElementById('explained').textContent"
    switch = "document.getElementsByName('type.demo')[0]"
    await tab.wait(f"{switch} && {switch}.checked && !{switch}.disabled")
    try:
        await tab.click("[name='type.demo']")
        await tab.wait(saved)
        await tab.click("#explain-button")
        await tab.wait(
            f"document.getElementById('send-hint').textContent === 'would be suppressed' && {explained}"
        )
    finally:
        await tab.run("document.getElementById('preferences-hint').textContent = ''")
        await tab.click("[name='type.demo']")
        await tab.wait(saved)
    await send(tab, user, "wanted again")
    await tab.wait(row("wanted again"))


async def test_what_pops_up_obeys_the_panel(system: Target, browser: Chromium) -> None:
    """Switched in the panel, told to the connection, seen on the next: it stays, without a sound."""
    user = (await users_of(system))[2]
    tab = await open_as(browser, system, user)
    saved = "document.getElementById('preferences-hint').textContent.startsWith('saved')"
    stays, sound = (f"document.getElementsByName('in_app.{name}')[0]" for name in ("autoDismiss", "sound"))
    told = "document.getElementById('wire').textContent.split('\\n').filter(l => l.includes('PRESENTATION'))"
    tags = "[...document.querySelectorAll('#toasts li:last-child .tag')].map(n => n.textContent).join('|')"
    await tab.wait(f"{stays} && {stays}.checked && !{stays}.disabled")
    try:
        await tab.click("[name='in_app.autoDismiss']")
        await tab.wait(f"{saved} && {told}.length === 1")
        changed = "new Event('change', {bubbles: true})"
        await tab.run(f"(e => {{ e.value = 'false'; e.dispatchEvent({changed}) }})({sound})")
        await tab.wait(f"{told}.length === 2")
        await send(tab, user, "to stay")
        await tab.wait(f"{tags} === 'no sound|vibrates|stays'")
    finally:
        await tab.click("[data-reset]")
    await tab.wait(f"{told}.length === 3 && {stays}.checked")
    assert '"sound":true,"vibration":true,"durationMs":null,"autoDismiss":null' in await tab.run(f"{told}[2]")
