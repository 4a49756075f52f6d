"""Retention and archive on a real Postgres and real files."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from carillon.errors import ArchiveError, BusyError, UnavailableError
from carillon.retention import Month
from stores.archive_export import ArchiveExport
from stores.postgres.export import Exporter
from stores.postgres.named import load_queries
from stores.postgres.pool import open_pool
from tests.integration.archive_world import APRIL, CARRIED, FEBRUARY, MARCH, NOW, ArchiveWorld


@pytest.fixture
async def world(postgres_dsn: str, tmp_path: Path) -> AsyncIterator[ArchiveWorld]:
    made = ArchiveWorld(postgres_dsn, tmp_path, batch_rows=4)
    await made.open()
    for month in (FEBRUARY, MARCH, APRIL):
        await made.month_partition(month)
    yield made
    await made.close()


async def test_what_was_read_and_is_old_moves_to_the_archive(world: ArchiveWorld) -> None:
    """Read rows of months past retention go with deliveries, tries and exposures; unread, pending and younger
    ones stay; the archive is whole, and a second run finds nothing to do."""
    await world.tenant("acme")
    old = await world.add("acme", "ada", FEBRUARY, 9, exposed=True)
    unread = await world.add("acme", "ada", FEBRUARY, 2, read=False)
    pending = await world.add("acme", "bob", FEBRUARY, 1, push="planned")
    plain = await world.add("acme", "bob", FEBRUARY, 1, push=None)
    young = await world.add("acme", "ada", APRIL, 2)
    report = await world.run()
    assert (report.archived, report.left) == (10, [])
    assert await world.stored() == {*unread, *pending, *young}
    assert sorted(await world.archived()) == sorted([*old, *plain])
    assert await world.db.fetchval("select count(*) from delivery_attempts") == 5
    assert await world.db.fetchval("select count(*) from template_exposures") == 0
    assert await world.findings() == []
    names = sorted(str(p.relative_to(world.root)) for p in world.root.rglob("*") if p.is_file())
    assert all(name.startswith("tenant=acme/month=2026-02/part-") for name in names)
    assert len(names) == 2, "small parts were merged into one"
    again = await world.run()
    assert (again.archived, again.rewritten) == (0, [])
    assert sorted(str(p.relative_to(world.root)) for p in world.root.rglob("*") if p.is_file()) == names


async def test_restored_rows_are_as_they_were(world: ArchiveWorld) -> None:
    """Archive, then restore: every column of every table is as before, and the archive is empty."""
    await world.tenant("acme")
    await world.add("acme", "ada", FEBRUARY, 7, exposed=True)
    await world.add("acme", "bob", FEBRUARY, 3)
    before = await world.content()
    assert (await world.run()).archived == 10
    assert (await world.content())["notifications"] == []
    archiver = await world.archiver()
    restored = await archiver.restore("acme", FEBRUARY)
    assert (restored.rows, restored.skipped) == (10, 0)
    assert await world.content() == before
    assert await world.archived() == []
    assert await world.findings() == []
    assert (await archiver.restore("acme", FEBRUARY)).rows == 0
    await archiver.close()
    assert (await world.run()).archived == 0, "a restored month stays for a while"
    world.clock.advance(31 * 86_400)
    assert (await world.run()).archived == 10


async def test_one_user_is_restored_alone(world: ArchiveWorld) -> None:
    """The others stay in the archive."""
    await world.tenant("acme")
    ada = await world.add("acme", "ada", FEBRUARY, 11)
    bob = await world.add("acme", "bob", FEBRUARY, 3)
    await world.run()
    archiver = await world.archiver()
    assert (await archiver.restore("acme", user="ada")).rows == 11
    await archiver.close()
    assert await world.stored() == set(ada)
    assert sorted(await world.archived()) == bob
    assert await world.findings() == []


async def test_rows_of_a_user_made_anew_are_not_restored(world: ArchiveWorld) -> None:
    """Their numbers would clash with those of the new stream: they are skipped, and stay archived."""
    await world.tenant("acme")
    ids = await world.add("acme", "ada", FEBRUARY, 3)
    await world.run()
    await world.db.execute("delete from streams")
    await world.add("acme", "ada", APRIL, 1)
    archiver = await world.archiver()
    restored = await archiver.restore("acme")
    await archiver.close()
    assert (restored.rows, restored.skipped) == (0, 3)
    assert sorted(await world.archived()) == ids


async def test_erasing_a_user_rewrites_its_parts(world: ArchiveWorld) -> None:
    """Nothing of the user is left in any file; others are untouched; a wish from outside is carried out by a
    run."""
    await world.tenant("acme")
    await world.add("acme", "ada", FEBRUARY, 6)
    bob = await world.add("acme", "bob", FEBRUARY, 3)
    await world.add("other", "ada", FEBRUARY, 2)
    await world.run()
    archiver = await world.archiver()
    assert await archiver.erase_user("acme", "ada") == 6
    assert sorted(await world.archived()) == bob
    assert len(await world.archived("other")) == 2
    assert await world.findings() == []
    await archiver.store.ask_erasure("acme", "bob")
    assert await world.archived() == [], "left out at once"
    assert (await archiver.run()).erased == 1
    await archiver.close()
    assert not list((world.root / "tenant=acme").rglob("part-*")), "an empty part goes"
    assert await world.findings() == []


async def test_search_by_user_text_type_and_time(world: ArchiveWorld) -> None:
    """Each narrows what is found."""
    await world.tenant("acme")
    a = await world.add("acme", "ada", FEBRUARY, 2, title="Train to Graz is late")
    b = await world.add("acme", "bob", FEBRUARY, 1, type="chat", body="see you in Graz")
    c = await world.add("acme", "ada", MARCH, 1, day=20, type="chat")
    world.clock.advance(60 * 86_400)
    await world.run()
    assert sorted(await world.archived()) == [*a, *b, *c]
    assert sorted(await world.archived(user="ada")) == [*a, *c]
    assert sorted(await world.archived(text="graz")) == [*a, *b]
    assert sorted(await world.archived(text="lat gra")) == a
    assert sorted(await world.archived(type="chat")) == [*b, *c]
    assert await world.archived(id=b[0]) == b
    assert await world.archived(since_ms=MARCH.start_ms) == c
    assert sorted(await world.archived(until_ms=MARCH.start_ms)) == [*a, *b]
    assert await world.archived(user="zoe") == []
    assert await world.archived("none") == []


async def test_tenants_have_their_own_retention(world: ArchiveWorld) -> None:
    """retentionDays of a policy goes before the setting; 0 keeps everything."""
    await world.tenant("short", retentionDays=30)
    await world.tenant("long", retentionDays=365)
    await world.tenant("ever", retentionDays=0)
    await world.tenant("plain")
    for tenant in ("short", "long", "ever", "plain"):
        await world.add(tenant, "ada", FEBRUARY, 1)
        await world.add(tenant, "ada", APRIL, 1)
    await world.run()
    left = {t: await world.db.fetchval(
        "select count(*) from notifications join streams using (stream_id) where tenant = $1", t)
        for t in ("short", "long", "ever", "plain")}  # fmt: skip
    assert left == {"short": 0, "long": 2, "ever": 2, "plain": 1}


async def test_partitions_give_their_room_back(world: ArchiveWorld) -> None:
    """An old month that is empty goes; one with kept rows becomes a small one; this and the last month stay;
    rows and indexes are whole, and the partitions are found again next month."""
    await world.tenant("acme")
    await world.add("acme", "ada", FEBRUARY, 5)
    kept = await world.add("acme", "ada", MARCH, 2, read=False)
    await world.add("acme", "ada", MARCH, 8)
    young = await world.add("acme", "ada", APRIL, 1)
    before = await world.partitions()
    world.clock.advance(30 * 86_400)  # March is due, April is not
    report = await world.run()
    assert set(report.rewritten) == {"notifications_2026_02", "notifications_2026_03"}
    after = await world.partitions()
    assert before - after == {"notifications_2026_02", "notifications_2026_03"}
    assert after - before == {"notifications_kept_2026_03"}
    assert await world.stored() == {*kept, *young}
    indexes = {
        name: {re.sub(r"(INDEX )\S+( ON )\S+", r"\1\2", r[0]) for r in await world.db.fetch(
            "select indexdef from pg_indexes where tablename = $1", name)}
        for name in ("notifications_kept_2026_03", "notifications_2026_04")
    }  # fmt: skip
    assert len(indexes["notifications_kept_2026_03"]) > 5
    assert indexes["notifications_kept_2026_03"] == indexes["notifications_2026_04"]
    await world.db.execute("update notifications set read_at = now()")
    report = await world.run()
    assert (report.archived, report.rewritten) == (2, ["notifications_kept_2026_03"])
    assert await world.stored() == set(young)
    left = await world.db.fetch(
        "select relname from pg_class where relname like 'notifications%next%' or relname like '%_old_%'"
    )
    assert [r for r in left if not r[0].startswith("notifications_next_")] == []


async def test_months_of_a_year_become_one(world: ArchiveWorld) -> None:
    """A year that has been over for a year is one partition, what the default partition held of it
    included."""
    months = [Month(2024, 11), Month(2024, 12)]
    for month in months:
        await world.month_partition(month)
    kept = [
        one
        for month in (Month(2024, 10), *months)
        for one in await world.add("acme", "ada", month, 2, read=False)
    ]
    report = await world.run()
    assert report.rewritten == [
        "notifications_2026_02", "notifications_2026_03", "notifications_2026_04",
        "notifications_2024_11, notifications_2024_12",
    ]  # fmt: skip
    names = await world.partitions()
    assert "notifications_kept_2024" in names
    assert "notifications_2024_11" not in names
    assert await world.stored() == set(kept)
    assert (await world.run()).rewritten == []


async def test_only_one_run_at_a_time(world: ArchiveWorld) -> None:
    """A second one is told so; the lock ends with its holder's connection."""
    first, second = await world.archiver(), await world.archiver()
    async with first.store.running():
        with pytest.raises(BusyError, match="another run"):
            await second.run()
    first.store.terminate()
    await second.run()
    await second.close()


