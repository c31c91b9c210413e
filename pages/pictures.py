"""Pictures of a page: drawn by matplotlib as SVG, once for a phone and once for a desk, in the page's own colours.

Enters: a function that draws on a figure. Leaves: HTML. Colours are written as the page's variables, so that one
picture serves light and dark; letters stay letters.
"""

import io
import re
from collections.abc import Callable
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .style import LIGHT

PHONE, DESK = 3.75, 9.6
"""Widths in inches, at 96 pixels each: those of a phone's page and of a desk's."""

_MARKS = {name: f"#0{index:x}0{index:x}f{index:x}" for index, name in enumerate(LIGHT, start=1)}
"""A colour that stands for each of the page's while matplotlib draws."""

FONTS = ("DejaVu Sans", "Verdana", "sans-serif")

LEFT_OUT = re.compile(
    r"<metadata>.*?</metadata>|<!--.*?-->|<defs>\s*<style type=\"text/css\">.*?</style>\s*</defs>", re.DOTALL
)
"""Parts of an SVG that a page has no use for."""

Draw = Callable[[Figure, bool], None]
"""Draws on a figure; the second argument is whether it is a phone's."""


def colour(name: str) -> str:
    """The colour that stands for one of the page's: `ink`, `faint`, `line`, `good`, `bad`, `open`, `c1` to `c7`."""
    return _MARKS[name]


def series(index: int) -> str:
    """The colour of a line by its place."""
    return _MARKS[f"c{index % 7 + 1}"]


def picture(draw: Draw, *, label: str, phone: float, desk: float, caption: str = "") -> Markup:
    """A picture in two sizes, of which a page shows the one that fits.

    Args:
        draw: Draws it.
        label: What it shows, for those who do not see it.
        phone: Height on a phone, inches.
        desk: Height on a desk, inches.
        caption: A line under it.
    """
    small, large = _svg(draw, PHONE, phone, True), _svg(draw, DESK, desk, False)
    under = Markup("<figcaption>{}</figcaption>").format(caption) if caption else ""
    frame = Markup('<figure role="img" aria-label="{}">{}{}{}</figure>')
    sizes = [
        Markup('<div class="{}">{}</div>').format(name, Markup(svg))
        for name, svg in (("phone", small), ("desk", large))
    ]
    return frame.format(label, *sizes, under)


def settings() -> dict[str, Any]:
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


def legend_below(figure: Figure, axes: Axes, columns: int) -> None:
    """Puts the legend of an axes under all of them."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower left", ncols=columns, frameon=False)


def _svg(draw: Draw, width: float, height: float, is_phone: bool) -> str:
    buffer = io.StringIO()
    with matplotlib.rc_context(settings()):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure, is_phone)
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Type": None, "Format": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = LEFT_OUT.sub("", text)
    text = re.sub(r'\sxmlns(:xlink)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'\sid="[a-z]+[a-z0-9.]*_\d+"', "", text)  # matplotlib counts anew in each figure
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", rf"font: \1px {', '.join(_quoted(each) for each in FONTS)}", text)
    for name, mark in _MARKS.items():
        text = text.replace(mark, f"var(--{name})")
    return re.sub(r'^<svg width="[^"]*" height="[^"]*"', "<svg", text) if "viewBox" in text[:300] else text


def _quoted(font: str) -> str:
    return f"'{font}'" if " " in font else font


def escaped(text: str) -> Markup:
    """A text as HTML."""
    return escape(text)
