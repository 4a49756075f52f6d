"""A million stored notifications, put straight into Postgres: what the scenarios F1 and F2 read.

Through the API it would take minutes and measure something else. The rows are those that the API would have
stored, read for two thirds and acknowledged for nine users of ten. They stay: a second run finds them there.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Final, NamedTuple

import asyncpg

from benchmarks.bench import Progress
from benchmarks.wire import now

WORDS: Final = [
    "".join(chr(97 + (n * 7919 + k * (n % 97 + 13) * 31) % 26) for k in range(4 + n % 6)) for n in range(2000)
]
"""Of titles and bodies; the first ones are frequent."""
SKEW: Final = 3
"""A word is drawn at `random() ** SKEW` of the list: the most frequent are in every fifth text."""
_CHUNKS: Final = 25
_USERS_SQL: Final = """
insert into streams (tenant, user_id, slot, epoch, seq, rev, unread)
select $1, u.name, (crc32(convert_to($1 || ':' || u.name, 'UTF8')) % 1024)::smallint, 'e1',
       $4::int, $4::int, $4::int / 3
from (select $2 || n as name from generate_series($5::int, $3::int) n) u
"""
_ROWS_SQL: Final = """
insert into notifications
    (id, stream_id, seq, rev, position, priority, type, content, created_at, delivered_at, seen_at, read_at)
select uuidv7(make_interval(secs => n - s.seq)), s.stream_id, n, n, n, 1, 'bench.stored',
       format('"type":"bench.stored","title":"Build %s %s","body":"%s","actorId":null,"targetType":null,'
              '"targetId":null,"priority":"normal","category":null,"actions":[],"data":{"run":"4711"},'
              '"createdAt":"2026-01-01T00:00:00.000Z"', n, t.words[1], array_to_string(t.words[2:], ' ')),
       now() + make_interval(secs => n - s.seq),
       case when s.stream_id % 10 > 0 then now() end,
       case when n % 3 > 0 then now() end,
       case when n % 3 > 0 then now() end
from unnest($1::text[]) as u (name)
join streams s on s.tenant = $2 and s.user_id = u.name
cross join lateral generate_series(1, s.seq) as n
cross join lateral (
    select array(select ($3::text[])[1 + floor(power(random(), $4::int) * $5::int)::int]
                 from generate_series(1, 13 + 0 * n)) as words
) t
"""


class Kind(NamedTuple):
    """Users with as many notifications each."""

    name: str
    first: int
    """Number of the first of them; user ids end in it."""
    users: int
    each: int


class Population(NamedTuple):
    """Whose notifications there are."""

    prefix: str
    kinds: tuple[Kind, ...]

    @classmethod
    def of(cls, notifications: int) -> Population:
        """Ten long feeds with a tenth of all, feeds of 45 with 45 %, feeds of 5 with the rest."""
        long, middle = notifications // 100, max(1, notifications // 100)
        short = max(1, (notifications - 10 * long - 45 * middle) // 5)
        return cls(
            f"stored{notifications}-",
            (
                Kind("long", 1, 10, long),
                Kind("middle", 11, middle, 45),
                Kind("short", 11 + middle, short, 5),
            ),
        )

    def total(self) -> int:
        """Notifications of all."""
        return sum(kind.users * kind.each for kind in self.kinds)

    def user(self, kind: Kind, rng: random.Random) -> str:
        """Some user of a kind."""
        return f"{self.prefix}{kind.first + rng.randrange(kind.users)}"

    def draw(self, rng: random.Random) -> tuple[Kind, str]:
        """Whose a notification is that was drawn from all."""
        [kind] = rng.choices(self.kinds, weights=[kind.users * kind.each for kind in self.kinds])
        return kind, self.user(kind, rng)


def word(rng: random.Random) -> str:
    """A word as often as texts have it."""
    return WORDS[int(rng.random() ** SKEW * len(WORDS))]


async def filled(dsn: str, tenant: str, notifications: int, progress: Progress) -> Population:
    """Make sure that they are there."""
    population = Population.of(notifications)
    connection: asyncpg.Connection = await asyncpg.connect(dsn, timeout=30)
    try:
        last = population.kinds[-1]
        final = f"{population.prefix}{last.first + last.users - 1}"
        if await connection.fetchval(
            "select exists (select from streams s join notifications n using (stream_id)"
            " where s.tenant = $1 and s.user_id = $2)",
            tenant, final,
        ):  # fmt: skip
            return population
        began = now()
        progress.line(f"filling Postgres with {population.total():,} notifications", last=True)
        for kind in population.kinds:
            await connection.execute(
                _USERS_SQL, tenant, population.prefix, kind.first + kind.users - 1, kind.each, kind.first
            )
        await connection.execute("analyze streams")
        done = 0
        for kind in population.kinds:
            size = max(1, population.total() // _CHUNKS // kind.each)
            for at in range(0, kind.users, size):
                names = [
                    f"{population.prefix}{kind.first + n}" for n in range(at, min(at + size, kind.users))
                ]
                await connection.execute(_ROWS_SQL, names, tenant, WORDS, SKEW, len(WORDS), timeout=120)
                done += len(names) * kind.each
                progress.line(f"{done:,} of {population.total():,} stored after {now() - began:.0f} s")
        await connection.execute("vacuum (analyze) notifications", timeout=120)
        await connection.execute("checkpoint", timeout=120)
        progress.line(f"filled after {now() - began:.0f} s", last=True)
    finally:
        await connection.close()
    return population


async def contents(
    dsn: str, tenant: str, users: Sequence[str]
) -> dict[str, list[tuple[int, str, bool, str]]]:
    """(seq, id, read, content) of these users' notifications, newest first: the truth."""
    connection: asyncpg.Connection = await asyncpg.connect(dsn, timeout=30)
    try:
        found: dict[str, list[tuple[int, str, bool, str]]] = {user: [] for user in users}
        for row in await connection.fetch(
            "select s.user_id, n.seq, n.id::text, n.read_at is not null, n.content from streams s"
            " join notifications n using (stream_id) where s.tenant = $1 and s.user_id = any ($2::text[])"
            " order by n.position desc",
            tenant, list(users),
        ):  # fmt: skip
            found[row[0]].append(tuple(row)[1:])
        return found
    finally:
        await connection.close()
