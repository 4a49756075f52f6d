"""What a template can do, and what it cannot."""

from __future__ import annotations

import contextlib
import html
import time
from typing import Any

import babel
import pytest
from hypothesis import given
from hypothesis import strategies as st

from carillon.template_language import FILTERS, OWN_FILTERS, PLURALS, Language, TemplateFaultError

LANGUAGE = Language(max_steps=2000, max_length=4096)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=30)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


def render(source: str, locale: str = "en", *, html: bool = True, **params: Any) -> str:
    return LANGUAGE.render(source, params, locale, html=html)


def fault(source: str, **params: Any) -> str:
    with pytest.raises(TemplateFaultError) as caught:
        render(source, **params)
    return str(caught.value)


def test_what_a_text_may_say() -> None:
    """Values, conditions, loops and filters."""
    assert render("Hi {{ user.name }}!", user={"name": "Ada"}) == "Hi Ada!"
    assert render("{% if n > 1 %}many{% else %}one{% endif %}", n=2) == "many"
    assert render(
        "{% for x in xs %}{{ loop.index }}:{{ x }}{{ ', ' if not loop.last }}{% endfor %}", xs=["a", "b"]
    )
    assert render("{{ xs|join(', ') }}", xs=["a", "b"]) == "a, b"
    assert render("{{ 'x' ~ n }}", n=1) == "x1"
    assert render("{{ who|default('you') }}") == "you"
    assert render("{% for k, v in d|dictsort %}{{ k }}{{ v }}{% endfor %}", d={"b": 2, "a": 1}) == "a1b2"
    assert render("no braces at all") == "no braces at all"


@pytest.mark.parametrize(
    ("source", "word"),
    [
        ("{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}", "macro"),
        ("{% include 'x' %}", "include"),
        ("{% import 'x' as x %}", "import"),
        ("{% extends 'x' %}", "extends"),
        ("{% for x in xs recursive %}{{ loop(x) }}{% endfor %}", "recursive"),
        ("{{ 9 ** 9 ** 9 }}", "pow"),
        ("{% filter upper %}x{% endfilter %}", "filterblock"),
        ("{{ 'a' * 1000000000 }}", "numbers"),
        ("{{ [1] * 1000000000 }}", "numbers"),
        ("{{ '%1000000000d' % 3 }}", "numbers"),
        ("{% for a in range(1000000) %}x{% endfor %}", "steps"),
        ("{% for a in range(1000) %}{% for b in range(1000) %}x{% endfor %}{% endfor %}", "steps"),
        ("{% set s = 'aaaaaaaa' %}" + "{% set s = s + s %}" * 40 + "{{ s }}", "longer"),
        ("{% set s = 'aaaaaaaa' %}" + "{% set s = s ~ s %}" * 40 + "{{ s }}", "longer"),
        ("{% set s = 'aaaaaaaa' %}" + "{% set s = s|replace('a', 'aaaaaaaa') %}" * 40 + "{{ s }}", "longer"),
        ("{% set s = [1, 2] %}" + "{% set s = s + s %}" * 40 + "{{ s }}", "longer"),
        ("{% set n = 99 %}" + "{% set n = n * n %}" * 40 + "{{ n }}", "large"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ x.__init__.__globals__ }}", "unsafe"),
        ("{{ 'a'.format() }}", "callable"),
        ("{{ 'a'.join(['b']) }}", "callable"),
        ("{{ cycler('a') }}", "undefined"),
        ("{{ lipsum(5) }}", "undefined"),
        ("{{ 'x'|center(1000000000) }}", "center"),
        ("{{ 1 / 0 }}", "division"),
        ("{% if %}", "line 1"),
        ("{{ missing }}", "missing"),
        ("{{ x.y }}", "attribute"),
        ("{{ n|plural({'one': 'x'}) }}", "other"),
        ("{{ n|plural({'some': 'x', 'other': 'y'}) }}", "plural form"),
        ("{{ 'x'|plural({'other': 'y'}) }}", "number"),
        ("{{ n|currency('EURO') }}", "three letters"),
        ("{{ n|date('tiny') }}", "short"),
        ("{{ 'tomorrow'|date }}", "time"),
        ("{{ '\\ud800'|date }}", "time"),
        ("{{ carillon_take }}", "undefined"),
        ("{{ 'x' | carillon concat }}", "line 1"),
        ("((" * 500, ""),
    ],
)
def test_what_it_may_not(source: str, word: str) -> None:
    """Nothing that runs long, grows without bound or looks behind values; the reason is told, and soon."""
    began = time.perf_counter()
    if source.startswith("(("):
        source = "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}"
    assert word in fault(source, x={}, n=1, xs=[1])
    assert time.perf_counter() - began < 60


