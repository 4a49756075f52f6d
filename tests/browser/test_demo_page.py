"""The demo page's client half, against a small server whose connection can be cut: resume, tabs, safety."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser.chromium import Chromium, Tab, find_chromium
from tests.browser.fake_demo import FakeDemo
from tests.support import eventually

pytestmark = pytest.mark.skipif(
    find_chromium() is None, reason="no Chromium in PATH: apt-get install chromium"
)

TITLES = "[...document.querySelectorAll('#feed .title')].map(n => n.textContent).join('|')"
BADGE = "document.getElementById('badge').textContent"
STATE = "document.getElementById('state').dataset.state"


@pytest.fixture
async def fake() -> AsyncIterator[FakeDemo]:
    """A server with three users."""
    async with FakeDemo() as server:
        yield server


@pytest.fixture
async def browser() -> AsyncIterator[Chromium]:
    """A browser; no page of it may have thrown."""
    async with Chromium() as chromium:
        yield chromium
        assert chromium.problems == []


async def test_send_receive_read_and_archive(fake: FakeDemo, browser: Chromium) -> None:
    """An event sent to oneself appears once, is acknowledged and counted; read and archive work."""
    tab = await browser.open(fake.url)
    await tab.wait("document.querySelectorAll('.user').length === 3")
    await tab.click("[data-user=ana]")
    await tab.wait(f"{STATE} === 'open'")
    await tab.fill("#send-title-input", "Hello")
    await tab.click("#send-button")
    await tab.wait(f"{TITLES} === 'Hello' && {BADGE} === '1' && document.title.startsWith('(1)')")
    await eventually(lambda: ("ana", {"type": "ACK", "seq": 1, "rev": 1}) in fake.frames, what="the ACK")
    await eventually(
        lambda: ("ana", {"type": "VISIBILITY", "state": "focused"}) in fake.frames, what="the VISIBILITY"
    )
    await eventually(
        lambda: any(
            frame["type"] == "MARK_SEEN" and frame["notificationIds"] == ["ana-1"] for _, frame in fake.frames
        ),
        what="MARK_SEEN, once it was on the screen for a while",
    )
    await tab.click("#feed button[aria-label^='Mark as read']")
    await tab.wait(f"{BADGE} === '0' && document.querySelector('#feed li.read') !== null")
    await tab.click("#feed button[aria-label^='Archive']")
    await tab.wait("document.querySelectorAll('#feed li').length === 0")


async def test_a_cut_connection_resumes_what_was_missed(fake: FakeDemo, browser: Chromium) -> None:
    """After a loss the page reconnects by itself with its position; what it missed arrives."""
    await fake.notify("ana", "one")
    await fake.notify("ana", "two")
    tab = await browser.open(f"{fake.url}?user=ana")
    await tab.wait(f"{TITLES} === 'two|one' && {BADGE} === '2'")
    await eventually(lambda: all(note["seen"] for note in fake.notes["ana"]), what="both to be seen")
    rev = fake.rev["ana"]
    await tab.wait(f"document.getElementById('wire').textContent.includes('\"rev\":{rev}}}')")
    fake.refusing = True
    await fake.cut(4201)
    await tab.wait(f"{STATE} === 'reconnecting'")
    await fake.notify("ana", "three")
    fake.notes["ana"][0]["read"] = True
    await fake.change("ana", {"type": "NOTIFICATIONS_READ", "notificationIds": ["ana-1"], "readAt": ""})
    fake.refusing = False
    await tab.click("#link-button")  # "Try now"
    await tab.wait(f"{STATE} === 'open' && {TITLES} === 'three|two|one' && {BADGE} === '2'")
    assert fake.positions == [{}, {"epoch": "e1", "lastSeq": "2", "lastRev": str(rev)}]
    assert await tab.run("document.querySelectorAll('#feed li.read').length") == 1


async def test_lost_history_takes_the_feed_anew(fake: FakeDemo, browser: Chromium) -> None:
    """`recovered: false` drops what the page has and shows the feed as it is now."""
    await fake.notify("ana", "before")
    tab = await browser.open(f"{fake.url}?user=ana")
    await tab.wait(f"{TITLES} === 'before'")
    fake.epoch = "e2"
    fake.notes["ana"].clear()
    await fake.notify("ana", "after")
    await fake.cut(4202)
    await tab.wait(f"{STATE} === 'open' && {TITLES} === 'after'")


async def test_an_expired_token_is_replaced_and_a_revoked_one_stops(
    fake: FakeDemo, browser: Chromium
) -> None:
    """4101 fetches a new token and goes on; 4001 stops for good."""
    tab = await browser.open(f"{fake.url}?user=ana")
    await tab.wait(f"{STATE} === 'open'")
    fake.token = "t2"
    await fake.cut(4101)
    await eventually(
        lambda: sum(frame["type"] == "WATCH_PRESENCE" for _, frame in fake.frames) == 2,
        what="a connection with the new token",
    )
    await tab.wait(f"{STATE} === 'open'")
    await fake.cut(4001)
    await tab.wait(f"{STATE} === 'stopped'")


async def test_two_tabs_stay_in_step(fake: FakeDemo, browser: Chromium) -> None:
    """Two tabs share a connection, both show one new notification once, and what one reads both show."""
    first = await browser.open(f"{fake.url}?user=ana")
    second = await browser.open(f"{fake.url}?user=ana")
    for tab in (first, second):
        await tab.wait(f"{STATE} === 'open'")
    await eventually(lambda: len(fake.sockets["ana"]) == 1, what="the connection")
    await fake.notify("ana", "both")
    for tab in (first, second):
        await tab.wait(f"{TITLES} === 'both' && {BADGE} === '1'")
    await first.click("#read-all")
    for tab in (first, second):
        await tab.wait(f"{BADGE} === '0' && document.querySelector('#feed li.read') !== null")


async def test_another_tab_takes_the_connection_over(fake: FakeDemo, browser: Chromium) -> None:
    """The tab that holds the connection closes: the other goes on from its position, without a gap."""
    first = await browser.open(f"{fake.url}?user=ana")
    await first.wait(f"{STATE} === 'open'")
    second = await browser.open(f"{fake.url}?user=ana")
    await second.wait(f"{STATE} === 'open'")
    await fake.notify("ana", "one")
    for tab in (first, second):
        await tab.wait(f"{TITLES} === 'one'")
    assert len(fake.positions) == 1
    fake.refusing = True
    await first.close()
    await eventually(lambda: not fake.sockets["ana"], what="the first tab's connection to go")
    await fake.notify("ana", "two")
    fake.refusing = False
    await second.wait(f"{STATE} === 'open' && {TITLES} === 'two|one' && {BADGE} === '2'")
    assert fake.positions[-1] == {"epoch": "e1", "lastSeq": "1", "lastRev": "0"}


async def test_a_tab_that_sleeps_gives_the_connection_up(fake: FakeDemo, browser: Chromium) -> None:
    """The system suspends the tab with the connection: the one that is shown takes over."""
    first = await browser.open(f"{fake.url}?user=ana")
    await first.wait(f"{STATE} === 'open'")
    second = await browser.open(f"{fake.url}?user=ana")
    await second.wait(f"{STATE} === 'open'")
    assert len(fake.positions) == 1
    async with first.suspended():
        await second.run("document.dispatchEvent(new Event('visibilitychange'))")
        await eventually(lambda: len(fake.sockets["ana"]) == 2, what="a connection of the second tab")
        await fake.notify("ana", "while it sleeps")
        await second.wait(f"{TITLES} === 'while it sleeps'")
    await first.wait(f"{STATE} === 'open' && {TITLES} === 'while it sleeps'")
    await eventually(lambda: len(fake.sockets["ana"]) == 1, what="one connection")
    await fake.notify("ana", "awake")
    for tab in (first, second):
        await tab.wait(f"{TITLES} === 'awake|while it sleeps' && {BADGE} === '2'")
    assert len(fake.positions) == 2


async def test_the_server_hears_what_the_tabs_look_at(fake: FakeDemo, browser: Chromium) -> None:
    """VISIBILITY is the most attentive tab's: hidden only when all are, focused again when one is."""

    def told() -> str | None:
        states = [frame["state"] for _, frame in fake.frames if frame["type"] == "VISIBILITY"]
        return states[-1] if states else None

    # Two tabs of one user, whose visibility the test decides: headless tabs are all visible.
    decide = """(state) => {
        Object.defineProperty(document, "visibilityState", { configurable: true, get: () => state });
        document.dispatchEvent(new Event("visibilitychange"));
    }"""
    first = await browser.open(f"{fake.url}?user=ana")
    await first.wait(f"{STATE} === 'open'")
    second = await browser.open(f"{fake.url}?user=ana")
    await second.wait(f"{STATE} === 'open'")
    await eventually(lambda: told() == "focused", what="focused")
    await first.run(f"({decide})('hidden')")
    await second.run(f"({decide})('hidden')")
    await eventually(lambda: told() == "hidden", what="hidden")
    await second.run(f"({decide})('visible')")
    await eventually(lambda: told() == "focused", what="focused again")


