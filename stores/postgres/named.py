"""Named queries: SQL lives in queries/*.sql, commented, and is read by name.

A file holds several queries; each begins with a line `-- name: <name>` and the comment lines under it say
what it is for. The comments are sent with the statement: they show in pg_stat_activity and slow-query logs.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Final

FOLDER: Final = Path(__file__).parent / "queries"
_MARK: Final = "-- name:"


@functools.cache
def load_queries(file: str) -> dict[str, str]:
    """The queries of `queries/<file>.sql` by name.

    Raises:
        ValueError: two queries of the file share a name, or text stands before the first.
    """
    queries: dict[str, str] = {}
    name = ""
    for line in (FOLDER / f"{file}.sql").read_text(encoding="utf-8").splitlines():
        if line.startswith(_MARK):
            name = line.removeprefix(_MARK).strip()
            if name in queries:
                raise ValueError(f"{file}.sql has two queries named {name!r}")
            queries[name] = f"/* {file}.{name} */\n"
        elif name:
            queries[name] += line + "\n"
        elif line.strip() and not line.startswith("--"):
            raise ValueError(f"{file}.sql has a statement before the first '-- name:' line")
    return {key: text.rstrip().rstrip(";") for key, text in queries.items()}
