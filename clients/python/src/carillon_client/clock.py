"""Time and chance: the one place that asks the machine for them."""

from __future__ import annotations

import random
import time
import uuid

monotonic = time.monotonic
"""Seconds that never go back; zero is arbitrary."""

sleep = time.sleep

chance = random.SystemRandom().random
"""A number from 0 to 1. The system's source: forked workers must not share a back-off."""


def new_key() -> str:
    """A fresh idempotency key: 122 random bits."""
    return uuid.uuid4().hex
