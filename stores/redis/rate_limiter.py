"""Rate limits of API keys and tenants, shared by all ingress replicas through Redis.

A token bucket per limit lives in Redis, in one script, on Redis' clock. A replica takes a little more than it
needs (`ingress.limit_lease_s` of the rate), so that most requests ask nobody. While Redis is away each
replica keeps the rate by itself: with n replicas up to n times the rate passes then, and nobody is turned
away for lack of Redis (guarantee G12). While it is there the limit is exact in this sense: over all replicas
no more than `rate * t + burst` passes in t seconds, and what the last batch was larger than what was left.
"""

from __future__ import annotations

import logging
from typing import Any, Final, NamedTuple

import redis.asyncio as aioredis
from redis.exceptions import RedisError

from carillon.clock import Clock
from carillon.rate import TokenBucket
from carillon.settings import RedisSettings

log = logging.getLogger(__name__)

MAX_KEYS: Final = 10_000
"""Limits with local state; the oldest goes."""
MAX_CONNECTIONS: Final = 16
"""To Redis, of one replica."""
LEASE_LIFE_S: Final = 1.0
"""What a replica took ahead and did not use within this time is forgotten."""

# A bucket may go into debt: a batch is never split, and one larger than the burst must pass some time.
# KEYS[1] the bucket; ARGV rate per second, burst, wanted, extra, urgent, whether wanted may be split.
# Returns {granted, wait in ms, urgent ones within the rate}; `TokenBucket.admit` is the same without Redis.
_SCRIPT: Final = """
local now = redis.call('TIME')
now = now[1] * 1000 + math.floor(now[2] / 1000)
local rate, burst = tonumber(ARGV[1]) / 1000, tonumber(ARGV[2])
local kept = redis.call('HMGET', KEYS[1], 'tokens', 'at')
local tokens = burst
if kept[1] then tokens = math.min(burst, tonumber(kept[1]) + (now - tonumber(kept[2])) * rate) end
local granted, wait, urgent = 0, 0, tonumber(ARGV[5])
local within = math.min(urgent, math.max(0, math.floor(tokens)))
if urgent > 0 then tokens = math.max(tokens - urgent, math.min(tokens, -burst)) end
if tokens >= 1 then
  local wanted, extra = tonumber(ARGV[3]), tonumber(ARGV[4])
  if ARGV[6] == '1' then wanted = math.min(wanted, math.floor(tokens)) end
  granted = wanted + math.max(0, math.min(extra, math.floor(tokens - wanted)))
  tokens = tokens - granted
end
if tokens < 1 then wait = math.ceil((1 - tokens) / rate) end
redis.call('HSET', KEYS[1], 'tokens', tostring(tokens), 'at', now)
redis.call('PEXPIRE', KEYS[1], math.ceil((burst - tokens) / rate) + 1000)
return {granted, wait, within}
"""

# KEYS[1] the bucket; ARGV rate per second, burst, tokens that come back. One that ended is full.
_GIVE_BACK: Final = """
local now = redis.call('TIME')
now = now[1] * 1000 + math.floor(now[2] / 1000)
local rate, burst = tonumber(ARGV[1]) / 1000, tonumber(ARGV[2])
local kept = redis.call('HMGET', KEYS[1], 'tokens', 'at')
if kept[1] then
  local tokens = math.min(burst, tonumber(kept[1]) + (now - tonumber(kept[2])) * rate + tonumber(ARGV[3]))
  redis.call('HSET', KEYS[1], 'tokens', tostring(tokens), 'at', now)
  redis.call('PEXPIRE', KEYS[1], math.ceil((burst - tokens) / rate) + 1000)
end
"""


class _Key:
    """One limit at this replica."""

    __slots__ = ("bucket", "lease", "lease_until", "limit", "taking")

    def __init__(self, limit: tuple[float, int], clock: Clock) -> None:
        self.limit = limit
        self.bucket = TokenBucket(*limit, clock)  # for times without Redis
        self.lease = 0
        self.lease_until = 0.0
        self.taking = False  # one ask is under way that takes ahead: for the others, too


class Admitted(NamedTuple):
    """What passed.

    Attributes:
        urgent: urgent ones that were within the rate; all of them pass.
        others: others that pass.
        wait_s: seconds until another one may pass, told to those who do not.
    """

    urgent: int
    others: int
    wait_s: float = 0.0


