"""Events that name templates: found, checked, rendered, before they are parsed as others are.

Used by whoever publishes: the ingress, and shards for what was scheduled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import msgspec

from actors.template_renderer import Renderer
from carillon.clock import Clock
from carillon.event_rules import TEXTS, explain_event, is_array, is_object, text_error, tree_errors
from carillon.events import MAX_ITEMS, Prepared, ProblemError, Request
from carillon.metrics import Stats
from carillon.problems import FieldError, Problem, problem, shown
from carillon.settings import TemplateSettings
from carillon.templates import (
    Job,
    Rendered,
    Template,
    TemplateDocumentError,
    assemble,
    check_params,
    completed,
    content_for,
    content_of,
    contents,
    failed,
    parse_locale,
    parse_reference,
    plan_jobs,
    refused,
    sources,
    validate,
)
from stores.postgres.templates import TemplateStore


class _Wanted:
    """One rendering: a template for a locale with parameters, for some users of one event."""

    __slots__ = ("item", "jobs", "template", "used", "users", "variant")

    def __init__(
        self,
        item: int,
        template: Template,
        used: str,
        jobs: list[tuple[str, Job]],
        users: list[str],
        variant: str | None = None,
    ) -> None:
        self.item = item
        self.template = template
        self.used = used
        self.jobs = jobs
        self.users = users
        self.variant = variant


class Templates:
    """Templates as events use them.

    Memory: at most `template.cache_size` versions.
    """

    def __init__(self, store: TemplateStore, settings: TemplateSettings, clock: Clock, stats: Stats) -> None:
        self.store = store
        self.renderer = Renderer(settings, clock, stats)
        self._settings = settings
        self._clock = clock
        self._cache: dict[tuple[str, str, int | None], tuple[float, Template | None]] = {}

    async def close(self) -> None:
        """End the processes that render."""
        await self.renderer.close()

    # -- finding -------------------------------------------------------------------------------------

    async def find(self, tenant: str, template: str, version: int | None = None) -> Template | None:
        """A template as it was within the last `template.cache_s`."""
        key = (tenant, template, version)
        now = self._clock.monotonic()
        known = self._cache.get(key)
        if known is not None and now < known[0]:
            return known[1]
        found = await self.store.get(tenant, template, version)
        self._cache.pop(key, None)
        if len(self._cache) >= self._settings.cache_size:
            del self._cache[next(iter(self._cache))]
        self._cache[key] = (now + self._settings.cache_s, found)
        return found

    def forget(self, tenant: str, template: str) -> None:
        """It was changed here: what is known of it is read again."""
        for key in [key for key in self._cache if key[:2] == (tenant, template)]:
            del self._cache[key]

    async def check(self, document: Any, deadline: float) -> dict[str, Any]:
        """A document, complete with its parameters.

        Raises:
            TemplateDocumentError: it breaks a rule, or a text is no template.
        """
        validate(document)
        texts = list(sources(document))
        answers = await self.renderer.check(texts, deadline)
        errors = [
            FieldError(path, "a template", answer["error"])
            for (path, _), answer in zip(texts, answers, strict=True)
            if "error" in answer
        ]
        if errors:
            raise TemplateDocumentError(errors[:20])
        used = {path: set(answer["names"]) for (path, _), answer in zip(texts, answers, strict=True)}
        return completed(document, used)

    # -- rendering -----------------------------------------------------------------------------------

    async def render(
        self,
        template: Template,
        locale: str | None,
        params: dict[str, Any],
        deadline: float,
        variant: str | None = None,
    ) -> Rendered:
        """Render one template for one locale.

        Raises:
            TemplateDocumentError: the parameters do not fit.
            ProblemError: it cannot be rendered.
        """
        full = check_params(template.document, params)
        found = content_of(template, variant)
        if found is None:
            raise TemplateDocumentError([FieldError("variant", "a variant of the template", shown(variant))])
        used, jobs = plan_jobs(template, found[1], parse_locale(locale), full)
        wanted = _Wanted(0, template, used, jobs, [""], found[0])
        made: dict[int, Prepared] = {}
        await self._render([wanted], made, deadline)
        result = made[0]
        if isinstance(result, Problem):
            raise ProblemError(result)
        return result[""]

    async def note_variants(self, tenant: str, parsed: Request) -> None:
        """Note which variant is sent to whom, before it is sent. Raises StoreUnavailableError."""
        shown_ = [
            (parsed.events[index].id, rendered.template, rendered.version, rendered.variant or "")
            for index, rendered in parsed.variants.items()
            if index not in parsed.later and index not in parsed.beyond
        ]
        if shown_:
            await self.store.expose(tenant, shown_)

    async def prepare(
        self, document: Any, tenant: str, deadline: float, *, offered: bool = False
    ) -> dict[int, Prepared]:
        """Render what the events of a body want; events that break a rule are left out.

        Args:
            document: of NotPlainError.
            offered: as in `check_params`.

        Raises:
            StoreUnavailableError, UnavailableError, BusyError: not now.
        """
        items = document if is_array(document) else [document]
        made: dict[int, Prepared] = {}
        if len(items) > MAX_ITEMS:
            return made
        wanted = [
            (index, item)
            for index, item in enumerate(items)
            if is_object(item)
            and item.get("template") is not None
            and explain_event(item, recipients=not is_array(document)) is None
        ]
        ready: list[tuple[int, dict[str, Any], Template, dict[str, Any], list[str]]] = []
        for index, item in wanted:
            name, version = cast("tuple[str, int | None]", parse_reference(item["template"]))
            template = await self.find(tenant, name, version)
            if template is None:
                error = FieldError("template", "a template of this tenant", item["template"])
                made[index] = problem("invalid", f"there is no template {item['template']}", [error])
                continue
            try:
                params = check_params(template.document, item.get("params"), offered=offered)
            except TemplateDocumentError as exc:
                made[index] = refused(exc)
                continue
            ready.append((index, item, template, params, _users(item)))
        locales = await self._locales(tenant, ready)
        groups: list[_Wanted] = []
        for index, item, template, params, users in ready:
            given = parse_locale(item.get("locale"))
            by_text: dict[tuple[str | None, str | None], list[str]] = {}
            contents_: dict[str | None, dict[str, Any]] = {}
            for user in users:
                variant, content = content_for(template, tenant, user)
                contents_[variant] = content
                locale = given or parse_locale(locales.get(user))
                by_text.setdefault((variant, locale), []).append(user)
            by_used: dict[tuple[str | None, str], _Wanted] = {}
            for (variant, locale), some in by_text.items():
                used, jobs = plan_jobs(template, contents_[variant], locale, params)
                if (variant, used) in by_used:
                    by_used[variant, used].users += some
                else:
                    by_used[variant, used] = _Wanted(index, template, used, jobs, some, variant)
            groups += by_used.values()
            if not users:
                made[index] = {}
        await self._render(groups, made, deadline)
        return made

    async def _locales(
        self, tenant: str, ready: Sequence[tuple[int, Any, Template, Any, list[str]]]
    ) -> dict[str, str]:
        """One query, if a template has more than one language for somebody whose language is not given."""
        users = {
            user
            for _, item, template, _, some in ready
            if item.get("locale") is None
            and any(len(content) > 1 for _, content in contents(template.document))
            for user in some
        }
        return await self.store.locales(tenant, sorted(users)) if users else {}

    async def _render(self, groups: Sequence[_Wanted], made: dict[int, Prepared], deadline: float) -> None:
        answers = iter(await self.renderer.render([job for one in groups for _, job in one.jobs], deadline))
        by_item: dict[int, dict[str, Rendered]] = {}
        for one in groups:
            mine = [(channel, next(answers)) for channel, _ in one.jobs]
            if isinstance(made.get(one.item), Problem):
                continue
            wrong = next(((channel, answer) for channel, answer in mine if "error" in answer), None)
            if wrong is not None:
                where = "/".join(part for part in ("template", one.used, wrong[1]["member"]) if part)
                made[one.item] = failed(wrong[1]["error"], where)
                continue
            try:
                rendered = assemble(one.used, one.template.version, [(c, a["ok"]) for c, a in mine])
            except TemplateDocumentError as exc:
                made[one.item] = failed(exc.errors)
                continue
            if one.variant is not None:
                rendered = msgspec.structs.replace(rendered, variant=one.variant, template=one.template.id)
            by_item.setdefault(one.item, {}).update(dict.fromkeys(one.users, rendered))
        for item, prepared in by_item.items():
            if not isinstance(made.get(item), Problem):
                made[item] = prepared


def _users(item: dict[str, Any]) -> list[str]:
    """The recipients, each once; those that are no ids have a verdict of their own later."""
    many = item.get("userIds")
    if many is None:
        return [item["userId"]]
    rule = TEXTS["userId"]
    return list(dict.fromkeys(u for u in many if text_error("", u, rule) is None and not tree_errors(u)))
