"""Random filters and documents of users, for the tests that compare evaluations."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

NAMES = st.sampled_from(["a", "b", "plan", "größe", 'x"y', "z\\w", "$v0", "a b"])
TEXTS = st.sampled_from(
    ["", "a", "A", "ab", "b", "pro", "Ä", "ä", "😀", "\uffff", "a\nb", ".*", 'q"', "\\", "10", "9"]
)
NUMBERS = st.sampled_from(
    [0, -0.0, 1, 1.0, 1.5, -1, 9, 10, 1e300, -1e-300, 2**53 - 1, 0.1, 0.30000000000000004]
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
VALUES = st.recursive(
    SCALARS,
    lambda below: st.lists(below, max_size=3) | st.dictionaries(NAMES, below, max_size=3),
    max_leaves=6,
)
DOCUMENTS = st.fixed_dictionaries(
    {"attributes": st.dictionaries(NAMES, VALUES, max_size=5)},
    optional={
        "locale": st.sampled_from(["de", "de-AT", "pt"]),
        "timezone": st.sampled_from(["UTC", "Europe/Vienna"]),
        "platform": st.lists(st.sampled_from(["ios", "android", "web"]), min_size=1, max_size=3, unique=True),
        "lastSeenAgoS": st.floats(0, 1e7),
    },
)
FIELDS = st.one_of(
    st.lists(NAMES, min_size=1, max_size=3).map(lambda names: ".".join(["attributes", *names])),
    st.sampled_from(["locale", "timezone", "platform", "lastSeenAgoS"]),
)
CONDITIONS = st.one_of(
    SCALARS,
    st.dictionaries(st.sampled_from(["eq", "ne"]), SCALARS, min_size=1),
    st.fixed_dictionaries({"in": st.lists(SCALARS, min_size=1, max_size=4)}),
    st.fixed_dictionaries({"exists": st.booleans()}),
    st.fixed_dictionaries({"contains": TEXTS.filter(bool)}),
    st.dictionaries(st.sampled_from(["gt", "gte", "lt", "lte"]), NUMBERS | TEXTS, min_size=1, max_size=2),
)
FILTERS: st.SearchStrategy[dict[str, Any]] = st.recursive(
    st.dictionaries(FIELDS, CONDITIONS, max_size=2),
    lambda below: st.one_of(
        st.fixed_dictionaries({"not": below}),
        st.dictionaries(st.sampled_from(["and", "or"]), st.lists(below, min_size=1, max_size=3), min_size=1),
    ),
    max_leaves=6,
)