async def test_a_connection_that_says_nothing_is_replaced(fake: FakeDemo, browser: Chromium) -> None:
    """The network is back and the socket says nothing: the page asks, and connects anew."""
    tab = await browser.open(f"{fake.url}?user=ana")
    # The last frame of the greeting: one that came later would be a sign of life.
    await tab.wait("document.querySelector('[data-user=chloe]')?.dataset.presence === 'offline'")
    fake.deaf = True
    await tab.run("dispatchEvent(new Event('online'))")
    await tab.wait(f"{STATE} === 'reconnecting'")
    fake.deaf = False
    await tab.wait(f"{STATE} === 'open'")
    assert len(fake.positions) == 2


async def test_text_of_others_is_never_markup(fake: FakeDemo, browser: Chromium) -> None:
    """A title with tags is shown as text."""
    tab = await browser.open(f"{fake.url}?user=ana")
    await tab.wait(f"{STATE} === 'open'")
    title = "<img src=x onerror=\"document.title='owned'\">"
    await fake.notify("ana", title, body="<b>bold</b>")
    await tab.wait("document.querySelectorAll('#feed li').length === 1")
    assert await tab.run(TITLES) == title
    assert await tab.run("document.querySelectorAll('#feed img, #feed b').length") == 0


async def test_own_presence_is_shown_even_if_the_server_tells_none(fake: FakeDemo, browser: Chromium) -> None:
    """A refused WATCH_PRESENCE is no error to the person; one's own dot follows the connection."""
    fake.tells_presence = False
    tab = await browser.open(f"{fake.url}?user=ana")
    # The users are drawn when the page's configuration is there, which may be after its load event.
    await tab.wait("document.querySelector('[data-user=ana]')?.dataset.presence === 'active'")
    await tab.wait("document.getElementById('wire').textContent.includes('not_supported')")
    assert await tab.run("document.getElementById('send-hint').textContent") == ""
    await tab.click("#link-button")  # "Go offline"
    await tab.wait("document.querySelector('[data-user=ana]').dataset.presence === 'offline'")