async def test_a_damaged_part_is_told(world: ArchiveWorld) -> None:
    """Changed, cut, missing or unknown files are found by verify, and never restored from."""
    await world.tenant("acme")
    await world.add("acme", "ada", FEBRUARY, 3)
    await world.run()
    (data,) = world.root.rglob("*.zst")
    whole = data.read_bytes()
    data.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    (found,) = await world.findings()
    assert "is damaged: expected sha256" in found
    archiver = await world.archiver()
    with pytest.raises(ArchiveError, match="is damaged"):
        await archiver.restore("acme")
    data.unlink()
    (found,) = await world.findings()
    assert "is not in" in found
    data.write_bytes(whole)
    assert await world.findings() == []
    (data.parent / "stranger.txt").write_text("?")
    assert await world.findings() == [
        "tenant=acme/month=2026-02/stranger.txt is no part that the database knows"
    ]
    assert (await archiver.restore("acme")).rows == 3
    await archiver.close()


async def test_a_bucket_does_as_well(postgres_dsn: str, tmp_path: Path) -> None:
    """The same over a file system that is no folder."""
    world = ArchiveWorld(postgres_dsn, tmp_path, root=f"memory://bucket-{uuid.uuid4().hex}/archive")
    await world.open()
    await world.tenant("acme")
    ids = await world.add("acme", "ada", FEBRUARY, 3)
    await world.run()
    assert sorted(await world.archived()) == ids
    assert await world.findings() == []
    archiver = await world.archiver()
    assert (await archiver.restore("acme")).rows == 3
    assert await world.findings() == []
    assert archiver.files.paths() == []
    await archiver.close()
    await world.close()


