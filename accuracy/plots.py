"""The report's pictures: errors by layer, divergence over tokens and positions, and experts chosen otherwise."""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from ..pages.pictures import HEIGHT, WIDTH, Mark, Panel, colour, picture, picture_in_two, series
from ..pages.scales import COLOURS, plot_shares
from ..spec.choice import ADAPTER, PATCHES, PROJECTOR
from .locate.location import STEM, Location, ModelPart, Reading
from .metrics import Comparison, Estimate

KINDS = {
    "attention q, k, v": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention": ("self_attn", "self_attn.o_proj"),
    "router": ("feed_forward.router",),
    "MLP gate and up": (
        "feed_forward.gate_proj",
        "feed_forward.up_proj",
        "feed_forward.shared_expert.gate_proj",
        "feed_forward.shared_expert.up_proj",
        "mlp.fc1",
    ),
    "MLP down": ("feed_forward.down_proj", "feed_forward.shared_expert.down_proj", "mlp.fc2"),
    "experts": ("feed_forward.experts",),
    "stem, adapter, projector": (PATCHES, STEM, *ADAPTER, PROJECTOR),
}
"""Units by what they are, each a line; the vision tower's stem is at -1, adapter and projector behind its layers."""

WORDS = {"vision": "vision tower", "decoder": "decoder"}
FAINTEST = 1e-4
"""The smallest error that is shown as it is, of the largest: what is exact lies at the lower edge."""

MOVED = ((1.0, "up to 1 %"), (2.0, "1–2 %"), (5.0, "2–5 %"), (10.0, "5–10 %"), (100.0, "over 10 %"))
"""Levels of tokens that went to another expert: below 1 % is what rounding does to near ties."""

MILD_FIRST = ("#4f9d69", "#9db545", *COLOURS[2:])
"""Colours of these levels, from green to red."""


def plot_profile(location: Location) -> Markup:
    """The error of each kind of unit by layer, over what rounding explains; what is out of line is marked.

    Where the vision tower was walked, it stands beside the decoder.
    """
    parts: list[ModelPart] = ["decoder"]
    if any(reading.part == "vision" for reading in location.readings):
        parts.insert(0, "vision")

    errors = [each for reading in location.readings for each in (reading.error, reading.expected) if each > 0]
    ends = (max(min(errors) / 2, max(errors) * FAINTEST), max(errors) * 3) if errors else (1e-6, 1.0)

    def panel(part: ModelPart) -> Panel:
        def draw(axes: Axes) -> None:
            _plot_part(axes, [reading for reading in location.readings if reading.part == part], location)
            axes.set(yscale="log", ylim=ends)
            if part == "vision":
                _name_ends(axes, location)

        where = "" if len(parts) == 1 else f" in the {WORDS[part]}"
        width, height = (7.5, 3.2) if len(parts) == 1 else (WIDTH, HEIGHT)
        title = f"relative error on the reference's input{where}"
        return Panel(title=title, below="layer", draw=draw, width=width, height=height, counted=True)

    found = {kind for kind, units in KINDS.items() for reading in location.readings if reading.unit in units}
    legend = [Mark(colour=f"c{at % 7 + 1}", words=kind) for at, kind in enumerate(KINDS) if kind in found]
    legend.append(Mark(colour="ink", words="most that rounding explains", sign="dots"))
    legend += [Mark(colour="bad", words="out of line", sign="area")] if location.blame is not None else []
    label = "Error by layer"
    if len(parts) > 1:
        return picture([panel(part) for part in parts], label=label, legend=legend)
    wide = panel("decoder")
    return picture_in_two(dataclasses.replace(wide, width=WIDTH, height=2.6), wide, label=label, legend=legend)


