"""The archive at work: tables to files, and back (docs/adr/0014-archives-as-compressed-json-lines.md).

Each step is safe to be cut off anywhere. A part is announced in `archive_parts`, its file is written,
synced, read back and compared, its manifest written; then one transaction takes exactly those rows out of
the tables and declares the part complete. So a notification is in Postgres until that commit and in the
archive from then on. What was announced and never completed is removed by whoever comes next; the same for
parts that others superseded.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import asyncpg

from carillon.archive import (
    DATA,
    MANIFEST,
    Archived,
    Line,
    Part,
    Search,
    describe,
    join_lines,
    part_path,
    read_line,
)
from carillon.clock import Clock
from carillon.errors import ArchiveError, BusyError, StoreUnavailableError
from carillon.retention import (
    DAY_MS,
    Month,
    PartSize,
    is_due,
    least_id,
    month_of,
    plan_merges,
    plan_rewrites,
    retention_days,
)
from carillon.settings import Settings
from stores.archive_files import ArchiveFiles
from stores.postgres.archive import ArchiveStore, ChangedError, DueRow
from stores.postgres.partitions import LockedError, rewrite, tidy

log = logging.getLogger(__name__)

_USERS: Final = 1000
"""Users whose rows are asked for at once."""
_TRIES: Final = 5
"""How often a batch that changes while it is archived is tried again; then the month waits for the next
run."""
_PRUNED: Final = 5000
"""Rows of other tables that are deleted at a time."""


@dataclass
class RunReport:
    """What a run did."""

    archived: int = 0
    """Notifications that moved to the archive."""
    parts: int = 0
    """Parts written, before they were merged."""
    erased: int = 0
    """Users whose archived notifications were erased."""
    exposures: int = 0
    audit: int = 0
    rewritten: list[str] = field(default_factory=list)
    """Partitions that gave way to smaller ones, or went."""
    left: list[str] = field(default_factory=list)
    """What has to wait for the next run, and why."""

    def words(self) -> str:
        """One sentence."""
        told = f"{self.archived} notifications archived"
        if self.erased:
            told += f", {self.erased} users erased"
        if self.rewritten:
            told += f", partitions written anew or dropped: {', '.join(self.rewritten)}"
        if self.exposures or self.audit:
            told += f", {self.exposures} exposures and {self.audit} audit records dropped"
        return told


@dataclass
class Restored:
    """What a restore did."""

    rows: int = 0
    skipped: int = 0
    """Of users who were erased or made anew since: their numbers would clash with those of today."""


async def _no_step(_: str) -> None:
    """Nothing happens between steps."""


class Archiver:
    """Runs, searches, restores and erases.

    Args:
        store: with a connection of its own.
        files: the archive's root.
        progress: told what is going on, a line at a time.

    All methods raise StoreUnavailableError while Postgres does not answer, ArchiveError if the root or a
    part is not as it should be, and BusyError if another run is in the way.
    """

    def __init__(
        self,
        store: ArchiveStore,
        files: ArchiveFiles,
        settings: Settings,
        clock: Clock,
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.store = store
        self.files = files
        self._settings = settings.archive
        self._clock = clock
        self._progress = progress
        self.step = _no_step
        """Awaited between any two steps; tests stop there."""

    @classmethod
    async def open(
        cls, settings: Settings, clock: Clock, progress: Callable[[str], None] = lambda _: None
    ) -> Archiver:
        """Connect to Postgres and to the root."""
        files = ArchiveFiles(root_of(settings), settings.archive.level)
        return cls(await ArchiveStore.open(settings.postgres), files, settings, clock, progress)

    async def close(self) -> None:
        """Close the connection."""
        await self.store.close()

    # -- the run ----------------------------------------------------------------------------------------

    async def due(self, only: str | None = None) -> list[tuple[str, Month, int]]:
        """What a run would look at: (tenant, month, notifications that would go)."""
        found: list[tuple[str, Month, int]] = []
        for tenant, month, days in await self._due(only):
            before_ms = self._clock.now_ms() - days * DAY_MS
            found.append((tenant, month, await self.store.count_due(tenant, month, before_ms)))
        return found

    async def run(self, only: str | None = None) -> RunReport:
        """Move what is due, erase what is to be erased, and give the room back.

        Idempotency: whatever was cut off is taken up; a run with nothing to do changes nothing.

        Args:
            only: this tenant; None: all of them, and the other tables.
        """
        report = RunReport()
        async with self.store.running():
            await self._tidy()
            await self._erase_all(report)
            for tenant, month, days in await self._due(only):
                await self._archive(tenant, month, days, report)
            if only is None:
                await self._prune(report)
                await self._rewrite_partitions(report)
        return report

    async def _due(self, only: str | None) -> list[tuple[str, Month, int]]:
        now_ms = self._clock.now_ms()
        days = {
            tenant: retention_days(policy, self._settings.retention_days)
            for tenant, policy in (await self.store.tenants()).items()
            if only is None or tenant == only
        }
        shortest = min((some for some in days.values() if some), default=0)
        if not shortest:
            return []
        months: list[Month] = []
        at, end = least_id(0), least_id(max(0, now_ms - shortest * DAY_MS))
        while (found := await self.store.next_id(at, end)) is not None:
            months.append(month_of(found.bytes))
            at = months[-1].high
        waiting = await self.store.passes(now_ms)
        return [
            (tenant, month, some)
            for tenant, some in days.items()
            for month in months
            if is_due(month, now_ms, some) and (tenant, month) not in waiting
        ]

    async def _archive(self, tenant: str, month: Month, days: int, report: RunReport) -> None:
        """One month of a tenant."""
        before_ms = self._clock.now_ms() - days * DAY_MS
        before = report.archived
        whole = False
        for _ in range(_TRIES):
            whole = await self._pass(tenant, month, before_ms, report)
            if whole:
                break
        await self._merge(tenant, month)
        if whole:
            next_ms = self._clock.now_ms() + round(self._settings.revisit_days * DAY_MS)
            await self.store.passed(tenant, month, next_ms)
        else:
            report.left.append(f"{month} of {tenant}: its rows are being changed")
        if report.archived > before:
            self._progress(f"{tenant} {month}: {report.archived - before} notifications archived")

    async def _pass(self, tenant: str, month: Month, before_ms: int, report: RunReport) -> bool:
        """Go once through the users of a tenant; False if some rows changed while they were archived."""
        most, most_bytes = self._settings.batch_rows, self._settings.batch_bytes
        held: list[DueRow] = []
        held_bytes = 0
        after: str | None = None
        whole = True

        async def move() -> bool:
            nonlocal held, held_bytes, whole
            some, held, held_bytes = held, [], 0
            moved = await self._step_of(tenant, month, some)
            report.archived += moved
            report.parts += bool(moved)
            whole = whole and bool(moved)
            return bool(moved)

        while users := await self.store.users(tenant, after, _USERS):
            after = users[-1][1]
            streams = [stream for stream, _ in users]
            while True:
                for row in await self.store.due(streams, month, before_ms, most - len(held)):
                    held.append(row)
                    held_bytes += len(row.line.raw)
                    if held_bytes >= most_bytes:
                        break  # the rest is read again
                if len(held) < most and held_bytes < most_bytes:
                    break  # these users have no more: the next ones fill it
                if not await move():
                    break
        if held:
            await move()
        return whole

    async def _step_of(self, tenant: str, month: Month, rows: Sequence[DueRow]) -> int:
        """Move some rows into a part of their own; 0 if they changed meanwhile. Pauses afterwards."""
        began = self._clock.monotonic()
        lines = [row.line for row in rows]
        moved = 0
        async with self.store.changing():
            try:
                part = await self._write(tenant, month, lines)
                await self.store.tell_pruned(rows)
                await self.step("told")
                await self.store.take_out(part, lines)
                moved = len(lines)
            except ChangedError:
                await self._remove_unfinished()
            await self.step("taken out")
        took_s = self._clock.monotonic() - began
        await asyncio.sleep(max(self._settings.pause_s, took_s if self._settings.pause_s else 0.0))
        return moved

    async def _write(self, tenant: str, month: Month, lines: Sequence[Line]) -> Part:
        """Announce a part and write it; it is not complete yet."""
        raw = join_lines(lines)
        part = describe(uuid.uuid4(), tenant, month, lines, raw, self._clock.now_ms())
        await self.store.intend(part.part, tenant, month, part.created_ms)
        await self.step("announced")
        whole = await asyncio.to_thread(self.files.write, part, list(lines), raw)
        await self.step("written")
        return whole

    async def _tidy(self) -> None:
        """Remove what a run that was cut off left behind."""
        async with self.store.changing():
            await self._remove_unfinished()

    async def _remove_unfinished(self) -> None:
        for part, tenant, month in await self.store.unfinished():
            await asyncio.to_thread(self.files.remove, part_path(tenant, month, part))
            await self.step("removed")
            await self.store.forget(part)

    async def _merge(self, tenant: str, month: Month) -> None:
        """Small parts of a month become large ones."""
        parts = {one.part: one for one in await self.store.parts(tenant, month)}
        sizes = [PartSize(one.part, one.first_user, one.raw_bytes) for one in parts.values()]
        for group in plan_merges(sizes, self._settings.part_bytes):
            async with self.store.changing():
                old = [parts[key] for key in group]
                try:
                    lines = [line for one in old for line in await asyncio.to_thread(self.files.read, one)]
                except ArchiveError as exc:
                    if {one.part for one in await self.store.parts(tenant, month)} >= set(group):
                        raise
                    log.info("parts changed before they were merged: %s", exc)
                    return
                await self._exchange(old, [lines])

    async def _exchange(self, old: Sequence[Part], new: Sequence[Sequence[Line]]) -> list[Part]:
        """Old parts give way to parts with these lines (empty ones are left out)."""
        made = [await self._write(old[0].tenant, old[0].month, some) for some in new if some]
        try:
            await self.store.swap(made, old)
        except ChangedError:
            await self._remove_unfinished()
            raise ArchiveError(f"{old[0].path} was changed by somebody else") from None
        await self.step("exchanged")
        await self._remove_unfinished()
        return made

    async def _prune(self, report: RunReport) -> None:
        now_ms, settings = self._clock.now_ms(), self._settings
        if settings.exposures_days:
            while gone := await self.store.prune_exposures(
                now_ms - settings.exposures_days * DAY_MS, _PRUNED
            ):
                report.exposures += gone
                await asyncio.sleep(settings.pause_s)
        if settings.audit_days:
            while gone := await self.store.prune_audit(now_ms - settings.audit_days * DAY_MS, _PRUNED):
                report.audit += gone
                await asyncio.sleep(settings.pause_s)

    async def _rewrite_partitions(self, report: RunReport) -> None:
        settings = self._settings

        async def between(name: str) -> None:
            await self.step(name)
            if name == "copying":
                await asyncio.sleep(settings.pause_s)

        try:
            await tidy(self.store.connection)
            plans = list(
                plan_rewrites(await self.store.partitions(), self._clock.now_ms(), settings.merge_rows)
            )
            for plan in plans:
                names = ", ".join(one.name for one in plan.sources)
                try:
                    kept = await rewrite(
                        self.store.connection,
                        plan,
                        between,
                        batch=settings.batch_rows,
                        lock_wait_s=settings.lock_wait_s,
                        lock_tries=settings.lock_tries,
                        lock_pause_s=settings.lock_pause_s,
                    )
                except (LockedError, asyncpg.LockNotAvailableError) as exc:
                    report.left.append(str(exc))
                    await tidy(self.store.connection)
                    continue
                report.rewritten.append(names)
                into = f"{kept} rows kept in {plan.target}" if plan.target else "nothing kept"
                self._progress(f"{names}: {into}")
        except asyncpg.LockNotAvailableError as exc:
            report.left.append(f"partitions are locked by others: {exc}")
        except (asyncpg.PostgresConnectionError, asyncpg.InterfaceError, OSError) as exc:
            raise StoreUnavailableError(f"PostgreSQL does not answer: {type(exc).__name__}: {exc}") from exc

    # -- erasure ----------------------------------------------------------------------------------------

    async def erase_user(self, tenant: str, user: str) -> int:
        """Erase what is archived of a user: parts are written anew without it. Returns how many
        notifications.

        Durability: the wish is kept first; whoever runs next carries out what is cut off here.
        """
        await self.store.ask_erasure(tenant, user)
        asked_at = {(t, u): at for t, u, at in await self.store.erasures()}[tenant, user]
        return await self._erase(tenant, user, asked_at)

    async def erase_asked(self) -> RunReport:
        """Carry out the erasures that were asked for."""
        report = RunReport()
        if await self.store.erasures():
            await self._tidy()
            await self._erase_all(report)
        return report

    async def _erase_all(self, report: RunReport) -> None:
        for tenant, user, asked_at in await self.store.erasures():
            try:
                gone = await self._erase(tenant, user, asked_at)
            except ArchiveError as exc:  # one damaged part is no reason to keep the others
                report.left.append(f"the erasure of a user of {tenant}: {exc}")
                continue
            report.erased += 1
            self._progress(f"{tenant}: {gone} archived notifications of a user erased")

    async def _erase(self, tenant: str, user: str, asked_at: object) -> int:
        gone = 0
        async with self.store.changing():
            for part in await self.store.parts(tenant, user=user):
                lines = await asyncio.to_thread(self.files.read, part)
                kept = [line for line in lines if line.user != user]
                if len(kept) < len(lines):
                    await self._exchange([part], [kept])
                    gone += len(lines) - len(kept)
            await self._remove_unfinished()
            await self.store.erased(tenant, user, asked_at)
        return gone

    # -- reading ----------------------------------------------------------------------------------------

    async def search(
        self, tenant: str, wanted: Search, month: Month | None = None
    ) -> AsyncIterator[tuple[Part, Archived]]:
        """What is archived of a tenant, by month and user. Users who are to be erased are left out
        already."""
        hidden = {user for whose, user, _ in await self.store.erasures() if whose == tenant}
        for part in await self.store.parts(tenant, month, wanted.user, wanted.id):
            if not wanted.may_hold(part):
                continue
            for found in await asyncio.to_thread(self._found, part, wanted):
                if found.user not in hidden:
                    yield part, found

    def _found(self, part: Part, wanted: Search) -> list[Archived]:
        found: list[Archived] = []
        for line in self.files.read(part):
            if wanted.matches_head(line):
                read = read_line(line.raw)
                if wanted.matches(read):
                    found.append(read)
        return found

    async def verify(self, tenant: str | None = None, month: Month | None = None) -> AsyncIterator[str]:
        """What is wrong with the archive, a sentence each; nothing if all is well.

        Every part is read whole: checksum, number of lines, tenant and month of each, its manifest, and that
        none of them is in the tables as well.
        """
        known = await self.store.parts(tenant, month)
        for part in known:
            self._progress(f"{part.path}: {part.rows} notifications")
            try:
                lines = await asyncio.to_thread(self.files.read, part)
                if await asyncio.to_thread(self.files.read_manifest, part.path) != part:
                    yield f"{part.path}{MANIFEST} differs from what the database knows"
            except ArchiveError as exc:
                yield str(exc)
                continue
            ids = [line.id for line in lines]
            if len(set(ids)) != len(ids):
                yield f"{part.path}{DATA} holds notifications twice"
            if any(month_of(one.bytes) != part.month for one in ids):
                yield f"{part.path}{DATA} holds notifications of another month"
            for at in range(0, len(ids), 1000):
                twice = await self.store.stored(ids[at : at + 1000])
                if twice:
                    yield f"{part.path}{DATA}: {len(twice)} notifications are in the tables as well"
        if tenant is None and month is None:
            expected = {one.path + ending for one in known for ending in (DATA, MANIFEST)}
            pending = {part_path(whose, of, part) for part, whose, of in await self.store.unfinished()}
            for path in await asyncio.to_thread(self.files.paths):
                if path not in expected and path.partition(".")[0] not in pending:
                    yield f"{path} is no part that the database knows"

    # -- back -------------------------------------------------------------------------------------------

    async def restore(self, tenant: str, month: Month | None = None, user: str | None = None) -> Restored:
        """Archived notifications become rows again, with deliveries and tries, and leave the archive.

        They are not counted as unread (they had been read), and their months are left alone for
        `archive.restored_days`. Idempotency: what was restored already is not in the archive any more.
        """
        report = Restored()
        hidden = {whose for of, whose, _ in await self.store.erasures() if of == tenant}
        await self._tidy()
        months: set[Month] = set()
        for found in await self.store.parts(tenant, month, user):
            waiting = [found]
            while waiting:
                part = waiting.pop()
                began = self._clock.monotonic()
                async with self.store.changing():
                    waiting += await self._restore(part, user, hidden, report)
                months.add(part.month)
                took_s = self._clock.monotonic() - began
                await asyncio.sleep(max(self._settings.pause_s, took_s if self._settings.pause_s else 0.0))
            self._progress(f"{found.path}: {report.rows} notifications restored so far")
        return report

    async def _restore(self, part: Part, user: str | None, hidden: set[str], report: Restored) -> list[Part]:
        """Restore a small part, or take what is wanted of a large one apart. Returns parts still to
        restore."""
        lines = await asyncio.to_thread(self.files.read, part)
        wanted: list[Line] = []
        rest: list[Line] = []
        streams = await self.store.streams_of(part.tenant, sorted({line.user for line in lines}))
        for line in lines:
            if user is not None and line.user != user:
                rest.append(line)
            elif (
                line.user in hidden or streams.get(line.user) != read_line(line.raw).notification["stream_id"]
            ):
                rest.append(line)
                report.skipped += 1
            else:
                wanted.append(line)
        if not wanted:
            return []
        next_ms = self._clock.now_ms() + round(self._settings.restored_days * DAY_MS)
        await self.store.passed(part.tenant, part.month, next_ms)  # before: a run must not take them at once
        size = self._settings.batch_rows
        if len(wanted) > size:
            pieces = [wanted[at : at + size] for at in range(0, len(wanted), size)]
            made = await self._exchange([part], [rest, *pieces])
            return made[1 if rest else 0 :]
        new = [await self._write(part.tenant, part.month, rest)] if rest else []
        try:
            report.rows += await self.store.put_back(part, new, [read_line(line.raw) for line in wanted])
        except ChangedError:
            await self._remove_unfinished()
            raise BusyError(f"{part.path} was changed by somebody else") from None
        await self.step("put back")
        await self._remove_unfinished()
        return []


def root_of(settings: Settings) -> str:
    """The archive's root."""
    return settings.archive.root or str(Path(settings.cluster.runtime_dir).resolve() / "archive")
