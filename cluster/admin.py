"""Commands that only need the database: tenants, keys, migrations, partitions."""

from __future__ import annotations

import argparse
import asyncio
import getpass
import json
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final, TypeVar

from carillon import limits, policy
from carillon.clock import SystemClock, rfc3339
from carillon.errors import ClusterError, SettingsError
from carillon.settings import Settings
from cluster.run_folder import RunFolder
from stores.postgres.migrate import ensure_partitions, migrate
from stores.postgres.pool import connect, open_pool, translated
from stores.postgres.tenants import TenantStore

T = TypeVar("T")


def database(options: argparse.Namespace, settings: Settings) -> Settings:
    """Settings with the DSN to use: the option, the setting, or that of the run in the data folder."""
    dsn = options.dsn or settings.postgres.dsn
    if not dsn:
        try:
            dsn = json.loads(RunFolder(settings.cluster.runtime_dir).dev_file.read_text())["postgresDsn"]
        except (OSError, ValueError, KeyError):
            raise ClusterError(
                "no database: give --dsn, set CARILLON_POSTGRES_DSN, or run `up` in "
                f"{settings.cluster.runtime_dir}"
            ) from None
    return settings.with_values(postgres={"dsn": dsn})


def _with_store(settings: Settings, work: Callable[[TenantStore], Awaitable[T]]) -> T:
    async def run() -> T:
        pool = await open_pool(settings.postgres, 1)
        try:
            return await work(TenantStore(pool))
        finally:
            await pool.close()

    return asyncio.run(run())


def _audited(
    settings: Settings,
    work: Callable[[TenantStore], Awaitable[T]],
    tenant: str,
    action: str,
    target: str = "",
    **detail: Any,
) -> T:
    """Do something and note who did it. What failed is not noted: it changed nothing."""

    async def both(store: TenantStore) -> T:
        done = await work(store)
        await store.record_audit(tenant, f"cli:{login()}", action, target, **detail)
        return done

    return _with_store(settings, both)