def _plot_part(axes: Axes, readings: Sequence[Reading], location: Location) -> None:
    for at, units in enumerate(KINDS.values()):
        worst: dict[int, float] = defaultdict(float)
        for reading in readings:
            if reading.unit in units:
                worst[reading.layer] = max(worst[reading.layer], reading.error)
        if worst:
            layers = sorted(worst)
            lowest = FAINTEST * max(reading.error for reading in readings) * 1.2
            axes.plot(layers, [max(worst[each], lowest) for each in layers], "o-", color=series(at), markersize=3)
    blamed = location.part, location.layer, location.unit
    for reading in readings:
        if (reading.part, reading.layer, reading.unit) == blamed:
            axes.plot(reading.layer, reading.error, "o", color=colour("bad"), markersize=11, fillstyle="none")
            half = (max(each.layer for each in readings) + min(each.layer for each in readings)) / 2
            side, shift = ("left", 8) if reading.layer <= half else ("right", -8)
            axes.annotate(
                f"{reading.place}, {reading.unit}",
                (reading.layer, reading.error),
                textcoords="offset points",
                xytext=(shift, 8),
                ha=side,
                color=colour("bad"),
            )
    expected = _typical(readings)
    axes.plot(list(expected), list(expected.values()), ":", color=colour("ink"))


def _name_ends(axes: Axes, location: Location) -> None:
    """Names what lies in front of the vision tower's layers, and behind them."""
    last = max(reading.layer for reading in location.readings if reading.part == "vision")
    ticks = MaxNLocator(6, integer=True).tick_values(0, last)
    inner = [int(tick) for tick in ticks if tick >= 0 and last / 12 <= tick + 1 and last - tick >= last / 8]
    axes.set_xticks([-1, *inner, last], ["stem", *map(str, inner), "proj."])


def _typical(readings: Sequence[Reading]) -> dict[int, float]:
    largest: dict[int, float] = defaultdict(float)
    for reading in readings:
        if any(reading.unit in units for units in KINDS.values()):
            largest[reading.layer] = max(largest[reading.layer], reading.expected)
    return dict(sorted(largest.items()))


def plot_divergence(seen: Comparison, kl: Estimate) -> Markup:
    """How divergence is spread over the tokens that are judged, and how it goes along the position.

    Args:
        seen: Both sides.
        kl: The mean divergence, as the table has it.
    """
    judged_WN = seen.golden.judged_WN
    values = np.maximum(seen.divergence_WN[judged_WN], 1e-9)

    def spread(axes: Axes) -> None:
        low, high = (float(np.quantile(values, at)) for at in (0.002, 1.0))
        axes.hist(np.maximum(values, low), np.geomspace(low, max(high, 2 * low), 48).tolist(), color=colour("c1"))
        axes.axvline(max(kl.value, 1e-9), color=colour("ink"), linestyle=":", linewidth=1.5)
        axes.set(xscale="log")

    chunk, length = seen.golden.spec.chunk, judged_WN.shape[1]
    legend = [Mark(colour="ink", words=f"mean {kl.value:.4g} nats", sign="dots")]
    legend += (
        [Mark(colour="faint", words=f"a chunk of {chunk} positions begins", sign="dots")] if 0 < chunk < length else []
    )
    panels = [
        Panel(title="tokens", below="KL of a token, nats; all smaller ones at the left", draw=spread),
        Panel(
            title="mean KL divergence, nats", below="position", draw=lambda axes: _plot_positions(axes, seen, judged_WN)
        ),
    ]
    return picture(panels, label="KL divergence over tokens and positions", legend=legend)


def _plot_positions(axes: Axes, seen: Comparison, judged_WN: NDArray[np.bool_]) -> None:
    counts_N = judged_WN.sum(0)
    sums_N = (seen.divergence_WN * judged_WN).sum(0)
    width = max(1, len(sums_N) // 64)
    kept = len(sums_N) // width * width
    counts, sums = (each[:kept].reshape(-1, width).sum(1) for each in (counts_N, sums_N))
    with np.errstate(invalid="ignore", divide="ignore"):
        axes.plot(np.arange(len(sums)) * width + width / 2, sums / counts, color=colour("c1"))
    chunk = seen.golden.spec.chunk
    for boundary in range(chunk, len(sums_N), chunk) if chunk else ():
        axes.axvline(boundary, color=colour("faint"), linewidth=0.7, linestyle=":")
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))


def plot_routing(moved_LE: NDArray[np.float64], layers: Sequence[int]) -> Markup:
    """The share of each expert's tokens that went elsewhere, by layer.

    Args:
        moved_LE: Shares; NaN where the reference sent an expert nothing.
        layers: The layers' numbers.
    """
    return plot_shares(
        100 * moved_LE,
        layers,
        MOVED,
        label="Tokens of each expert that went elsewhere, by layer",
        empty="no token",
        colours=MILD_FIRST,
    )
