"""What a decision costs: `python -m benchmarks.micro_policy` prints microseconds of CPU per event.

Bare is a user without preferences of a tenant without rules: what every other row pays comes on top.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from carillon.attention import Attention
from carillon.budget import Spent
from carillon.decision import TenantRules, judge, no_rules, pack
from carillon.messages import Event
from carillon.plan import Reach, plan
from carillon.policy import Policy, build
from carillon.switches import Preferences

NOW = 1_781_517_600_000
POLICY = Policy("push_after", 30_000, 60_000)
EVENT = Event(bytes(16), "t", "u", 1, "chat.message", "social", 1, "", NOW)
ROUNDS = 20_000


def decide(user: Preferences | None, tenant: TenantRules | None, spent: Spent | None, now_ms: int) -> None:
    """As the writer of a shard does it."""
    verdict = None
    if user is not None or tenant is not None:
        verdict = judge(EVENT, user, tenant or NO_RULES, now_ms, spent)
    found = plan(
        EVENT, Reach.OFFLINE, providers=PROVIDERS, now_ms=now_ms, ack_window_ms=5000, grace_end_ms=0,
        lease_ms=30_000, attention=Attention.UNKNOWN, policy=POLICY, verdict=verdict,
    )  # fmt: skip
    if found.rules:
        pack(found.rules)


NO_RULES = no_rules()
PROVIDERS = frozenset(("fcm",))


def measure(name: str, one: Callable[[int], None]) -> None:
    """Print the median of seven rounds."""
    times = []
    for _ in range(7):
        started = time.process_time()
        for step in range(ROUNDS):
            one(NOW + step * 40)
        times.append((time.process_time() - started) / ROUNDS * 1e6)
    print(f"{name:<58}{statistics.median(times):6.2f} us")


def main() -> None:
    """Print one line for each kind of user."""
    switches = Preferences({"channels": {"push": True}, "types": {"other": False}})
    off = Preferences({"channels": {"push": False}})
    night = {"start": "22:00", "end": "07:00", "timezone": "Europe/Vienna"}
    calm = Preferences({"quietHours": night | {"start": "23:59", "end": "23:58"}})
    awake = Preferences({"quietHours": night})
    everything = Preferences(
        {
            "channels": {"push": {"enabled": True, "sound": "bell"}, "sms": {"emergencyOnly": True}},
            "categories": {"social": {"channels": {"email": False}, "priority": "high"}},
            "types": {f"type{n}": False for n in range(50)},
            "quietHours": night,
            "digest": "hourly",
        }
    )
    tenant = build(
        {
            "defaults": {"quietHours": night},
            "forced": {"categories": {"security": True}},
            "limits": {
                "user": {"count": 20, "windowS": 3600},
                "types": {"chat.message": {"count": 5, "windowS": 60}},
            },
        },
        POLICY,
    ).rules
    spent = Spent()
    measure("bare", lambda now: decide(None, None, None, now))
    measure("preferences that allow it", lambda now: decide(switches, None, None, now))
    measure("push switched off", lambda now: decide(off, None, None, now))
    measure("quiet hours, awake", lambda now: decide(awake, None, None, now))
    measure("quiet hours, held", lambda now: decide(calm, None, None, now))
    measure("a tenant's rules alone", lambda now: decide(None, tenant, spent, now))
    measure("everything at once", lambda now: decide(everything, tenant, spent, now))


if __name__ == "__main__":
    main()
