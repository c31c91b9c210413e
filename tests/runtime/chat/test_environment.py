from datetime import datetime

import pytest

from arriero.runtime.chat.environment import BrokenTemplateError, FailedTemplateError, literals, render

NOON = datetime(2025, 5, 1, 12)


def test_the_time_is_the_one_given() -> None:
    assert render("{{ strftime_now('%d %B %Y, %H') }}", {}, NOON) == "01 May 2025, 12"


@pytest.mark.parametrize(
    ("source", "written"),
    [
        ("{{ v | tojson }}", '{"b": "<é>", "a": [1, null]}'),
        ("{{ v | tojson(ensure_ascii=true, sort_keys=true) }}", '{"a": [1, null], "b": "<\\u00e9>"}'),
        ("{{ v.a | tojson(indent=1) }}", "[\n 1,\n null\n]"),
        ("{{ v.a | tojson(separators=(',', ':')) }}", "[1,null]"),
        ("{% generation %}{{ v.b }}{% endgeneration %}", "<é>"),
        ("{% for x in [1, 2, 3] %}{% if x == 2 %}{% continue %}{% endif %}{{ x }}{% endfor %}", "13"),
        ("{% for x in [1, 2, 3] %}{% if x == 2 %}{% break %}{% endif %}{{ x }}{% endfor %}", "1"),
        ("{% set n = namespace(x=1) %}{% set n.x = n.x + 1 %}{{ n.x }}{{ dict(a=n.x) }}", "2{'a': 2}"),
        ("{{ dict.fromkeys(['a'], 0) }}{{ unset is defined }}{{ unset }}", "{'a': 0}False"),
    ],
)
def test_templates_find_what_transformers_gives_them(source: str, written: str) -> None:
    assert render(source, {"v": {"b": "<é>", "a": [1, None]}}, NOON) == written


@pytest.mark.parametrize(
    "source", ["{% for %}", "{{ 'a", "{% endif %}", "{% unknown %}", "{{ x | nothing }}", "{% if x %}"]
)
def test_a_template_that_is_no_program_is_broken(source: str) -> None:
    with pytest.raises(BrokenTemplateError, match="line 1"):
        render(source, {}, NOON)


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no') }}",
        "{{ x.y.z }}",
        "{{ 1 / 0 }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ dict.__init__.__globals__ }}",
        "{{ namespace.__init__ }}{{ namespace(_a=1) }}",
        "{% set n = namespace() %}{% set n._a = 1 %}",
        "{{ messages.append(1) }}",
        "{% include 'other' %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_template_that_fails_or_reaches_out_has_failed(source: str) -> None:
    with pytest.raises(FailedTemplateError):
        render(source, {"messages": []}, NOON)


def test_stand_ins_are_written_and_not_compared_with() -> None:
    source = "{% set end = '<e>' %}{{ 'x<e>' if x == '<e>' else '<no>' }}{{ x.split('<e>')[0] }}{{ end }}{{ x[:3] }}<e>"
    assert render(source, {"x": "<e>"}, NOON, {"<e>": "E", "<e>>": "F"}) == "xEE<e>E"
    assert {"<e>", "<no>"} <= set(literals(source).split("\0"))
