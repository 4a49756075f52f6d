"""Experiments: which variant of a template a user gets, and what the results are worth. Pure."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Final

Z_95: Final = 1.959963984540054
"""Of the standard normal distribution: 95 % lie within."""


def choose(key: str, variants: Sequence[tuple[str, int]]) -> int:
    """The variant of a user, always the same: its index.

    Weighted rendezvous hashing: a variant gets its share of all users, and when weights change only users
    move that must (to a variant that grew, from one that shrank).

    Args:
        key: tenant, template and user.
        variants: names and weights, weights from 1.
    """
    best, best_score = 0, -1.0
    for index, (name, weight) in enumerate(variants):
        digest = hashlib.blake2b(f"{key}\0{name}".encode(), digest_size=8).digest()
        share = (int.from_bytes(digest, "big") + 0.5) / 2**64
        score = weight / -math.log(share)
        if score > best_score:
            best, best_score = index, score
    return best


def interval(hits: int, tries: int) -> tuple[float, float]:
    """Where the true rate lies with 95 % confidence (Wilson's score interval); (0, 1) without tries.

    Unlike the usual approximation it is right for few tries and for rates near 0 and 1.
    """
    if not tries:
        return 0.0, 1.0
    rate, z2 = hits / tries, Z_95 * Z_95
    middle = (rate + z2 / (2 * tries)) / (1 + z2 / tries)
    half = Z_95 / (1 + z2 / tries) * math.sqrt(rate * (1 - rate) / tries + z2 / (4 * tries * tries))
    # Exactly 0 and 1 at the ends: rounding leaves a last digit.
    return (0.0 if hits == 0 else max(0.0, middle - half)), (
        1.0 if hits == tries else min(1.0, middle + half)
    )
