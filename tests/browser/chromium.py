"""A headless Chromium over the DevTools protocol: what the browser tests need of it, and nothing to install.

`async with Chromium() as browser:` starts one with a profile of its own; it ends with the block.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import websockets.asyncio.client as ws_client

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def find_chromium() -> str | None:
    """The path of an installed Chromium, or None. `CARILLON_TEST_CHROMIUM` is not read: PATH decides."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Tab:
    """One page."""

    def __init__(self, browser: Chromium, target: str, session: str) -> None:
        self._browser = browser
        self._target = target
        self._session = session

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A DevTools command in this page."""
        return await self._browser.call(method, params, self._session)

    async def run(self, expression: str) -> Any:
        """The value of a JavaScript expression; promises are awaited, exceptions raised as AssertionError."""
        answer = await self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True, userGesture=True
        )
        if "exceptionDetails" in answer:
            raise AssertionError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    async def wait(self, expression: str, timeout_s: float = 60.0) -> Any:
        """Poll an expression until it is true; fail with its last value and the page's text."""
        deadline = time.monotonic() + timeout_s
        while True:
            value = await self.run(expression)
            if value:
                return value
            if time.monotonic() > deadline:
                text = await self.run("document.body.innerText")
                raise AssertionError(
                    f"not within {timeout_s} s: {expression} (last: {value!r}); page:\n{text}"
                )
            await asyncio.sleep(0.05)

    async def click(self, selector: str) -> None:
        """Click the middle of the first element, as a pointer does; fails if something covers it."""
        await self.wait(f"document.querySelector({json.dumps(selector)}) !== null")
        place = await self.run(
            f"""(() => {{
                const node = document.querySelector({json.dumps(selector)});
                node.scrollIntoView({{block: "center"}});
                const box = node.getBoundingClientRect();
                const x = box.x + box.width / 2, y = box.y + box.height / 2;
                const top = document.elementFromPoint(x, y);
                return {{x, y, hit: node === top || node.contains(top)}};
            }})()"""
        )
        assert place["hit"], f"{selector} is covered"
        for kind in ("mousePressed", "mouseReleased"):
            await self.call(
                "Input.dispatchMouseEvent", type=kind, x=place["x"], y=place["y"], button="left", clickCount=1
            )

    async def fill(self, selector: str, text: str) -> None:
        """Replace the text of a field, with the keyboard's events."""
        await self.run(f"(n => {{ n.focus(); n.select(); }})(document.querySelector({json.dumps(selector)}))")
        await self.call("Input.insertText", text=text)

    async def screenshot(self, path: Path, *, width: int, height: int, dark: bool = False) -> None:
        """Save a PNG of the page at this size and colour scheme."""
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[scheme])
        answer = await self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(answer["data"]))

    @contextlib.asynccontextmanager
    async def suspended(self) -> AsyncIterator[None]:
        """Stop all of it, as phones do with tabs in the background. (A frozen page still hears messages.)"""
        stopped = None
        try:
            for process in await self._browser.renderers():
                os.kill(process, signal.SIGSTOP)
                stopped = process
                try:
                    # Which of the browser's processes it is, only its silence tells.
                    await asyncio.wait_for(self.run("1"), 3)
                except TimeoutError:
                    break
                os.kill(process, signal.SIGCONT)
                stopped = None
            assert stopped is not None, "no process of the browser runs this page"
            yield
        finally:
            if stopped is not None:
                os.kill(stopped, signal.SIGCONT)

    async def close(self) -> None:
        """Close the tab as a person does."""
        await self._browser.call("Target.closeTarget", {"targetId": self._target})


class Chromium:
    """The browser process and its DevTools connection."""

    async def __aenter__(self) -> Chromium:
        path = find_chromium()
        assert path is not None, "no Chromium in PATH: apt-get install chromium"
        self._profile = tempfile.mkdtemp(prefix="carillon-chromium-")
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.problems: list[str] = []
        """Uncaught exceptions and console errors of all pages."""
        arguments = ["--headless=new", "--remote-debugging-port=0", f"--user-data-dir={self._profile}"]
        arguments += ["--no-first-run", "--disable-gpu", "--disable-dev-shm-usage", "--disable-extensions"]
        # No network of its own: updates, metrics, the default page's services.
        arguments += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
        # A background tab must not be throttled, or several tabs in step cannot be tested.
        arguments += ["--disable-renderer-backgrounding", "--disable-background-timer-throttling"]
        arguments.append("--window-size=1280,900")  # a desktop's: what is on the screen counts as seen
        if os.geteuid() == 0:
            arguments.append("--no-sandbox")  # Chromium's sandbox refuses to run as root
        self._process = await asyncio.create_subprocess_exec(
            path,
            *arguments,
            "about:blank",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            url = await self._devtools_url()
            self._socket = await ws_client.connect(url, max_size=None, compression=None)
        except BaseException:
            await self._end()
            raise
        self._reader = asyncio.get_running_loop().create_task(self._read())
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)
        await self._socket.close()
        await self._end()

    async def _end(self) -> None:
        if self._process.returncode is None:
            self._process.terminate()
            try:
                await asyncio.wait_for(self._process.wait(), 10)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
        shutil.rmtree(self._profile, ignore_errors=True)

    async def _devtools_url(self) -> str:
        file = Path(self._profile, "DevToolsActivePort")
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            assert self._process.returncode is None, f"Chromium ended with {self._process.returncode}"
            lines = file.read_text().splitlines() if file.exists() else []
            if len(lines) >= 2:
                return f"ws://127.0.0.1:{lines[0]}{lines[1]}"
            await asyncio.sleep(0.05)
        raise AssertionError("Chromium did not open its DevTools port within 30 s")

    async def _read(self) -> None:
        async for text in self._socket:
            message = json.loads(text)
            if "id" in message:
                future = self._answers.pop(message["id"], None)
                if future is not None and not future.done():
                    future.set_result(message)
            elif message.get("method") == "Runtime.exceptionThrown":
                self.problems.append(json.dumps(message["params"]["exceptionDetails"])[:500])

    async def call(self, method: str, params: dict[str, Any], session: str | None = None) -> dict[str, Any]:
        """A DevTools command; raises AssertionError with the browser's message."""
        number = next(self._numbers)
        future = self._answers[number] = asyncio.get_running_loop().create_future()
        message = {"id": number, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        await self._socket.send(json.dumps(message))
        answer = await asyncio.wait_for(future, 30)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    async def renderers(self) -> list[int]:
        """The processes that run pages."""
        found = await self.call("SystemInfo.getProcessInfo", {})
        return [one["id"] for one in found["processInfo"] if one["type"] == "renderer"]

    async def open(self, url: str) -> Tab:
        """A new tab, shown and focused."""
        target = (await self.call("Target.createTarget", {"url": "about:blank"}))["targetId"]
        session = (await self.call("Target.attachToTarget", {"targetId": target, "flatten": True}))[
            "sessionId"
        ]
        tab = Tab(self, target, session)
        await tab.call("Runtime.enable")
        await tab.call("Page.enable")
        await tab.call("Emulation.setFocusEmulationEnabled", enabled=True)
        await tab.call("Page.navigate", url=url)
        await tab.wait("document.readyState === 'complete' && location.href !== 'about:blank'")
        return tab
