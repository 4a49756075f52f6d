"""The archive's clock, beside the coordinator: a run once a day, and erasures soon after they were asked for.

There is one coordinator; should there be two for a moment, the run's advisory lock lets only one of them
work. A run that was cut off (its beginning is noted, its end is not) is taken up at the next look, by
whoever is coordinator then.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import asyncpg

from carillon.clock import Clock
from carillon.errors import ArchiveError, BusyError, StoreUnavailableError
from carillon.retention import parse_time_of_day, run_is_due
from carillon.settings import Settings
from stores.archiver import Archiver

log = logging.getLogger(__name__)


class ArchiveJob:
    """Looks every `archive.poll_s` whether something is due."""

    def __init__(self, settings: Settings, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock
        self._error = ""

    async def run_for_ever(self) -> None:
        """Look, again and again. What goes wrong is logged, once while it stays the same."""
        while True:
            try:
                await self.look()
                self._error = ""
            except BusyError:
                pass  # somebody runs it by hand
            except (ArchiveError, StoreUnavailableError, asyncpg.PostgresError) as exc:
                if str(exc) != self._error:
                    log.warning("the archive has to wait: %s", exc)
                self._error = str(exc)
            await asyncio.sleep(self._settings.archive.poll_s)

    async def look(self) -> bool:
        """Do what is due; True if that was a whole run.

        Raises:
            ArchiveError, StoreUnavailableError, BusyError: see `Archiver.run`.
        """
        archiver = await Archiver.open(self._settings, self._clock)
        try:
            erased = (await archiver.erase_asked()).erased
            if erased:
                log.info("the archive: %d users erased", erased)
            if not self._settings.archive.run_at or not await self._is_due(archiver):
                return False
            async with archiver.store.running():
                pass  # taken: the one who runs notes it
            began_ms = self._clock.now_ms()
            await archiver.store.ran({"beganMs": began_ms})
            told: dict[str, Any] = {"beganMs": began_ms}
            try:
                report = await archiver.run()
                told |= {"archived": report.archived, "left": report.left}
                log.info("the archive: %s", report.words())
                for one in report.left:
                    log.warning("the archive leaves for the next run: %s", one)
            except ArchiveError as exc:
                told["error"] = str(exc)  # it would fail the same way: tomorrow again
                raise
            finally:
                if "archived" in told or "error" in told:
                    await archiver.store.ran(told | {"endedMs": self._clock.now_ms()})
            return True
        finally:
            await archiver.close()

    async def _is_due(self, archiver: Archiver) -> bool:
        last = await archiver.store.last_run()
        now_ms = self._clock.now_ms()
        if not last:
            # The first time comes round tonight, not now: a system that was just set up has other things to
            # do.
            await archiver.store.ran({"beganMs": now_ms, "endedMs": now_ms})
            return False
        at_ms = parse_time_of_day(self._settings.archive.run_at)
        return last.get("endedMs") is None or run_is_due(now_ms, at_ms, last["beganMs"])
