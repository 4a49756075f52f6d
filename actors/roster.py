"""The coordinator's memory of members: who they are, their links, and their statistics over restarts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

import msgspec

from actors.link import Link
from carillon.messages import Member, MemberStats, Renew
from carillon.metrics import split_name
from carillon.placement import add_histograms, add_totals

MOST_DEPARTED: Final = 1024
"""Members whose totals are kept after they left, in case they come back; beyond, the oldest are forgotten."""


@dataclass
class Entry:
    """One member of the map."""

    member: Member
    link: Link | None = None
    """Open and joined link; None while the member restarts, or until it joins a restarted coordinator."""
    leaving: bool = False
    """True once it asked to leave: it gets no more slots."""

    @property
    def is_joined(self) -> bool:
        """True while its link is open."""
        return self.link is not None and not self.link.closed


@dataclass
class _Numbers:
    incarnation: str = ""
    counters: dict[str, float] = field(default_factory=dict[str, float])
    gauges: dict[str, float] = field(default_factory=dict[str, float])
    histograms: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    past_counters: dict[str, float] = field(default_factory=dict[str, float])
    past_histograms: dict[str, list[float]] = field(default_factory=dict[str, list[float]])

    def fold(self) -> None:
        """The process ended: what it had counted becomes past."""
        self.past_counters = add_totals(self.past_counters, self.counters)
        self.past_histograms = add_histograms(self.past_histograms, self.histograms)
        self.counters, self.gauges, self.histograms = {}, {}, {}


class Roster:
    """Members by name, with their statistics. Counters and histograms of a name never go back."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self._numbers: dict[str, _Numbers] = {}

    def __iter__(self) -> Iterator[Entry]:
        return iter(tuple(self._entries.values()))

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, name: str) -> Entry | None:
        """The member called `name`, if it is there."""
        return self._entries.get(name)

    def put(self, entry: Entry) -> None:
        """Add or replace a member; a new incarnation keeps the totals of those before it."""
        name = entry.member.name
        self._entries[name] = entry
        numbers = self._numbers.pop(name, None) or _Numbers()
        self._numbers[name] = numbers  # last in order: the departed are forgotten from the front
        if numbers.incarnation != entry.member.incarnation:
            numbers.fold()
            numbers.incarnation = entry.member.incarnation

    def drop(self, name: str) -> Entry | None:
        """Remove a member; its totals stay for when it comes back."""
        entry = self._entries.pop(name, None)
        departed = [known for known in self._numbers if known not in self._entries]
        for known in departed[: max(0, len(departed) - MOST_DEPARTED)]:
            del self._numbers[known]
        return entry

    def shards(self) -> dict[str, Entry]:
        """All shards by name."""
        return {name: entry for name, entry in self._entries.items() if entry.member.kind == "shard"}

    def others(self) -> list[Entry]:
        """All members that are not shards."""
        return [entry for entry in self._entries.values() if entry.member.kind != "shard"]

    def set_terms(self, terms: dict[str, int]) -> bool:
        """Shards have these terms now; True if that is news of any of them."""
        changed = False
        for name, term in terms.items():
            entry = self._entries.get(name)
            if entry is not None and entry.member.term != term:
                entry.member = msgspec.structs.replace(entry.member, term=term)
                changed = True
        return changed

    def take_numbers(self, renew: Renew) -> None:
        """The newest statistics of a member."""
        numbers = self._numbers.get(renew.name)
        if numbers is not None and numbers.incarnation == renew.incarnation:
            numbers.counters = renew.counters
            numbers.gauges = renew.gauges
            numbers.histograms = renew.histograms

    def counters(self, name: str) -> dict[str, float]:
        """A counter by its labels (`a="b",c="d"`), all members together, those that left included."""
        told: dict[str, float] = {}
        for numbers in self._numbers.values():
            for full, value in add_totals(numbers.past_counters, numbers.counters).items():
                base, labels = split_name(full)
                if base == name:
                    told[labels] = told.get(labels, 0.0) + value
        return told

    def stats_of(self, entry: Entry, age_s: float) -> MemberStats:
        """Statistics of one member, with the totals of its earlier processes."""
        numbers = self._numbers.get(entry.member.name) or _Numbers()
        return MemberStats(
            member=entry.member,
            age_s=age_s,
            counters=add_totals(numbers.past_counters, numbers.counters),
            gauges=numbers.gauges,
            histograms=add_histograms(numbers.past_histograms, numbers.histograms),
        )
