"""A map of shares by layer and expert, on levels that are the same in every report and say how much each is."""

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from .pictures import colour, picture

COLOURS = ("#7f9bb8", "#4f9d69", "#d9b62f", "#dd7f2e", "#c0341d")
"""Colours of the levels, the mildest first, that stand out in light and in dark."""

ABSENT = "#8a8f98"
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
    rows, experts = share_LE.shape
    ends = [end for end, _ in levels]
    norm = BoundaryNorm([min(0.0, ends[0] - 1), *ends[:-1], np.inf], len(ends))
    used = list(colours[: len(ends)])

    def draw(figure: Figure, is_phone: bool) -> None:
        axes = figure.subplots()
        cells = np.ma.masked_invalid(share_LE)
        palette = ListedColormap(used)
        palette.set_bad((0, 0, 0, 0))
        axes.imshow(cells, aspect="auto", cmap=palette, norm=norm, interpolation="nearest")
        axes.grid(visible=False)
        axes.set(xlabel="expert", title="layer")
        step = max(1, -(-rows // 16))
        axes.set_yticks(range(0, rows, step), [str(layers[at]) for at in range(0, rows, step)])
        across = max(1, -(-experts // (8 if is_phone else 32)))
        across = next(size for size in (1, 2, 4, 8, 16, 32, 64, 128, across) if size >= across)
        axes.set_xticks(range(0, experts, across))
        if rows <= MOST_LABELLED and experts <= MOST_LABELLED:
            for row, column in np.ndindex(rows, experts):
                if np.isfinite(share_LE[row, column]):
                    text = number(share_LE[row, column])
                    axes.text(column, row, text, ha="center", va="center", color="#ffffff", fontsize=7)
        handles = [Patch(color=each, label=words) for each, (_, words) in zip(used, levels, strict=True)]
        if np.isnan(share_LE).any():
            handles.append(Patch(facecolor="none", edgecolor=colour("faint"), label=empty))
        figure.legend(handles=handles, loc="outside lower left", ncols=3 if is_phone else 6, fontsize=7.5)

    tall = 0.22 if rows <= MOST_LABELLED else 0.085
    return picture(draw, label=label, phone=1.1 + max(0.8, tall * rows), desk=1.0 + max(0.8, tall * rows))


def number(value: float) -> str:
    """A share in a cell."""
    return f"{value:.1f}" if value < 9.95 else f"{value:.0f}"
