"""`python -m cluster template ...`: templates, straight in the database."""

from __future__ import annotations

import argparse
import asyncio
import getpass
import json
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final, TypeVar

from actors.templates import Templates
from carillon.clock import SystemClock, rfc3339
from carillon.errors import ClusterError, NotFoundError
from carillon.metrics import Stats
from carillon.settings import Settings
from carillon.templates import Template, check_id, contents
from cluster.admin import database
from stores.postgres.pool import open_pool
from stores.postgres.templates import TemplateStore
from stores.postgres.tenants import TenantStore

T = TypeVar("T")
_PATIENCE_S: Final = 30.0


def _with_templates(
    options: argparse.Namespace,
    settings: Settings,
    work: Callable[[Templates, TenantStore, float], Awaitable[T]],
) -> T:
    settings = database(options, settings)

    async def run() -> T:
        pool = await open_pool(settings.postgres, 1)
        clock = SystemClock()
        templates = Templates(TemplateStore(pool), settings.template, clock, Stats())
        try:
            return await work(templates, TenantStore(pool), clock.monotonic() + _PATIENCE_S)
        finally:
            await templates.close()
            await pool.close()

    return asyncio.run(run())


def _who() -> str:
    try:
        return f"cli:{getpass.getuser()}"
    except (OSError, KeyError):  # a uid without a name
        return f"cli:{os.getuid()}"


def _read(file: str) -> Any:
    try:
        return json.loads(Path(file).read_text())
    except (OSError, ValueError) as exc:
        raise ClusterError(f"cannot read JSON from {file}: {exc}") from None


def _put(options: argparse.Namespace, settings: Settings) -> int:
    document = _read(options.file)

    async def work(templates: Templates, tenants: TenantStore, deadline: float) -> int:
        name = check_id(options.template)
        if await tenants.tenant(options.tenant) is None:
            raise NotFoundError(f"there is no tenant {options.tenant!r}", "tenant")
        full = await templates.check(document, deadline)
        version = await templates.store.put(options.tenant, name, full, _who())
        await tenants.record_audit(options.tenant, _who(), "template.put", name, version=version)
        return version

    version = _with_templates(options, settings, work)
    print(
        f"{options.template} is version {version}; it holds everywhere within {settings.template.cache_s:g} s"
    )
    return 0


async def _found(templates: Templates, options: argparse.Namespace) -> Template:
    found = await templates.store.get(options.tenant, options.template, options.version)
    if found is None:
        raise NotFoundError(
            f"tenant {options.tenant!r} has no such template {options.template!r}", "template"
        )
    return found


def _show(options: argparse.Namespace, settings: Settings) -> int:
    found = _with_templates(options, settings, lambda templates, _, __: _found(templates, options))
    print(json.dumps(found.document, indent=2, ensure_ascii=False))
    return 0


def _list(options: argparse.Namespace, settings: Settings) -> int:
    async def work(templates: Templates, _tenants: TenantStore, _deadline: float) -> list[Template]:
        found: list[Template] = []
        while True:
            page = await templates.store.page(options.tenant, found[-1].id if found else None, 500)
            found += page
            if len(page) < 500:
                return found

    for one in _with_templates(options, settings, work):
        locales = ",".join(sorted({locale for _, texts in contents(one.document) for locale in texts}))
        print(f"{one.id}@{one.version}  {rfc3339(one.created_ms)}  {locales}")
    return 0


def _versions(options: argparse.Namespace, settings: Settings) -> int:
    rows = _with_templates(
        options, settings, lambda templates, _, __: templates.store.versions(options.tenant, options.template)
    )
    for version, created_ms, who in rows:
        print(f"{options.template}@{version}  {rfc3339(created_ms)}  {who}")
    return 0


def _delete(options: argparse.Namespace, settings: Settings) -> int:
    async def work(templates: Templates, tenants: TenantStore, _deadline: float) -> int:
        count = await templates.store.delete(options.tenant, options.template)
        if not count:
            raise NotFoundError(f"tenant {options.tenant!r} has no template {options.template!r}", "template")
        await tenants.record_audit(options.tenant, _who(), "template.delete", options.template)
        return count

    print(f"{options.template} is deleted, {_with_templates(options, settings, work)} versions")
    return 0


def _preview(options: argparse.Namespace, settings: Settings) -> int:
    params: dict[str, Any] = {} if options.params is None else _read(options.params)
    for assignment in options.param or ():
        name, equals, value = assignment.partition("=")
        if not equals:
            raise ClusterError(f"expected --param NAME=VALUE, got {assignment!r}")
        try:
            params[name] = json.loads(value)
        except ValueError:
            params[name] = value

    async def work(templates: Templates, _tenants: TenantStore, deadline: float) -> Any:
        if options.file is None:
            template = await _found(templates, options)
        else:
            template = Template(options.template, 0, await templates.check(_read(options.file), deadline))
        return await templates.render(template, options.locale, params, deadline)

    rendered = _with_templates(options, settings, work)
    told = {"locale": rendered.locale, **rendered.members, "channels": rendered.channels}
    print(json.dumps(told, indent=2, ensure_ascii=False))
    return 0


HANDLERS: Final = {
    "template_put": _put,
    "template_show": _show,
    "template_list": _list,
    "template_versions": _versions,
    "template_delete": _delete,
    "template_preview": _preview,
}
"""By the name that cluster/cli.py uses."""