async def test_a_closed_tab_means_push(fake: FakeDemo, browser: Chromium) -> None:
    """With the user's tab gone, another user's tab shows the push."""
    ana = await browser.open(f"{fake.url}?user=ana")
    ben = await browser.open(f"{fake.url}?user=ben")
    for tab in (ana, ben):
        await tab.wait(f"{STATE} === 'open'")
    await ana.close()
    await eventually(lambda: not fake.sockets["ana"], what="the socket to go")
    await ben.run("document.getElementById('send-user').value = 'ana'")
    await ben.click("#send-button")
    await ben.wait("document.querySelector('#pushes [data-notification=ana-1]') !== null")


SAVED = "document.getElementById('preferences-hint').textContent.startsWith('saved')"


def control(name: str) -> str:
    """An expression: a control of the preferences panel."""
    return f"document.getElementById('preferences-form').elements.namedItem('{name}')"


async def set_to(tab: Tab, name: str, value: str) -> None:
    """Give a control of the panel a value, as its user does."""
    changed = "new Event('change', {bubbles: true})"
    await tab.run(f"(e => {{ e.value = {json.dumps(value)}; e.dispatchEvent({changed}) }})({control(name)})")


async def test_preferences_are_shown_and_saved(fake: FakeDemo, browser: Chromium) -> None:
    """The panel shows what holds, saves each change, and keeps what it has no control for."""
    mine = fake.preferences["ana"] = {
        "channels": {"push": {"enabled": True, "sound": "gong"}, "sms": False},
        "quietHours": {"start": "21:30", "end": "06:15", "timezone": "Europe/Vienna", "days": ["mon"]},
        "types": {"other": {"digest": "daily"}},
    }
    tab = await browser.open(f"{fake.url}?user=ana")
    await tab.wait(f"{control('push')}?.checked && !{control('push')}.disabled")
    assert await tab.run(f"[{control('start')}.value, {control('end')}.value].join()") == "21:30,06:15"
    days = "[...document.querySelectorAll('.day input:checked')].map(e => e.name).join()"
    assert await tab.run(days) == "day.mon"
    assert await tab.run(f"{control('at')}.disabled && {control('on')}.hidden")
    assert await tab.run(f"{control('push.sound')}.value") == "gong"
    await tab.click("[name=push]")
    await tab.wait(SAVED)
    push = {"enabled": False, "sound": "gong"}
    assert fake.preferences["ana"] == {**mine, "channels": {"push": push, "sms": False}}
    await tab.click("[data-hours='1']")
    await eventually(lambda: fake.preferences["ana"].get("doNotDisturbUntil"), what="do not disturb")
    await tab.wait("document.querySelector('[data-dnd]').textContent.startsWith('on until')")
    await set_to(tab, "digest", "daily")
    await eventually(
        lambda: fake.preferences["ana"].get("digest") == {"frequency": "daily", "at": "08:00"},
        what="a digest",
    )
    await tab.click("[name=global]")
    await tab.wait(f"{control('push')}.disabled && {SAVED}")
    assert fake.preferences["ana"]["global"] is False
    # Another user has another document.
    await tab.click("[data-user=ben]")
    await tab.wait(f"{control('global')}.checked && {control('push')}.checked")


