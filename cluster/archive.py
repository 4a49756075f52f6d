"""`python -m cluster archive ...`: the archive, straight at the database and the files."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import uuid
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

from carillon.archive import Archived, Part, Search, created_ms
from carillon.clock import SystemClock, rfc3339
from carillon.errors import ClusterError, InvalidInputError
from carillon.ids import parse_uuid
from carillon.retention import Month, parse_month
from carillon.settings import Settings
from cluster.admin import database, login
from stores.archiver import Archiver
from stores.postgres.pool import open_pool
from stores.postgres.tenants import TenantStore

T = TypeVar("T")


def _with_archive(
    options: argparse.Namespace, settings: Settings, work: Callable[[Archiver], Awaitable[T]]
) -> T:
    settings = database(options, settings)
    if options.root is not None:
        settings = settings.with_values(archive={"root": options.root})
    quiet = getattr(options, "quiet", True)

    async def run() -> T:
        def progress(line: str) -> None:
            if not quiet:
                print(line, file=sys.stderr)

        archiver = await Archiver.open(settings, SystemClock(), progress)
        try:
            return await work(archiver)
        finally:
            await archiver.close()

    return asyncio.run(run())


async def _noted(
    options: argparse.Namespace, settings: Settings, action: str, target: str, **detail: Any
) -> None:
    """Who did it goes into the audit."""
    pool = await open_pool(database(options, settings).postgres, 1)
    try:
        await TenantStore(pool).record_audit(options.tenant, f"cli:{login()}", action, target, **detail)
    finally:
        await pool.close()


def _month(options: argparse.Namespace) -> Month | None:
    if options.month is None:
        return None
    try:
        return parse_month(options.month)
    except InvalidInputError as exc:
        raise ClusterError(f"--month: {exc}") from None


def _time_ms(name: str, text: str | None) -> int | None:
    if text is None:
        return None
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise ClusterError(
            f"expected {name} to be like 2026-03-01 or 2026-03-01T12:00:00Z, got {text!r}"
        ) from None
    return round((at if at.tzinfo is not None else at.replace(tzinfo=UTC)).timestamp() * 1000)


def size(count: float) -> str:
    """A number of bytes for people: "12.3 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _run(options: argparse.Namespace, settings: Settings) -> int:
    async def look(archiver: Archiver) -> int:
        total = 0
        for tenant, month, count in await archiver.due(options.tenant):
            if count:
                print(f"{tenant}  {month}  {count} notifications")
                total += count
        print(f"{total} notifications would be archived to {archiver.files.root}; nothing was changed")
        return 0

    async def work(archiver: Archiver) -> int:
        report = await archiver.run(options.tenant)
        print(report.words())
        for one in report.left:
            print(f"carillon: left for the next run: {one}", file=sys.stderr)
        return 1 if report.left else 0

    return _with_archive(options, settings, look if options.dry_run else work)


def _list(options: argparse.Namespace, settings: Settings) -> int:
    parts = _with_archive(
        options, settings, lambda archiver: archiver.store.parts(options.tenant, _month(options))
    )
    if options.json:
        print(json.dumps([_told(part) for part in parts], indent=1))
        return 0
    months: dict[tuple[str, Month], list[Part]] = {}
    for part in parts:
        months.setdefault((part.tenant, part.month), []).append(part)
    for (tenant, month), some in sorted(months.items()):
        print(
            f"{tenant}  {month}  {sum(p.rows for p in some)} notifications  {len(some)} parts"
            f"  {size(sum(p.file_bytes for p in some))} of {size(sum(p.raw_bytes for p in some))}"
        )
    if not parts:
        print("nothing is archived", file=sys.stderr)
    return 0


def _told(part: Part) -> dict[str, Any]:
    told = part._asdict() | {"month": str(part.month), "path": part.path}
    return {name: str(value) if isinstance(value, uuid.UUID) else value for name, value in told.items()}


def _search(options: argparse.Namespace, settings: Settings) -> int:
    raw = None
    if options.id is not None:
        raw = parse_uuid(options.id)
        if raw is None:
            raise ClusterError(f"expected --id to be a UUID, got {options.id!r}")
    wanted = Search(
        options.user,
        None if raw is None else uuid.UUID(bytes=raw),
        options.type,
        options.text,
        _time_ms("--since", options.since),
        _time_ms("--until", options.until),
    )
    month = _month(options)

    async def work(archiver: Archiver) -> int:
        found = 0
        async for _, one in archiver.search(options.tenant, wanted, month):
            if options.limit and found == options.limit:
                print(f"there are more than {found}: see --limit", file=sys.stderr)
                break
            found += 1
            print(json.dumps(one._asdict(), ensure_ascii=False) if options.json else _words(one))
        if not found:
            print("nothing was found", file=sys.stderr)
        return 0

    return _with_archive(options, settings, work)


def _words(one: Archived) -> str:
    title = one.content().get("title") or ""
    sent = ",".join(f"{d['channel']}:{d['state']}" for d in one.deliveries) or "-"
    at = rfc3339(created_ms(one))
    return f"{one.id}  {at}  {one.user}  {one.notification['type']}  {sent}  {title}"


def _restore(options: argparse.Namespace, settings: Settings) -> int:
    month = _month(options)
    if month is None and options.user is None:
        print("carillon: expected --month, --user or both", file=sys.stderr)
        return 2

    async def look(archiver: Archiver) -> int:
        count = 0
        async for _, _one in archiver.search(options.tenant, Search(options.user), month):
            count += 1
        print(f"{count} notifications would be restored; nothing was changed")
        return 0

    async def work(archiver: Archiver) -> int:
        restored = await archiver.restore(options.tenant, month, options.user)
        await _noted(
            options, settings, "archive.restore", options.user or "", month=options.month, rows=restored.rows
        )
        print(
            f"{restored.rows} notifications restored; they stay for"
            f" {settings.archive.restored_days:g} days at least"
        )
        if restored.skipped:
            print(
                f"{restored.skipped} stay in the archive: their users were erased, or begun anew, since",
                file=sys.stderr,
            )
        return 0

    return _with_archive(options, settings, look if options.dry_run else work)


def _verify(options: argparse.Namespace, settings: Settings) -> int:
    month = _month(options)

    async def work(archiver: Archiver) -> int:
        wrong = 0
        async for finding in archiver.verify(options.tenant, month):
            print(finding)
            wrong += 1
        parts = await archiver.store.parts(options.tenant, month)
        rows = sum(part.rows for part in parts)
        print(f"{len(parts)} parts with {rows} notifications: {wrong or 'no'} problems")
        return 1 if wrong else 0

    return _with_archive(options, settings, work)


def _erase(options: argparse.Namespace, settings: Settings) -> int:
    async def work(archiver: Archiver) -> int:
        gone = await archiver.erase_user(options.tenant, options.user)
        await _noted(options, settings, "archive.erase", options.user, rows=gone)
        return gone

    print(f"{_with_archive(options, settings, work)} archived notifications erased")
    return 0


HANDLERS: Final = {
    "archive_run": _run,
    "archive_list": _list,
    "archive_search": _search,
    "archive_restore": _restore,
    "archive_verify": _verify,
    "archive_erase": _erase,
}
"""By the name that cluster/cli.py uses."""