async def test_exposures_and_audit_are_pruned_by_age(postgres_dsn: str, tmp_path: Path) -> None:
    """Only what is older than its setting, and nothing where that is 0."""
    world = ArchiveWorld(postgres_dsn, tmp_path, exposures_days=100, audit_days=100, retention_days=0)
    await world.open()
    await world.tenant("acme")
    await world.add("acme", "ada", FEBRUARY, 3, exposed=True)
    await world.add("acme", "ada", APRIL, 1, exposed=True)
    for at_ms in (FEBRUARY.start_ms, NOW):
        await world.db.execute(
            "insert into audit (at, tenant, actor, action) values (to_timestamp($1), '', 'x', 'y')",
            at_ms / 1000,
        )
    report = await world.run()
    assert (report.exposures, report.audit, report.archived) == (3, 1, 0)
    assert await world.db.fetchval("select count(*) from template_exposures") == 1
    assert await world.db.fetchval("select count(*) from audit") == 1
    await world.close()


async def test_who_is_erased_meanwhile_is_not_archived(world: ArchiveWorld) -> None:
    """The erasure of a user asks for that of its archive where its tenant has one; and rows whose user goes
    while they are being archived stay out of the archive."""
    await world.tenant("acme")
    erase = load_queries("users")["erase"]
    await world.add("acme", "eve", FEBRUARY, 2)
    await world.db.execute(erase, "acme", "eve", 1, None, 0.0, [], [])
    assert not await world.db.fetch("select from archive_erasures"), "there is no archive yet"
    await world.add("acme", "ada", FEBRUARY, 3)
    bob = await world.add("acme", "bob", FEBRUARY, 3)
    archiver = await world.archiver()

    async def step(name: str) -> None:
        if name == "told" and await world.db.fetch("select from streams where user_id = 'ada'"):
            await world.db.execute(erase, "acme", "ada", 1, None, 0.0, [], [])

    archiver.step = step
    report = await archiver.run()
    assert (report.archived, report.left) == (3, [])
    assert sorted(await world.archived()) == bob
    assert [tuple(r) for r in await world.db.fetch("select tenant, user_id from archive_erasures")] == [
        ("acme", "ada")
    ]
    assert (await archiver.run()).erased == 1
    await world.db.execute(erase, "acme", "bob", 1, None, 0.0, [], [])
    assert await world.archived() == []
    assert (await archiver.erase_asked()).erased == 1
    await archiver.close()
    assert not list(world.root.rglob("part-*"))


