"""Which windows of merging may be open, as the one shard knows that opens them.

A negative memory: what is not in it is not open, and Postgres need not be asked. What is in it may have ended
since, so Postgres is asked. Only a user's own shard opens windows, and it notes them before it writes them:
a write whose outcome is unknown is in here, too. What another shard opened before is learned once per stream
and term.
"""

from __future__ import annotations

from collections.abc import Iterable


class KnownWindows:
    """Keys of windows by stream, in two generations: the older one is forgotten when the younger is full.

    Args:
        most: windows of one generation.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._young: set[tuple[int, str]] = set()
        self._old: set[tuple[int, str]] = set()
        self._learned: set[int] = set()
        self._term: int | None = None

    def under(self, term: int) -> None:
        """Work goes on under a term; what was learned under another may be out of date."""
        if term != self._term:
            self._term = term
            self._learned.clear()

    def unlearned(self, streams: Iterable[int]) -> list[int]:
        """Those of which is not known what was opened before."""
        return [stream for stream in dict.fromkeys(streams) if stream not in self._learned]

    def learn(self, streams: Iterable[int], windows: Iterable[tuple[int, str]]) -> None:
        """All windows of these streams that Postgres has open are `windows`."""
        self._learned.update(streams)
        self.opened(windows)

    def opened(self, windows: Iterable[tuple[int, str]]) -> None:
        """These are about to be written, or are there."""
        self._young.update(windows)
        if len(self._young) > self._most:
            # Streams are learned anew: the windows that leave with the older generation may be open still.
            self._old, self._young = self._young, set()
            self._learned.clear()

    def perhaps(self, windows: Iterable[tuple[int, str]]) -> list[tuple[int, str]]:
        """Those that may be open."""
        return [
            window
            for window in windows
            if window in self._young or window in self._old or window[0] not in self._learned
        ]
