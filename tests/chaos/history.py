"""The history of a run: everything that was asked, answered, sent, received and broken, in order.

One JSON object a line. `t`, `start` and `end` are seconds since the start of the run (monotonic). The file is
all that the checker and the report need: `python -m tests.chaos check FOLDER` judges an old run again.

| op | members beside `t` or `start`/`end` |
|---|---|
| run | seed, wall0 (epoch seconds of t = 0), bounds, targets: user -> [[provider, target, device]] |
| publish | number, attempt, shape, items [[user, label, key]], outcome (ok/refused/ambiguous), results |
| conflict | key, outcome: another body under a used key |
| dial | conn, user, device, position or null, how: url/frame/none |
| welcome | conn, recovered, epoch, lastSeq, rev |
| receive | conn, id, seq, rev, read |
| state | conn, kind, ids or upto, rev |
| ack | conn, seq or ids |
| closed | conn, code, by: client/server/lost |
| read | user, ids, via, ok (True only if answered) |
| feed | user, items [[id, seq]], final, whole |
| presence | statuses: user -> status, final |
| push | provider, target, id |
| fault, healed, recovered | number, name, detail |
| device | device, user, connected: how a device stood at the end |
| stream, row, delivery, attempt | what PostgreSQL held at the end |
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class History:
    """Appends records to a file and keeps them.

    Args:
        path: the file; None keeps the records in memory alone.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.records: list[Record] = []
        self.began = time.monotonic()
        self.wall0 = time.time()
        self._file = path.open("w") if path is not None else None

    def now(self) -> float:
        """Seconds since the start of the run."""
        return round(time.monotonic() - self.began, 4)

    def at_wall(self, wall_s: float) -> float:
        """A time of day on the run's clock."""
        return round(wall_s - self.wall0, 4)

    def add(self, op: str, **members: Any) -> Record:
        """Append one record; `t` is now unless the operation has a `start`."""
        record: Record = {"op": op}
        if "t" not in members and "start" not in members:
            record["t"] = self.now()
        record.update(members)
        self.records.append(record)
        if self._file is not None:
            self._file.write(json.dumps(record, separators=(",", ":")) + "\n")
        return record

    def flush(self) -> None:
        """Write what is buffered."""
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        """Finish the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def load(path: Path) -> list[Record]:
    """The records of a file."""
    with path.open() as file:
        return [json.loads(line) for line in file]
