"""Pictures of a page: panels drawn by matplotlib as SVG, side by side at a desk and one under the other on a phone.

Enters: functions that draw on axes. Leaves: HTML. Colours are written as the page's variables, so that one picture
serves light and dark; letters stay letters. Margins are fixed, which spares matplotlib most of its work.
"""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from cycler import cycler
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogFormatter, MaxNLocator

from .style import LIGHT

WIDTH, HEIGHT = 3.75, 2.35
"""Size of a panel in inches of 96 pixels: a phone's width."""

LEFT, RIGHT, TOP, BOTTOM = 0.58, 0.08, 0.27, 0.42
"""Margins around the axes, inches."""

_MARKS = {name: f"#0{index:x}0{index:x}f{index:x}" for index, name in enumerate(LIGHT, start=1)}
"""A colour that stands for each of the page's while matplotlib draws."""

FONTS = "system-ui, 'DejaVu Sans', sans-serif"

LEFT_OUT = re.compile(
    r"<metadata>.*?</metadata>|<!--.*?-->|<defs>\s*<style type=\"text/css\">.*?</style>\s*</defs>", re.DOTALL
)
"""Parts of an SVG that a page has no use for."""

Draw = Callable[[Axes], None]
"""Draws on axes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """One pair of axes.

    Attributes:
        title: What is shown, with its unit.
        draw: Draws it.
        below: The name of the axis below.
        width: Inches.
        height: Inches.
        grid: Whether there are lines across.
        counted: Whether the axis below counts whole things, so that no tick lies between two.
    """

    title: str
    draw: Draw
    below: str = ""
    width: float = WIDTH
    height: float = HEIGHT
    grid: bool = True
    counted: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """A line of the legend: the page's colour, or a plain one, the words, and the sign: `line`, `area` or `dots`."""

    colour: str
    words: str
    sign: str = "line"


def colour(name: str) -> str:
    """The colour that stands for one of the page's: `ink`, `faint`, `line`, `good`, `bad`, `open`, `c1` to `c7`."""
    return _MARKS[name]


def series(index: int) -> str:
    """The colour of a line by its place."""
    return _MARKS[f"c{index % 7 + 1}"]


def picture(
    panels: Sequence[Panel], *, label: str, legend: Sequence[Mark] = (), caption: str = "", columns: int = 2
) -> Markup:
    """Panels with a legend under them.

    Args:
        panels: The panels.
        label: What they show, for those who do not see it.
        legend: What the colours are.
        caption: A line under it.
        columns: Panels side by side at a desk.
    """
    drawn = [Markup("<div>{}</div>").format(Markup(_svg(panel))) for panel in panels]
    return _framed(Markup('<div class="panels p{}">{}</div>').format(columns, _joined(drawn)), label, legend, caption)


def picture_in_two(phone: Panel, desk: Panel, *, label: str, legend: Sequence[Mark] = (), caption: str = "") -> Markup:
    """One picture in two sizes, of which a page shows the one that fits; the arguments are those of `picture`."""
    sizes = [
        Markup('<div class="{}">{}</div>').format(name, Markup(_svg(panel)))
        for name, panel in (("phone", phone), ("desk", desk))
    ]
    return _framed(_joined(sizes), label, legend, caption)


def _framed(drawn: Markup, label: str, legend: Sequence[Mark], caption: str) -> Markup:
    marks = [
        Markup('<li><i class="{}" style="--mark: {}"></i>{}</li>').format(
            mark.sign, f"var(--{mark.colour})" if mark.colour in LIGHT else mark.colour, mark.words
        )
        for mark in legend
    ]
    under = Markup("<ul>{}</ul>").format(_joined(marks)) if marks else Markup()
    said = Markup("<figcaption>{}</figcaption>").format(caption) if caption else Markup()
    return Markup('<figure role="img" aria-label="{}">{}{}{}</figure>').format(label, drawn, under, said)


def _joined(parts: Sequence[Markup]) -> Markup:
    return Markup().join(parts)


def settings() -> Any:
    """Matplotlib's settings for the page's look."""
    ink, faint, line = _MARKS["ink"], _MARKS["faint"], _MARKS["line"]
    return {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": line,
        "axes.labelcolor": faint,
        "axes.titlecolor": ink,
        "axes.titlesize": 9,
        "axes.titlelocation": "left",
        "axes.prop_cycle": cycler(color=[series(at) for at in range(7)]),
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "grid.color": line,
        "grid.linewidth": 0.6,
        "xtick.color": line,
        "ytick.color": line,
        "xtick.labelcolor": faint,
        "ytick.labelcolor": faint,
        "text.color": ink,
        "font.size": 8.5,
        "font.family": "DejaVu Sans",
        "legend.frameon": False,
        "legend.labelcolor": ink,
        "svg.fonttype": "none",
        "svg.hashsalt": "arriero",
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "savefig.facecolor": "none",
    }


def _svg(panel: Panel) -> str:
    """A panel as SVG that takes the width it is given."""
    buffer = io.StringIO()
    with matplotlib.rc_context(settings()):
        figure = Figure(figsize=(panel.width, panel.height))
        bottom = BOTTOM if panel.below else BOTTOM - 0.16
        inner = (panel.width - LEFT - RIGHT) / panel.width, (panel.height - TOP - bottom) / panel.height
        axes = figure.add_axes((LEFT / panel.width, bottom / panel.height, *inner))
        axes.grid(visible=panel.grid, axis="y")
        axes.yaxis.set_major_formatter(FuncFormatter(_short))
        if panel.counted:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.draw(axes)
        if axes.get_yscale() == "log":
            axes.yaxis.set_minor_formatter(_Between())
        figure.text(0.06 / panel.width, 1 - 0.04 / panel.height, panel.title, va="top", fontsize=9)
        axes.set_xlabel(panel.below)
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Type": None, "Format": None})
    text = buffer.getvalue()
    text = LEFT_OUT.sub("", text[text.index("<svg") :])
    text = re.sub(r'\sxmlns(:xlink)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'\sid="[a-z]+[a-z0-9.]*_\d+"', "", text)  # matplotlib counts anew in each figure
    text = text.replace("font-family: 'DejaVu Sans'", f"font-family: {FONTS}")
    for name, mark in _MARKS.items():
        text = text.replace(mark, f"var(--{name})")
    return re.sub(r'^<svg width="[^"]*" height="[^"]*"', "<svg", text)


class _Between(LogFormatter):
    """Numbers between the powers of ten, where there is room for some, as decimals, which are short."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return _short(x) if super().__call__(x, pos) else ""


def _short(value: float, _: object = None) -> str:
    """A tick's number in few letters."""
    return "0" if value == 0 else f"{value:,.0f}" if 100 <= abs(value) < 100000 else f"{value:.5g}"