@given(st.text(max_size=60))
def test_html_is_escaped_unless_asked_for(value: str) -> None:
    """A parameter never brings markup along; without HTML it is shown as it is."""
    escaped = render("{{ v }}|{{ v ~ '' }}|{{ [v]|join }}", v=value)
    assert not {"<", ">", '"', "'"} & set(escaped)
    assert html.unescape(escaped) == html.unescape(f"{html.escape(value)}|" * 2 + html.escape(value))
    assert render("{{ v }}", v=value, html=False) == value
    assert render("{{ v|safe }}", v=value) == value
    assert "<" not in render("{{ 'a'|replace('a', v) }}", v=value)


@given(st.sampled_from(["en", "de", "ru", "ar", "pl", "pt-BR", "ja", "cy"]), st.integers(0, 10**6))
def test_plurals_are_those_of_the_language(locale: str, n: int) -> None:
    """The category is CLDR's, an exact form wins, `#` is the number as the language writes it."""
    category = babel.Locale.parse(locale.replace("-", "_")).plural_form(n)
    assert category in PLURALS
    forms = {name: name for name in PLURALS}
    assert render("{{ n|plural(f) }}", locale, n=n, f=forms) == category
    assert render("{{ n|plural(f) }}", locale, n=n, f={f"={n}": "exact", **forms}) == "exact"
    shown = render("{{ n|number }}", locale, n=n)
    assert render("{{ n|plural({'other': '# x'}) }}", locale, n=n) == f"{shown} x"


def test_plurals_of_known_languages() -> None:
    """What a reader of the language expects."""
    files = "{{ n|plural({'one': '# файл', 'few': '# файла', 'many': '# файлов', 'other': '# файла'}) }}"
    assert [render(files, "ru", n=n) for n in (1, 3, 5, 21)] == ["1 файл", "3 файла", "5 файлов", "21 файл"]
    others = (
        "{{ n|plural({'=0': 'Nobody', '=1': who, 'one': who ~ ' and # other', "
        "'other': who ~ ' and # others'}, 1) }}"
    )
    assert [render(others, n=n, who="Ada") for n in (0, 1, 2, 1201)] == [
        "Nobody", "Ada", "Ada and 1 other", "Ada and 1,200 others",
    ]  # fmt: skip
    ordinal = "{{ n|ordinal({'one': '#st', 'two': '#nd', 'few': '#rd', 'other': '#th'}) }}"
    assert [render(ordinal, n=n) for n in (1, 2, 3, 4, 11, 22)] == [
        "1st",
        "2nd",
        "3rd",
        "4th",
        "11th",
        "22nd",
    ]


def test_formats_of_languages() -> None:
    """Numbers, money and times as the language writes them, in the zone that is asked for."""
    assert render("{{ n|number }}", "de", n=1234567.5) == "1.234.567,5"
    assert render("{{ n|currency('USD') }}", "en", n=9.5) == "$9.50"
    assert render("{{ n|percent }}", "en", n=0.25) == "25%"
    at = "2026-03-04T23:30:00Z"
    assert render("{{ at|date('short') }}", "en", at=at) == "3/4/26"
    assert render("{{ at|date('short', 'Europe/Vienna') }}", "de", at=at) == "05.03.26"
    assert render("{{ at|time('short', 'America/New_York') }}", "de", at=at) == "18:30"
    assert render("{{ n|number }}", "xx-YY", n=1000) == "1,000"  # no such language: English


@given(st.text("{}%# abn|+*~().'[]0123456789rangeforinif", max_size=80), VALUES)
def test_any_source_ends_well(source: str, value: Any) -> None:
    """Whatever the source and its parameters: a text within the limit, or a fault."""
    try:
        made = render(source, n=value, a=value, b=3)
    except TemplateFaultError:
        return
    assert len(made) <= 4096 or "{" not in source


@given(st.sampled_from([*FILTERS, *OWN_FILTERS]), VALUES, st.lists(VALUES, max_size=2))
def test_any_filter_ends_well(name: str, value: Any, more: list[Any]) -> None:
    """Whatever a filter is given: a text within the limit, or a fault."""
    arguments = ", ".join(f"m{i}" for i in range(len(more)))
    params = {f"m{i}": one for i, one in enumerate(more)}
    with contextlib.suppress(TemplateFaultError):
        assert len(render(f"{{{{ v|{name}({arguments}) }}}}", v=value, **params)) <= 4096


def test_names_are_the_parameters() -> None:
    """What a text uses and does not set itself."""
    source = (
        "{% set a = 1 %}{% for i in items %}{{ i.x }}{{ a }}{{ who|default('') }}{% endfor %}{{ range(2) }}"
    )
    assert LANGUAGE.names(source) == {"items", "who"}


def test_values_keep_their_type() -> None:
    """An expression's value is what it is, not its text."""
    body = {"data": {"ids": [1, 2], "n": 3}}
    assert LANGUAGE.value("body.data.ids", {"body": body}) == [1, 2]
    assert LANGUAGE.value("body.data.n + 1", {"body": body}) == 4
    for wrong in ("body.nothing", "body.data.ids * 9", "", "a }} {{ b"):
        with pytest.raises(TemplateFaultError):
            LANGUAGE.value(wrong, {"body": body})