def login() -> str:
    """Who runs this command."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a uid without a name
        return str(os.getuid())


def _migrate(options: argparse.Namespace, settings: Settings) -> int:
    applied = asyncio.run(migrate(database(options, settings).postgres.dsn))
    for name in applied:
        print(name)
    print(f"{len(applied)} migrations applied" if applied else "the database is up to date")
    return 0


def _partitions(options: argparse.Namespace, settings: Settings) -> int:
    if options.months < 0:
        raise SettingsError(f"expected --months to be at least 0, got {options.months}")

    async def run() -> list[str]:
        connection = await connect(database(options, settings).postgres.dsn)
        try:
            with translated():
                return await ensure_partitions(connection, SystemClock().now_ms(), options.months)
        finally:
            await connection.close()

    made = asyncio.run(run())
    for name in made:
        print(name)
    print(f"{len(made)} partitions made" if made else "all partitions are there")
    return 0


def _tenant_create(options: argparse.Namespace, settings: Settings) -> int:
    tenant = _audited(
        database(options, settings),
        lambda store: store.create_tenant(options.tenant, options.client_secret),
        options.tenant,
        "tenant.create",
    )
    print(f"tenant {tenant.tenant}")
    if options.client_secret is None:
        print(f"client secret {tenant.client_secret}")
    return 0


def _tenant_list(options: argparse.Namespace, settings: Settings) -> int:
    for name in _with_store(database(options, settings), lambda store: store.tenants()):
        print(name)
    return 0


def _tenant_rotate(options: argparse.Namespace, settings: Settings) -> int:
    until_ms = SystemClock().now_ms() + round(options.overlap_s * 1000)
    secret = _audited(
        database(options, settings),
        lambda store: store.rotate_secret(options.tenant, until_ms, options.client_secret),
        options.tenant,
        "tenant.rotate_secret",
        overlapS=options.overlap_s,
    )
    if options.client_secret is None:
        print(f"client secret {secret}")
    print(
        f"the former secret is valid until {rfc3339(until_ms)}; sign with the new one from now on in "
        f"{settings.ingress.auth_cache_s:g} s"
    )
    return 0


def _tenant_jwks(options: argparse.Namespace, settings: Settings) -> int:
    document = None
    if options.file is not None:
        try:
            document = json.loads(Path(options.file).read_text())
        except (OSError, ValueError) as exc:
            raise ClusterError(f"cannot read a JWK Set from {options.file}: {exc}") from None
    where = options.url or options.file
    _audited(
        database(options, settings),
        lambda store: store.put_jwks(options.tenant, options.url, document),
        options.tenant,
        "tenant.jwks",
        source=where,
    )
    print(
        f"tokens may be signed with the keys of {where}" if where else "only the client secret signs tokens"
    )
    return 0


def _tenant_policy(options: argparse.Namespace, settings: Settings) -> int:
    default = policy.cluster_default(settings.shard)
    given = None
    if options.file is not None:
        try:
            given = json.loads(Path(options.file).read_text())
        except (OSError, ValueError) as exc:
            raise ClusterError(f"cannot read a policy from {options.file}: {exc}") from None

    async def work(store: TenantStore) -> dict[str, Any]:
        document = await store.policy(options.tenant) if given is None else given
        for assignment in options.set or ():
            policy_set(document, assignment)
        if options.file is not None or options.set:
            await store.put_policy(options.tenant, policy.validate(document))
        return document

    watch = policy.WatchRule(settings.presence.watch)
    stored = _with_store(database(options, settings), work)
    print(json.dumps(policy.complete(stored, default, watch), indent=2))
    return 0


def policy_set(document: dict[str, Any], assignment: str) -> None:
    """Apply one `member=value`, `presence.member=value` or `types.TYPE.member=value` to a policy.

    An empty value takes it out. Types may have dots of their own. Raises ClusterError for anything else.
    """
    path, equals, text = assignment.partition("=")
    where, name = document, path
    if path.startswith("types."):
        kind, _, name = path.removeprefix("types.").rpartition(".")
        where = document.setdefault("types", {}).setdefault(kind, {})
    elif path.startswith("presence."):
        name = path.removeprefix("presence.")
        where = document.setdefault("presence", {})
    if not equals or not name:
        raise ClusterError(f"expected --set member=value or types.TYPE.member=value, got {assignment!r}")
    if not text:
        where.pop(name, None)
        if path.startswith("presence.") and not where:
            del document["presence"]
        return
    try:
        where[name] = float(text)
    except ValueError:
        where[name] = text


def _key_create(options: argparse.Namespace, settings: Settings) -> int:
    scopes = options.scope or ["admin"]
    key = _audited(
        database(options, settings),
        lambda store: store.create_key(
            options.tenant, options.name, scopes, rate_per_s=options.rate, burst=options.burst
        ),
        options.tenant,
        "key.create",
        scopes=scopes,
        name=options.name,
    )
    print(key)
    return 0


def _key_list(options: argparse.Namespace, settings: Settings) -> int:
    now_ms = SystemClock().now_ms()
    for key in _with_store(database(options, settings), lambda store: store.list_keys(options.tenant)):
        state = "revoked" if key.revoked else "valid" if key.valid(now_ms) else "ended"
        made = rfc3339(key.created_ms) if key.created_ms else "-"
        used = rfc3339(key.last_used_ms) if key.last_used_ms else "never"
        more = ""
        if key.expires_ms is not None and state == "valid":
            more += f"  until {rfc3339(key.expires_ms)}"
        if key.rotated_to is not None:
            more += f"  replaced by {key.rotated_to}"
        if key.rate_per_s is not None:
            more += f"  {key.rate_per_s:g}/s, {key.burst} at once"
        scopes = ",".join(sorted(key.scopes))
        print(f"{key.key_id}  {state:<7}  made {made}  used {used}  {scopes}  {key.name}{more}")
    return 0


def _key_revoke(options: argparse.Namespace, settings: Settings) -> int:
    async def revoke(store: TenantStore) -> None:
        if not await store.revoke_key(options.tenant, options.key_id):
            raise ClusterError(f"tenant {options.tenant!r} has no valid key {options.key_id!r}")

    _audited(database(options, settings), revoke, options.tenant, "key.revoke", options.key_id)
    print(f"{options.key_id} is revoked; replicas forget it within {settings.ingress.auth_cache_s:g} s")
    return 0


def _key_rotate(options: argparse.Namespace, settings: Settings) -> int:
    now_ms = SystemClock().now_ms()
    until_ms = now_ms + round(options.overlap_s * 1000)
    key = _audited(
        database(options, settings),
        lambda store: store.rotate_key(options.tenant, options.key_id, now_ms, until_ms),
        options.tenant,
        "key.rotate",
        options.key_id,
        overlapS=options.overlap_s,
    )
    print(key)
    print(f"{options.key_id} is valid until {rfc3339(until_ms)}")
    return 0


def _key_limit(options: argparse.Namespace, settings: Settings) -> int:
    rate = None if options.off else options.rate
    _audited(
        database(options, settings),
        lambda store: store.limit_key(options.tenant, options.key_id, rate, options.burst),
        options.tenant,
        "key.limit",
        options.key_id,
        ratePerS=rate,
        burst=options.burst,
    )
    what = "no limit" if rate is None else f"{rate:g} events per second"
    print(f"{options.key_id}: {what}; replicas know within {settings.ingress.auth_cache_s:g} s")
    return 0


def _tenant_limit(options: argparse.Namespace, settings: Settings) -> int:
    settings = database(options, settings)
    if options.rate is None and not options.off:
        for name in ("burst", "overflow", "collect"):
            if getattr(options, name) is not None:
                raise SettingsError(f"--{name} goes with --rate")
        told = limits.tenant_limit(
            options.tenant, _with_store(settings, lambda store: store.limits(options.tenant))
        )
        shown = "no limit"
        if told:
            shown = f"{told[0].rate_per_s:g}/s, {told[0].burst} at once; beyond it: {_beyond(told[0])}"
        print(f"{options.tenant}: {shown}")
        return 0
    rate = None if options.off else options.rate
    _audited(
        settings,
        lambda store: store.limit_tenant(
            options.tenant, rate, options.burst, options.overflow, options.collect
        ),
        options.tenant,
        "tenant.limit",
        ratePerS=rate,
        burst=options.burst,
        overflow=options.overflow,
        collectS=options.collect,
    )
    what = "no limit" if rate is None else f"{rate:g} events per second, all keys together"
    print(f"{options.tenant}: {what}; replicas know within {settings.ingress.auth_cache_s:g} s")
    return 0


def _beyond(limit: limits.RateLimit) -> str:
    if limit.overflow == limits.DIGEST:
        return f"a digest every {limit.collect_ms / 1000:g} s"
    return "the feed alone" if limit.overflow == limits.FEED else "refused"


def _audit(options: argparse.Namespace, settings: Settings) -> int:
    records = _with_store(
        database(options, settings), lambda store: store.audit(options.tenant, options.limit)
    )
    for one in reversed(records):
        detail = " ".join(f"{name}={json.dumps(value)}" for name, value in one.detail.items())
        who = f"{rfc3339(one.at_ms)}  {one.tenant or '-'}  {one.actor}"
        print(f"{who}  {one.action}  {one.target}  {detail}".rstrip())
    return 0


HANDLERS: Final = {
    "migrate": _migrate,
    "partitions": _partitions,
    "tenant_create": _tenant_create,
    "tenant_list": _tenant_list,
    "tenant_rotate_secret": _tenant_rotate,
    "tenant_policy": _tenant_policy,
    "tenant_jwks": _tenant_jwks,
    "tenant_limit": _tenant_limit,
    "key_create": _key_create,
    "key_list": _key_list,
    "key_revoke": _key_revoke,
    "key_rotate": _key_rotate,
    "key_limit": _key_limit,
    "audit": _audit,
}
"""By the name that cluster/cli.py uses."""
