"""The one template of every HTML page: self-contained, for phones first, light and dark.

Enters: a heading, one sentence under it, sections, and circumstances. Leaves: a page without any address in it. A page
has one heading, which says the outcome; date, command and machine stand at its end.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment
from markupsafe import Markup, escape

from ..errors import printable
from ..files.circumstances import machine_text
from .style import STYLE

EMPTY = Markup()


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """A part of a page.

    Attributes:
        title: Its heading; empty leaves it out.
        text: A paragraph under it.
        body: HTML: tables and pictures.
        folded: Whether the body is shown only when it is opened.
    """

    title: str = ""
    text: str = ""
    body: Markup = EMPTY
    folded: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """A column of a table.

    Attributes:
        name: Its heading.
        numeric: Whether it holds numbers, which stand at the right.
        breaks: Whether long words in it may be broken.
    """

    name: str
    numeric: bool = False
    breaks: bool = False

    @property
    def style(self) -> str:
        """The class of its cells."""
        return "n" if self.numeric else "b" if self.breaks else "t"


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: What it says.
        small: A line under it, in small letters.
        outcome: `pass`, `regressed` or `undecided`, which colours it; empty leaves it as it is.
        code: Whether the text is shown as it is typed.
    """

    text: str
    small: str = ""
    outcome: str = ""
    code: bool = False


def render(
    *,
    title: str,
    outcome: str = "",
    lead: str = "",
    sections: Sequence[Section],
    circumstances: Mapping[str, Any],
) -> str:
    """A whole page.

    Args:
        title: The heading, which says what came out.
        outcome: `pass`, `regressed` or `undecided`, which colours the heading; empty leaves it as it is.
        lead: The sentence under it.
        sections: The parts, in order.
        circumstances: As `files.circumstances.circumstances` gives them.
    """
    machine = circumstances.get("machine")
    text = _environment.from_string(PAGE).render(
        title=title,
        outcome=outcome,
        lead=lead,
        sections=sections,
        date=str(circumstances.get("date") or "").replace("T", " ").replace("Z", " UTC"),
        command=circumstances.get("command"),
        machine=machine_text(machine) if machine else "",
        versions=", ".join(f"{name} {version}" for name, version in (circumstances.get("versions") or {}).items()),
        style=Markup(STYLE),
    )
    return printable(text)


def table(columns: Sequence[Column], rows: Sequence[Sequence[str | Cell]]) -> Markup:
    """A table that is scrolled sideways where it is wider than the page, with a shadow as a hint."""
    cells = [[cell if isinstance(cell, Cell) else Cell(text=cell) for cell in row] for row in rows]
    return Markup(_environment.from_string(TABLE).render(columns=columns, rows=cells))


def listing(pairs: Mapping[str, str]) -> Markup:
    """Names and what each is, one under the other on a phone."""
    return Markup(_environment.from_string(LISTING).render(pairs=pairs))


def box(title: str, text: str) -> Markup:
    """A finding that stands out."""
    return Markup(_environment.from_string(BOX).render(title=title, text=text))


def soft(text: str) -> Markup:
    """A name that may be broken behind its dots, slashes and brackets."""
    return Markup(re.sub(r"([./\]])", r"\1<wbr>", str(escape(text))))


_environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
_environment.filters["soft"] = soft

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ title }}</title>
<style>{{ style }}</style></head><body><main>
<h1{% if outcome %} class="{{ outcome }}"{% endif %}>{{ title }}</h1>
{% if lead %}<p class="lead">{{ lead }}</p>{% endif %}

{% for section in sections %}
<section>{% if section.title %}<h2>{{ section.title }}</h2>{% endif %}
{% if section.text %}<p>{{ section.text }}</p>{% endif %}
{% if section.folded %}<details><summary>Show</summary>{{ section.body }}</details>
{% else %}{{ section.body }}{% endif %}</section>
{% endfor %}
<footer>
{% if date %}<p>{{ date }}</p>{% endif %}
{% if command %}<p><code>{{ command }}</code></p>{% endif %}
{% if machine %}<p>{{ machine }}</p>{% endif %}
{% if versions %}<p>{{ versions }}</p>{% endif %}
</footer></main></body></html>
"""

TABLE = """<div class="wide" tabindex="0"><table><thead><tr>
{% for column in columns %}<th{% if column.numeric %} class="n"{% endif %}>{{ column.name }}</th>{% endfor %}
</tr></thead><tbody>
{% for row in rows %}<tr>{% for cell in row %}
<td class="{{ columns[loop.index0].style }} {{ cell.outcome }}">
{%- if cell.code %}<code>{{ cell.text }}</code>
{%- elif columns[loop.index0].breaks %}{{ cell.text|soft }}{% else %}{{ cell.text }}{% endif %}
{%- if cell.small %}<small>{{ cell.small }}</small>{% endif %}</td>
{%- endfor %}</tr>
{% endfor %}</tbody></table></div>"""

LISTING = """<dl>{% for name, value in pairs.items() %}<dt>{{ name }}</dt><dd>{{ value }}</dd>{% endfor %}</dl>"""

BOX = """<div class="box"><p><b>{{ title }}</b></p><p>{{ text }}</p></div>"""