async def test_every_part_of_the_panel_is_saved_and_nothing_else(fake: FakeDemo, browser: Chromium) -> None:
    """Channels with their looks, time on the screen, categories, days: each change by itself, and back."""
    fake.defaults = {
        "channels": {"in_app": {"durationMs": 5000}, "email": False},
        "categories": {"marketing": {"push": False}},
        "quietHours": {"start": "23:00", "end": "06:00", "timezone": "Europe/Vienna"},
    }
    tab = await browser.open(f"{fake.url}?user=ana")
    await tab.wait(f"{control('push')}?.checked && !{control('push')}.disabled")
    assert await tab.run(f"{control('in_app.durationMs')}.value") == "5"
    assert not await tab.run(f"{control('email')}.checked || {control('category.marketing.push')}.checked")

    async def saved(**expected: Any) -> None:
        await eventually(
            lambda: {n: fake.preferences.get("ana", {}).get(n) for n in expected} == expected,
            what=f"{expected}",
        )
        await tab.wait(SAVED)

    await set_to(tab, "in_app.sound", "bell")
    await saved(channels={"in_app": {"sound": "bell"}})
    assert fake.preferences["ana"] == {"channels": {"in_app": {"sound": "bell"}}}, "no default is stored"
    await tab.click("[name='in_app.vibration']")
    await set_to(tab, "in_app.durationMs", "8")
    in_app = {"sound": "bell", "vibration": False, "durationMs": 8000}
    await saved(channels={"in_app": in_app})
    await set_to(tab, "in_app.durationMs", "")
    await tab.click("[name='in_app.autoDismiss']")
    in_app = {"sound": "bell", "vibration": False, "autoDismiss": False}
    await saved(channels={"in_app": in_app})
    await tab.wait(f"{control('in_app.durationMs')}.value === '5' && {control('in_app.durationMs')}.disabled")
    await tab.click("[name='push.badge']")
    await tab.click("[name='sms.emergencyOnly']")
    await tab.click("[name='webhook']")
    more = {"push": {"badge": False}, "sms": {"emergencyOnly": True}, "webhook": {"enabled": False}}
    await saved(channels={"in_app": in_app, **more})
    await tab.click("[name='category.marketing.push']")
    await set_to(tab, "category.security.priority", "urgent")
    await tab.fill("[name=new]", "v2.news")
    await tab.run("document.getElementById('preferences-form').requestSubmit()")
    await tab.click("[name='category.v2.news.sms']")
    await tab.click("[name='category.social']")
    await saved(
        categories={
            "marketing": {"channels": {"push": True}},
            "security": {"priority": "urgent"},
            "v2.news": {"channels": {"sms": False}},
            "social": {"enabled": False},
        }
    )
    assert await tab.run(f"{control('category.social.push')}.disabled")
    await tab.click("label:has([name='day.sun'])")
    await saved(
        quietHours={
            "start": "23:00", "end": "06:00", "timezone": "Europe/Vienna", "enabled": True,
            "days": ["mon", "tue", "wed", "thu", "fri", "sat"],
        }
    )  # fmt: skip
    await set_to(tab, "digest", "weekly")
    await set_to(tab, "on", "fri")
    await saved(digest={"frequency": "weekly", "at": "08:00", "day": "fri"})
    await tab.click("[data-reset]")
    await eventually(lambda: fake.preferences["ana"] == {}, what="no word of the user")
    await tab.wait(f"{control('category.social')}.checked && !{control('category.marketing.push')}.checked")


