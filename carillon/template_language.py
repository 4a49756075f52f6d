"""The language of templates: Jinja2 in a sandbox, with less of it than Jinja2 has.

A template is written by a tenant, so it is hostile until shown otherwise. What could run for long or grow
without
bound is not in the language (macros, imports, recursion, powers, products of text), what repeats is charged
to
a budget of steps, and everything that makes text is held to a length. That bounds time by itself; who renders
adds a clock all the same (actors/template_worker.py).

Only the process that renders imports this module: Jinja2 and Babel cost 30 MB.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, cast

import babel
from babel import dates, numbers
from jinja2 import Environment, StrictUndefined, TemplateSyntaxError, meta, nodes
from jinja2.exceptions import SecurityError, UndefinedError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from markupsafe import Markup, escape

from carillon.errors import InvalidInputError

PLURALS: Final = ("zero", "one", "two", "few", "many", "other")
"""CLDR's plural categories; `other` exists in every language."""
FILTERS: Final = (
    "abs", "capitalize", "default", "d", "dictsort", "e", "escape", "first", "float", "int", "join", "last",
    "length", "count", "list", "lower", "max", "min", "replace", "reverse", "round", "safe", "sort", "string",
    "sum", "title", "trim", "truncate", "unique", "upper", "urlencode",
)  # fmt: skip
"""What is taken of Jinja2's filters: none that allocates more than it was given."""
OWN_FILTERS: Final = ("plural", "ordinal", "number", "percent", "currency", "date", "time", "datetime")
FORMATS: Final = ("short", "medium", "long", "full")
_NODES: Final = (
    nodes.Template, nodes.Output, nodes.TemplateData, nodes.If, nodes.For, nodes.Assign, nodes.AssignBlock,
    nodes.With, nodes.Name, nodes.NSRef, nodes.Const, nodes.Tuple, nodes.List, nodes.Dict, nodes.Pair,
    nodes.Keyword, nodes.CondExpr, nodes.Filter, nodes.Test, nodes.Call, nodes.Getitem, nodes.Getattr,
    nodes.Slice, nodes.Concat, nodes.Compare, nodes.Operand, nodes.Add, nodes.Sub, nodes.Mul, nodes.Div,
    nodes.FloorDiv, nodes.Mod, nodes.Not, nodes.Neg, nodes.Pos, nodes.And, nodes.Or,
)  # fmt: skip


class TemplateFaultError(InvalidInputError):
    """A template that cannot be compiled or rendered. Args (positional): what is wrong with it."""

    code = "template_failed"


class _Limits:
    """What one rendering may still do; set anew for each."""

    __slots__ = ("length", "steps")

    def __init__(self) -> None:
        self.steps = 0
        self.length = 0

    def charge(self, steps: int) -> None:
        self.steps -= steps
        if self.steps < 0:
            raise TemplateFaultError("it takes more steps than a template may")

    def fits(self, length: int) -> None:
        if length > self.length:
            raise TemplateFaultError(f"it makes a value longer than {self.length} characters or entries")


