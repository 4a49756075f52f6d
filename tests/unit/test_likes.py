"""A thousand likes of one post: one notification, at most ten names, and few pushes."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from carillon import merging
from carillon.merging import MERGED, OPENED
from carillon.notification import decode_content
from carillon.settings import MergeSettings
from tests.unit.test_merging import NOW, Store, event

LIMITS = MergeSettings()
RENOTIFY_MS = round(LIMITS.renotify_s * 1000)
WINDOW_MS = round(LIMITS.aggregate_window_s * 1000)


@settings(max_examples=25)
@given(
    st.lists(
        st.integers(0, WINDOW_MS - 1)
        | st.builds(lambda n, ms: n * RENOTIFY_MS + ms, st.integers(1, 11), st.sampled_from([-1, 0, 1])),
        min_size=1,
        max_size=60,
    ),
    st.sampled_from([1, 9, 10, 11, 40, 1000, 1000, 1000]),
    st.sampled_from([0, RENOTIFY_MS, RENOTIFY_MS, WINDOW_MS]),
)
def test_a_thousand_likes_are_one_notification_and_few_pushes(
    moments: list[int], people: int, renotify_ms: int
) -> None:
    """Whenever they come within the window and in whatever batches: one row, its count is that of different
    people, the ten newest are named, and pushes are no closer than the setting."""
    store = Store(LIMITS)
    likes = [event(n, actor=f"user {n % people}", aggregate=True) for n in range(1, 1001)]
    moments = [0, *sorted(moments)]
    dues: list[int] = [NOW]
    left = likes
    for index, moment in enumerate(moments):
        cut = len(left) if index == len(moments) - 1 else max(1, len(likes) // len(moments))
        some, left = left[:cut], left[cut:]
        now_ms = NOW + moment
        decisions = store.batch(now_ms, some)
        merged = [one for one in decisions if one.status == MERGED]
        if decisions[0].status == OPENED or not merged:
            continue  # the push of the first one tells those of its batch
        target = merged[0].target  # the others of a batch are told together with it
        _, due_ms = merging.notify(target, now_ms, now_ms, renotify_ms, urgent=False)
        assert due_ms is not None
        assert due_ms >= now_ms
        if due_ms > dues[-1]:
            dues.append(due_ms)
        for key, (raw, ends_ms, events, count, _) in store.windows.items():
            store.windows[key] = (raw, ends_ms, events, count, target.notified_ms)
    (row,) = store.rows.values()
    content = decode_content(row.row.content)
    assert content["count"] == people
    newest = list(dict.fromkeys(f"user {n % people}" for n in range(1000, 0, -1)))
    assert [actor["id"] for actor in content["actors"]] == newest[:10]
    assert len(row.events) == 1000
    assert all(b - a >= renotify_ms for a, b in itertools.pairwise(dues))
    if renotify_ms:
        assert len(dues) <= 1 + WINDOW_MS // renotify_ms
