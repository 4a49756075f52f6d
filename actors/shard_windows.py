"""Which windows of merging may be open, as the one shard knows that opens them.

A negative memory: what is not in it is not open, and Postgres need not be asked. What is in it may have ended
since, so Postgres is asked. Only a user's own shard opens windows, and it notes them before it writes them:
a write whose outcome is unknown is in here, too. What another shard opened before is learned once per stream
and term.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from carillon.merge_begun import DAY_MS, number_of


class _Age:
    """Windows of about one length, in two generations: all of the older end before the younger is full."""

    def __init__(self, length_ms: int, now_ms: int) -> None:
        self._length_ms = length_ms
        self.young: set[int] = set()
        self.old: set[int] = set()
        self.turns_ms = now_ms + length_ms

    def turn(self, now_ms: int) -> None:
        """What is younger becomes the older generation, what was older is forgotten."""
        self.old, self.young = self.young, set()
        self.turns_ms = now_ms + self._length_ms


class KnownWindows:
    """Windows as numbers, each in the generation of its length: it is forgotten some time after its end.

    Args:
        most: windows that are remembered; with more, streams are learned anew.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._ages: dict[int, _Age] = {}
        self._sets: list[set[int]] = []
        self._learned: set[int] = set()
        self._many: dict[int, int] = {}  # streams with more open windows than are learned, and till when
        self._term: int | None = None
        self._now_ms = 0

    def under(self, term: int, now_ms: int) -> None:
        """Work goes on under a term; what was learned under another may be out of date."""
        if term != self._term or now_ms < self._now_ms:  # a clock set back: what had ended has not
            self._term = term
            self._forget()
        self._now_ms = now_ms
        turning = [size for size, age in self._ages.items() if now_ms >= age.turns_ms]
        if turning:
            self._turn(turning)

    def _forget(self) -> None:
        self._learned.clear()
        self._many.clear()

    def _turn(self, sizes: Iterable[int]) -> None:
        for size in sizes:
            age = self._ages[size]
            age.turn(self._now_ms)
            if not age.old:
                del self._ages[size]
        self._sets = [some for age in self._ages.values() for some in (age.young, age.old)]

    def unlearned(self, streams: Iterable[int]) -> list[int]:
        """Those of which is not known what was opened before, and that can be learned."""
        learned, many = self._learned, self._many
        found = [stream for stream in dict.fromkeys(streams) if stream not in learned]
        if not many or not found:
            return found
        for stream in found:
            if many.get(stream, self._now_ms + 1) <= self._now_ms:
                del many[stream]
                learned.add(stream)  # what was open then has ended, and what began since is known
        return [stream for stream in found if stream not in learned and stream not in many]

    def learn(self, streams: Iterable[int], windows: Sequence[tuple[int, str, int]], most: int) -> None:
        """All windows of these streams that Postgres has open are `windows`, of each `most` at most.

        Of a stream that has so many more may be open: it is asked of each, until all of them have ended.
        """
        counts: dict[int, int] = {}
        for stream, _, _ in windows:
            counts[stream] = counts.get(stream, 0) + 1
        for stream in streams:
            if counts.get(stream, 0) >= most:
                self._many[stream] = self._now_ms + DAY_MS
            else:
                self._learned.add(stream)
        self.opened(windows)

    def opened(
        self, windows: Iterable[tuple[int, str, int]], numbers: Mapping[int, Iterable[int]] = {}
    ) -> None:
        """These, each with its end (ms), are about to be written, or are there.

        Args:
            numbers: more of them, by their end (ms).
        """
        for stream, key, ends_ms in windows:
            self._age(ends_ms).young.add(number_of(stream, key))
        for ends_ms, some in numbers.items():
            self._age(ends_ms).young.update(some)
        if sum(map(len, self._sets)) > self._most:
            # Windows that leave may be open still.
            ages = self._ages
            self._turn([max(ages, key=lambda size: len(ages[size].young) + len(ages[size].old))])
            self._forget()

    def _age(self, ends_ms: int) -> _Age:
        size = (ends_ms - self._now_ms).bit_length()
        age = self._ages.get(size)
        if age is None:
            age = self._ages[size] = _Age(1 << size, self._now_ms)
            self._sets += [age.young, age.old]
        return age

    def perhaps(self, windows: Sequence[tuple[int, str]], numbers: Sequence[int]) -> list[tuple[int, str]]:
        """Those that may be open; `numbers` are theirs."""
        learned, sets = self._learned, self._sets
        found: list[tuple[int, str]] = []
        for window, number in zip(windows, numbers, strict=True):
            if window[0] in learned:
                for some in sets:
                    if number in some:
                        break
                else:
                    continue
            found.append(window)
        return found