async def test_refused_preferences_are_shown_as_they_hold(fake: FakeDemo, browser: Chromium) -> None:
    """What the server refuses is undone in the form, and its words are shown."""
    fake.preference_problem = "expected something else"
    tab = await browser.open(f"{fake.url}?user=ana")
    await tab.wait(f"{control('push')}?.checked && !{control('push')}.disabled")
    await tab.click("[name=push]")
    await tab.wait("document.getElementById('preferences-hint').textContent === 'expected something else'")
    assert await tab.run(f"{control('push')}.checked")
    assert "ana" not in fake.preferences


async def test_preferences_changed_elsewhere_are_not_overwritten(fake: FakeDemo, browser: Chromium) -> None:
    """Another device changed another part meanwhile: both hold, and the form shows both."""
    tab = await browser.open(f"{fake.url}?user=ana")
    await tab.wait(f"{control('push')}?.checked && !{control('push')}.disabled")
    fake.preferences["ana"] = {"channels": {"in_app": False}, "badge": False}
    await tab.click("[name=push]")
    await tab.wait(f"{SAVED} && !{control('in_app')}.checked && !{control('push.badge')}.checked")
    expected = {"channels": {"in_app": False, "push": {"enabled": False}}, "badge": False}
    assert fake.preferences["ana"] == expected


async def test_what_pops_up_stays_and_leaves_as_its_user_wants(fake: FakeDemo, browser: Chromium) -> None:
    """Without auto-dismiss until it is closed or read, else for the time that was chosen; with its noise."""
    shown = "[...document.querySelectorAll('#toasts .title')].map(n => n.textContent).join('|')"
    tags = "[...document.querySelectorAll('#toasts .tag')].map(n => n.textContent).join('|')"
    await fake.present("ana", autoDismiss=False, sound="bell", vibration=False)
    tab = await browser.open(f"{fake.url}?user=ana")
    await tab.wait(f"{STATE} === 'open'")
    await eventually(lambda: fake.sockets["ana"], what="the connection to be live")
    await fake.notify("ana", "one")
    await fake.notify("ana", "two")
    await tab.wait(f"{shown} === 'one|two'")
    assert await tab.run(tags) == "|".join(["♪ bell", "no vibration", "stays"] * 2)
    await tab.click("#toasts button[aria-label='Close: one']")
    await tab.wait(f"{shown} === 'two'")
    await tab.click("#feed button[aria-label='Mark as read: two']")
    await tab.wait(f"{shown} === ''")
    # For this long it cannot leave by itself before the assertion, for no time it cannot be seen at all.
    await fake.present("ana", durationMs=3_600_000, sound=False)
    await fake.notify("ana", "three")
    await tab.wait(f"{shown} === 'three'")
    assert await tab.run(tags) == "no sound|vibrates|leaves after 3600 s"
    await fake.present("ana", durationMs=300)
    await tab.run(
        "window.gone = []; new MutationObserver(all => all.forEach(m => m.removedNodes.forEach(n =>"
        " gone.push(n.querySelector('.title').textContent)))).observe(document.getElementById('toasts'),"
        " {childList: true}) || true"
    )
    await fake.notify("ana", "four")
    await tab.wait("window.gone.join() === 'four'")
    assert await tab.run(shown) == "three"
    await fake.present("ana", durationMs=0)
    await fake.notify("ana", "five")
    await fake.present("ana", durationMs=3_600_000)
    await fake.notify("ana", "six")
    await tab.wait(f"{shown} === 'three|six'")


async def test_what_would_happen_is_told_in_words(fake: FakeDemo, browser: Chromium) -> None:
    """The dry run of the form's event is shown, and nothing is sent."""
    tab = await browser.open(f"{fake.url}?user=ana")
    await tab.wait(f"{STATE} === 'open'")
    await tab.click("#explain-button")
    await tab.wait("document.getElementById('explained').textContent === 'ana is connected'")
    assert await tab.run("document.getElementById('send-hint').textContent") == "would be delivered"
    assert fake.notes["ana"] == []


async def test_nothing_is_wider_than_a_phone(fake: FakeDemo, browser: Chromium, tmp_path: Path) -> None:
    """At 360 pixels nothing scrolls sideways, in either colour scheme."""
    await fake.notify("ana", "A" * 200, body="b" * 400, priority="urgent")
    tab = await browser.open(f"{fake.url}?user=ana")
    await tab.wait("document.querySelectorAll('#feed li').length === 1")
    for dark in (False, True):
        await tab.screenshot(tmp_path / f"{dark}.png", width=360, height=740, dark=dark)
        assert await tab.run("(e => e.scrollWidth <= e.clientWidth)(document.documentElement)")
        assert await tab.run("document.documentElement.dataset.theme") == ("dark" if dark else "light")