class RateLimiter:
    """Admits requests at the rate of their limits.

    Args:
        settings: where Redis is; an empty URL means: every replica by itself.
        lease_s: seconds of the rate that a replica takes ahead.
    """

    def __init__(self, settings: RedisSettings, lease_s: float, clock: Clock) -> None:
        self._lease_s = lease_s
        self._clock = clock
        self._keys: dict[str, _Key] = {}
        self._retry_at = 0.0
        self._timeout_s = settings.timeout_s
        self._redis: Any = None
        if settings.url:
            # Asks beyond the connections wait for one: that many at once do not mean that Redis is away.
            pool = aioredis.BlockingConnectionPool.from_url(
                settings.url,
                socket_timeout=settings.timeout_s,
                socket_connect_timeout=settings.timeout_s,
                max_connections=MAX_CONNECTIONS,
                timeout=settings.timeout_s,
            )
            self._redis = aioredis.Redis.from_pool(pool)
            self._script: Any = self._redis.register_script(_SCRIPT)
            self._give_back: Any = self._redis.register_script(_GIVE_BACK)

    async def take(self, key_id: str, rate_per_s: float, burst: int, requests: int) -> float:
        """Admit `requests` of a limit, or not: seconds to wait, 0.0 if they may pass. Never raises."""
        admitted = await self.admit(key_id, rate_per_s, burst, 0, requests, split=False)
        return 0.0 if admitted.others == requests else admitted.wait_s

    async def admit(
        self, key_id: str, rate_per_s: float, burst: int, urgent: int, others: int, *, split: bool
    ) -> Admitted:
        """Admit all of the urgent requests of a limit, and of the others what may pass. Never raises.

        Args:
            split: False: the others pass together, or none of them does.
        """
        key = self._keys.get(key_id)
        if key is None or key.limit != (rate_per_s, burst):
            while len(self._keys) >= MAX_KEYS:
                del self._keys[next(iter(self._keys))]
            key = self._keys[key_id] = _Key((rate_per_s, burst), self._clock)
        now = self._clock.monotonic()
        if key.lease_until < now:
            key.lease = 0
        if key.lease >= urgent + others:
            key.lease -= urgent + others
            return Admitted(urgent, others)
        if self._redis is not None and now >= self._retry_at:
            return await self._ask(key, key_id, urgent, others, split=split)
        return Admitted(*key.bucket.admit(urgent, others, split=split))

    async def _ask(self, key: _Key, key_id: str, urgent: int, others: int, *, split: bool) -> Admitted:
        """Admit with what was taken ahead, which is not enough, and what Redis has.

        Others ask meanwhile: what this one uses of the lease is taken out of it before, and what is left is
        added to whatever is there then.
        """
        rate_per_s, burst = key.limit
        now = self._clock.monotonic()
        # What was taken ahead is for the urgent ones first.
        leased = min(key.lease, urgent)
        spare = min(key.lease - leased, others)
        key.lease -= leased + spare
        wanted = others - spare
        ahead = int(rate_per_s * self._lease_s) if wanted and not key.taking else 0
        if ahead:
            key.taking = True
        try:
            granted, wait_ms, within = await self._script(
                keys=[f"carillon:rate:{key_id}"],
                args=[rate_per_s, burst, wanted, ahead, urgent - leased, int(split)],
            )
        except BaseException as exc:
            key.lease += leased + spare
            if not isinstance(exc, (RedisError, OSError, TimeoutError)):
                raise
            self._alone(exc)
            return Admitted(*key.bucket.admit(urgent, others, split=split))
        finally:
            if ahead:
                key.taking = False
        if granted:
            key.lease_until = max(key.lease_until, now + LEASE_LIFE_S)
        # Together with what others took ahead meanwhile.
        key.lease += spare + granted
        passed = min(others, key.lease) if split else others if key.lease >= others else 0
        key.lease -= passed
        return Admitted(leased + within, passed, max(wait_ms / 1000, 0.001))

    async def give_back(self, key_id: str, requests: int) -> None:
        """What `take` admitted did not go out after all: the bucket has it again, for every replica.

        Kept here it would be forgotten with the lease, and a bucket drain with nothing passing. Never raises.
        """
        key = self._keys.get(key_id)
        if key is None:
            return
        if self._redis is not None and self._clock.monotonic() >= self._retry_at:
            try:
                await self._give_back(keys=[f"carillon:rate:{key_id}"], args=[*key.limit, requests])
                return
            except (RedisError, OSError, TimeoutError) as exc:
                self._alone(exc)
        key.bucket.give_back(requests)

    def _alone(self, exc: Exception) -> None:
        log.warning("rate limits are kept by each replica alone: %s: %s", type(exc).__name__, exc)
        self._retry_at = self._clock.monotonic() + 2 * self._timeout_s

    async def close(self) -> None:
        """Close connections."""
        if self._redis is not None:
            await self._redis.aclose()