async def test_nothing_that_hangs_on_a_notification_is_left_behind(world: ArchiveWorld) -> None:
    """Every table that names notifications is archived with them, or said here not to be; every column is
    restored, those of later migrations included."""
    tables = await world.db.fetch(
        "select distinct c.table_name::text from information_schema.columns c"
        " join information_schema.tables t using (table_schema, table_name)"
        " where c.table_schema = 'public' and t.table_type = 'BASE TABLE'"
        " and c.column_name in ('notification_id', 'delivery_id')"
    )
    not_archived = {
        "idempotency_keys",  # lives a day
        "merge_windows",  # of the user, not of the notification
        "search_documents",  # follow the notifications by a trigger
    }
    assert {row[0] for row in tables} - not_archived == set(CARRIED) - {"notifications"}
    await world.tenant("acme")
    await world.add("acme", "ada", FEBRUARY, 3, exposed=True)
    before = await world.db.fetch("select * from deliveries order by id")
    assert all(row["digest"] is not None and row["carrier"] == row["id"] for row in before)
    await world.run()
    assert [await world.db.fetchval(f"select count(*) from {table}") for table in CARRIED] == [0] * 6
    archiver = await world.archiver()
    await archiver.restore("acme")
    await archiver.close()
    assert await world.db.fetch("select * from deliveries order by id") == before
    assert await world.db.fetchval("select count(*) from merged_events where actor = 'grace'") == 3


async def test_an_export_tells_what_is_archived(world: ArchiveWorld) -> None:
    """The user's notifications in files stand in the export with all that hangs on them, nobody else's do; of
    a user who is to be erased none; and a file that cannot be read is told, not left out."""
    await world.tenant("acme")
    mine = await world.add("acme", "ada", FEBRUARY, 5, exposed=True)
    await world.add("acme", "adb", FEBRUARY, 5)
    live = await world.add("acme", "ada", APRIL, 1)
    assert (await world.run()).archived == 10
    pool = await open_pool(world.settings.postgres, 2)
    exporter = Exporter(pool, 5.0, 86_400.0, ArchiveExport(pool, world.settings, 5.0))

    async def export(user: str) -> list[dict[str, Any]]:
        told = [json.loads(line) async for piece in exporter.lines("acme", user, NOW) for line in piece]
        return [line for line in told if line["kind"] in ("notification", "archivedNotification")]

    try:
        told = await export("ada")
        assert [line["notification"]["id"] for line in told] == [str(one) for one in [*live, *mine]]
        first = told[1]
        assert first["notification"]["title"] == "n1 von ada"
        assert first["notification"]["createdAt"] == "2026-02-03T00:00:00.000Z"
        assert first["notification"]["readAt"] == "2026-02-03T00:01:00.000Z"
        assert first["deliveries"][0]["digest"]
        assert first["deliveries"][0]["tries"][0]["deviceId"] == "d"
        opened, merged = first["mergedEvents"]  # the first of them has no row of its own
        assert (opened["status"], opened["actor"], opened["how"]) == ("opened", "joan", "drop")
        assert (opened["eventId"], opened["at"]) == (first["notification"]["id"], "2026-02-03T00:00:00.000Z")
        assert (merged["actor"], first["variant"]["variant"]) == ("grace", "b")
        assert "streamId" not in json.dumps(told)
        assert "adb" not in json.dumps(told)
        archiver = await world.archiver()
        await archiver.store.ask_erasure("acme", "ada")
        assert [line["kind"] for line in await export("ada")] == ["notification"]
        assert (await archiver.erase_asked()).erased == 1
        await archiver.close()
        assert [line["kind"] for line in await export("ada")] == ["notification"]
        assert len(await export("adb")) == 5
        for path in world.root.rglob("*.zst"):
            path.unlink()
        with pytest.raises(UnavailableError):
            await export("adb")
    finally:
        await pool.close()
