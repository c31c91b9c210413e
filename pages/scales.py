"""A map of shares by layer and expert, on levels that are the same in every report and say how much each is."""

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap
from numpy.typing import NDArray

from .pictures import WIDTH, Mark, Panel, picture_in_two

COLOURS = ("#7f9bb8", "#4f9d69", "#d9b62f", "#dd7f2e", "#c0341d")
"""Colours of the levels, the mildest first, that stand out in light and in dark."""

DESK = 9.6
MOST_LABELLED = 16
"""Experts, and layers, up to which numbers are written into the cells."""

Levels = Sequence[tuple[float, str]]
"""The upper end of each level, and its words."""


def plot_shares(
    share_LE: NDArray[np.float64],
    layers: Sequence[int],
    levels: Levels,
    *,
    label: str,
    empty: str,
    colours: Sequence[str] = COLOURS,
) -> Markup:
    """Draws the map.

    Args:
        share_LE: Percent, or any number that the levels are of; NaN where there is none.
        layers: The layers' numbers.
        levels: The levels, at most as many as colours.
        label: What it shows, for those who do not see it.
        empty: Words for cells that are NaN.
        colours: A colour for each level.
    """
    rows = len(share_LE)
    tall = 0.22 if rows <= MOST_LABELLED else 0.1

    def panel(width: float, ticks: int) -> Panel:
        def draw(axes: Axes) -> None:
            _draw(axes, share_LE, layers, [end for end, _ in levels], colours, ticks)

        height = 0.75 + max(0.6, tall * rows)
        return Panel(title="layer", below="expert", draw=draw, width=width, height=height, grid=False)

    legend = [Mark(colour=shade, words=words, sign="area") for shade, (_, words) in zip(colours, levels, strict=False)]
    if np.isnan(share_LE).any():
        legend.append(Mark(colour="faint", words=empty, sign="empty"))
    return picture_in_two(panel(WIDTH, 8), panel(DESK, 32), label=label, legend=legend)


def _draw(
    axes: Axes,
    share_LE: NDArray[np.float64],
    layers: Sequence[int],
    ends: Sequence[float],
    colours: Sequence[str],
    ticks: int,
) -> None:
    rows, experts = share_LE.shape
    norm = BoundaryNorm([min(0.0, ends[0] - 1), *ends[:-1], np.inf], len(ends))
    palette = ListedColormap(list(colours[: len(ends)])).with_extremes(bad=(0, 0, 0, 0))
    axes.imshow(np.ma.masked_invalid(share_LE), aspect="auto", cmap=palette, norm=norm, interpolation="nearest")
    down = max(1, -(-rows // 16))
    axes.set_yticks(range(0, rows, down), [str(layers[at]) for at in range(0, rows, down)])
    across = next(size for size in (1, 2, 4, 8, 16, 32, 64, experts) if experts / size <= ticks)
    axes.set_xticks(range(0, experts, across))
    if rows > MOST_LABELLED or experts > MOST_LABELLED:
        return
    for row, column in np.ndindex(rows, experts):
        value = share_LE[row, column]
        if np.isfinite(value):
            is_worst = colours[int(norm(value))] == COLOURS[-1]
            shade = "#ffffff" if is_worst else "#101318"
            axes.text(column, row, number(float(value)), ha="center", va="center", color=shade, fontsize=6.5)


def number(value: float) -> str:
    """A share in a cell."""
    return f"{value:.1f}" if value < 9.95 else f"{value:.0f}"