def _length(value: Any) -> int:
    return len(cast("Sequence[Any]", value)) if isinstance(value, str | list | tuple | dict) else 1


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja2's sandbox with our language in it."""

    # Products and sums are looked at before they are made; named here, the compiler does not fold them
    # either.
    intercepted_binops = frozenset(("+", "*", "%"))

    def __init__(self, limits: _Limits, own: Mapping[str, Callable[..., Any]], *, html: bool) -> None:
        super().__init__(autoescape=html, undefined=StrictUndefined, cache_size=0)
        self.limits = limits
        known: dict[str, Any] = cast("Any", self).filters
        cast("Any", self).globals.clear()
        cast("Any", self).globals["range"] = self._range
        kept = {name: self._held(known[name]) for name in FILTERS}
        known.clear()
        known.update(kept)
        known["replace"] = self._replace
        known["join"] = self._join
        for name, work in own.items():
            known[name] = self._held(work)
        known[_STEPS] = self._counted
        known[_CONCAT] = self._concat

    def _held(self, work: Any) -> Any:
        """A filter whose result is held to the limit. Decorations (who gets the environment) stay."""

        def held(*args: Any, **kwargs: Any) -> Any:
            limits = self.limits
            limits.charge(1)
            done: Any = work(*args, **kwargs)
            if hasattr(done, "__next__"):
                done = list(done)
            limits.fits(_length(done))
            return done

        passed = getattr(work, "jinja_pass_arg", None)
        if passed is not None:
            held.jinja_pass_arg = passed  # type: ignore[attr-defined]
        return held

    def _range(self, *args: int) -> range:
        made = range(*args)
        self.limits.charge(len(made))
        return made

    def _counted(self, value: Any) -> list[Any]:
        """What a loop runs over: its length is charged before its first turn."""
        items: list[Any] = list(value)
        self.limits.charge(len(items))
        return items

    def _concat(self, parts: Sequence[Any]) -> Any:
        texts = [part if isinstance(part, str) else str(part) for part in parts]
        self.limits.fits(sum(map(len, texts)))
        if any(isinstance(text, Markup) for text in texts):
            return Markup("").join(texts)
        return "".join(texts)

    def _replace(self, value: Any, old: str, new: str, count: int = -1) -> Any:
        text = value if isinstance(value, str) else str(value)
        old, new = str(old), str(new)
        hits = text.count(old) if count < 0 else min(count, text.count(old))
        self.limits.charge(1)
        self.limits.fits(len(text) + hits * max(0, len(new) - len(old)))
        if self.autoescape and not isinstance(text, Markup):
            text = escape(text)
        return text.replace(old, new, count)

    def _join(self, value: Any, separator: str = "", attribute: Any = None) -> Any:
        items = [self.getitem(item, attribute) for item in value] if attribute is not None else list(value)
        self.limits.charge(len(items))
        texts = [item if isinstance(item, str) else str(item) for item in items]
        separator = str(separator)
        self.limits.fits(sum(map(len, texts)) + len(separator) * len(texts))
        if self.autoescape:
            return escape(separator).join(escape(text) for text in texts)
        return separator.join(texts)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Jinja2: an intercepted operator. Text may be added up to a length; nothing else makes text grow."""
        if operator == "+":
            self.limits.fits(_length(left) + _length(right))
        elif not _is_number(left) or not _is_number(right):
            # "%" would format, and "%1000000000d" is ten characters.
            raise TemplateFaultError(f"expected numbers on both sides of {operator!r}")
        elif operator == "*" and _bits(left) + _bits(right) > 256:
            raise TemplateFaultError("it makes a number too large")
        return super().call_binop(context, operator, left, right)

    def is_safe_callable(self, obj: Any) -> bool:
        """Jinja2: what a template may call: `range`, and nothing that it finds on its own."""
        return obj == self._range

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _check(tree)
        return cast("nodes.Template", _Bounded(self).visit(tree))


_STEPS: Final = "carillon steps"  # names that no template can write
_CONCAT: Final = "carillon concat"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _bits(value: float) -> int:
    return value.bit_length() if isinstance(value, int) else 64


class _Bounded:
    """Rewrites a tree: loops run over counted lists, and `~` makes text of a limited length."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment

    def visit(self, node: nodes.Node) -> nodes.Node:
        for field, value in node.iter_fields():
            if isinstance(value, list):
                items = cast("list[Any]", value)
                items[:] = [self.visit(item) if isinstance(item, nodes.Node) else item for item in items]
            elif isinstance(value, nodes.Node):
                setattr(node, field, self.visit(value))
        if isinstance(node, nodes.For):
            node.iter = self._filter(node.iter, _STEPS, node.lineno)
        elif isinstance(node, nodes.Concat):
            return self._filter(nodes.List(node.nodes, lineno=node.lineno), _CONCAT, node.lineno)
        return node

    def _filter(self, node: Any, name: str, line: int) -> nodes.Filter:
        made = nodes.Filter(node, name, [], [], None, None, lineno=line)
        made.set_environment(self._environment)
        return made


def _check(node: nodes.Node) -> None:
    """Refuse what is not in the language. Raises TemplateSyntaxError."""
    for child in node.iter_child_nodes():
        if not isinstance(child, _NODES):
            word = type(child).__name__.lower()
            raise TemplateSyntaxError(f"{word} is not part of the language of templates", child.lineno)
        if isinstance(child, nodes.For) and child.recursive:
            raise TemplateSyntaxError("recursive loops are not part of the language", child.lineno)
        if isinstance(child, nodes.Filter) and child.name == "plural":
            _check_plural(child)
        _check(child)


def _check_plural(node: nodes.Filter) -> None:
    """The forms of a plural, as far as they stand in the template."""
    forms = node.args[0] if node.args else None
    if not isinstance(forms, nodes.Dict):
        return
    keys = [pair.key.value for pair in forms.items if isinstance(pair.key, nodes.Const)]
    if len(keys) == len(forms.items):
        try:
            _check_forms(dict.fromkeys(keys, ""))
        except TemplateFaultError as exc:
            raise TemplateSyntaxError(str(exc), node.lineno) from None


def _check_forms(forms: Any) -> None:
    if not isinstance(forms, dict):
        raise TemplateFaultError("expected plural({'one': ..., 'other': ...})")
    names = cast("dict[Any, Any]", forms)
    for name in names:
        exact = isinstance(name, str) and name[:1] == "=" and name[1:].isdigit() and len(name) < 12
        if name not in PLURALS and not exact:
            told = f"expected a plural form to be {', '.join(PLURALS)} or =0, =1, ..., got {name!r}"
            raise TemplateFaultError(told[:200])
    if "other" not in names:
        raise TemplateFaultError("expected a plural to have the form 'other'")


class Language:
    """Compiles and renders. One at a time: not for several threads.

    Args:
        max_steps: loop turns and calls of filters in one rendering.
        max_length: characters of what one rendering makes, and of every value on the way.
        cache: compiled templates kept.
    """

    def __init__(self, max_steps: int = 10_000, max_length: int = 32_768, cache: int = 1000) -> None:
        self._limits = _Limits()
        self._max_steps = max_steps
        self._max_length = max_length
        self._locale = babel.Locale("en")
        self._locales: dict[str, babel.Locale] = {}
        own: dict[str, Callable[..., Any]] = {
            "plural": self._plural,
            "ordinal": self._ordinal,
            "number": self._number,
            "percent": self._percent,
            "currency": self._currency,
            "date": self._date,
            "time": self._time,
            "datetime": self._datetime,
        }
        self._sandboxes = {html: _Sandbox(self._limits, own, html=html) for html in (False, True)}
        self._cache_size = cache
        self._compiled: dict[tuple[str, bool], Any] = {}

    def names(self, source: str) -> set[str]:
        """Compile a source and return the parameters that it uses.

        Raises:
            TemplateFaultError: it is not a template.
        """
        self._compile(source, True)
        environment = self._sandboxes[True]
        return {name for name in meta.find_undeclared_variables(environment.parse(source)) if name != "range"}

    def render(self, source: str, params: Mapping[str, Any], locale: str = "en", *, html: bool) -> str:
        """Render a source.

        Args:
            params: JSON values by name.
            locale: whose plurals and formats hold, e.g. "pt-BR".
            html: escape what parameters bring.

        Raises:
            TemplateFaultError: it breaks a limit, or uses something that is not there.
        """
        if "{" not in source:
            return source
        template = self._compile(source, html)
        limits = self._limits
        limits.steps, limits.length = self._max_steps, self._max_length
        self._locale = self._locale_of(locale)
        made: list[str] = []
        size = 0
        try:
            for part in template.generate(params):
                made.append(part)
                size += len(part)
                limits.fits(size)
        except TemplateFaultError:
            raise
        except (SecurityError, UndefinedError) as exc:
            raise TemplateFaultError(str(exc)[:200]) from None
        except (RecursionError, MemoryError) as exc:
            raise TemplateFaultError(f"it needs too much: {type(exc).__name__}") from None
        except Exception as exc:  # filters raise what they like, assertions too: all of it is the template's
            raise TemplateFaultError(f"{type(exc).__name__}: {exc}"[:200]) from None
        return "".join(made)

    def value(self, source: str, params: Mapping[str, Any]) -> Any:
        """The value of an expression without braces, as it is: text, number, list, ...

        Raises:
            TemplateFaultError: as `render`.
        """
        found: list[Any] = []
        environment = self._sandboxes[False]
        # A filter that nobody else can name takes the value out: Jinja2's own compile_expression has no
        # limits.

        def take(value: Any) -> str:
            found.append(value)
            return ""

        cast("Any", environment).filters[_TAKE] = take
        self.render(f"{{{{ ({source}) | {_TAKE} }}}}", params, html=False)
        if not found or isinstance(found[0], StrictUndefined | tuple):  # an empty source is a tuple
            raise TemplateFaultError("it has no value")
        return found[0]

    def _compile(self, source: str, html: bool) -> Any:
        key = (source, html)
        template = self._compiled.get(key)
        if template is None:
            # What can be computed while compiling is charged, too.
            self._limits.steps, self._limits.length = self._max_steps, self._max_length
            try:
                template = self._sandboxes[html].from_string(source)
            except TemplateSyntaxError as exc:
                raise TemplateFaultError(f"line {exc.lineno}: {exc.message}"[:200]) from None
            except TemplateFaultError:
                raise
            except (RecursionError, MemoryError):
                raise TemplateFaultError("it nests too deeply") from None
            except Exception as exc:
                raise TemplateFaultError(f"{type(exc).__name__}: {exc}"[:200]) from None
            if len(self._compiled) >= self._cache_size:
                del self._compiled[next(iter(self._compiled))]
            self._compiled[key] = template
        return template

    def _locale_of(self, name: str) -> babel.Locale:
        found = self._locales.get(name)
        if found is None:
            try:
                found = babel.Locale.parse(name.replace("-", "_"))
            except (ValueError, babel.UnknownLocaleError):
                parent = name.rpartition("-")[0]
                found = self._locale_of(parent) if parent else babel.Locale("en")
            if len(self._locales) < 1000:
                self._locales[name] = found
        return found

    # -- filters -------------------------------------------------------------------------------------

    def _forms(self, value: Any, forms: Any, offset: Any, rule: Callable[[Any], str]) -> Any:
        _check_forms(forms)
        if not _is_number(value) or not math.isfinite(value) or not _is_number(offset):
            raise TemplateFaultError(f"expected a number to count by, got {str(value)[:40]!r}")
        rest = value - offset
        text = forms.get(f"={value}") if isinstance(value, int) else None
        if text is None:
            text = forms.get(rule(abs(rest)), forms["other"])
        shown = self._number(rest)
        return text.replace("#", escape(shown)) if isinstance(text, Markup) else text.replace("#", shown)

    def _plural(self, value: Any, forms: Any, offset: Any = 0) -> Any:
        """ICU's plural: exact forms first (`=0`), then the language's category; `#` is the number."""
        return self._forms(value, forms, offset, self._locale.plural_form)

    def _ordinal(self, value: Any, forms: Any) -> Any:
        """ICU's selectordinal: 1st, 2nd, 3rd."""
        return self._forms(value, forms, 0, self._locale.ordinal_form)

    def _number(self, value: Any) -> str:
        return numbers.format_decimal(_number(value), locale=self._locale)

    def _percent(self, value: Any) -> str:
        return numbers.format_percent(_number(value), locale=self._locale)

    def _currency(self, value: Any, code: Any = "EUR") -> str:
        if not isinstance(code, str) or len(code) != 3 or not code.isalpha():
            raise TemplateFaultError("expected a currency to be a code of three letters, as in ISO 4217")
        return numbers.format_currency(_number(value), code.upper(), locale=self._locale)

    def _date(self, value: Any, form: Any = "medium", zone: Any = "UTC") -> str:
        return dates.format_date(_instant(value, zone), _form(form), locale=self._locale)

    def _time(self, value: Any, form: Any = "short", zone: Any = "UTC") -> str:
        return dates.format_time(_instant(value, zone), _form(form), locale=self._locale)

    def _datetime(self, value: Any, form: Any = "medium", zone: Any = "UTC") -> str:
        return dates.format_datetime(_instant(value, zone), _form(form), locale=self._locale)


_TAKE: Final = "carillon_take"


def _number(value: Any) -> float:
    if not _is_number(value) or not math.isfinite(value) or _bits(value) > 256:
        raise TemplateFaultError(f"expected a number, got {str(value)[:40]!r}")
    return value


def _form(form: Any) -> Any:
    if form not in FORMATS:
        raise TemplateFaultError(f"expected one of {', '.join(FORMATS)}, got {str(form)[:40]!r}")
    return form


def _instant(value: Any, zone: Any) -> datetime:
    """An RFC 3339 text or milliseconds since the epoch, in a zone."""
    try:
        if isinstance(value, str):
            at = datetime.fromisoformat(value)
            at = at.replace(tzinfo=UTC) if at.tzinfo is None else at
        else:
            at = datetime.fromtimestamp(_number(value) / 1000, UTC)
        return at.astimezone(dates.get_timezone(str(zone)))
    except (ValueError, OverflowError, LookupError, OSError):
        raise TemplateFaultError(f"expected a time and a zone, got {str(value)[:40]!r}") from None
