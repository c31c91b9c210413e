"""The report's pictures: errors by layer, divergence over tokens and positions, and experts chosen otherwise."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ..pages.pictures import colour, picture, series
from ..pages.scales import plot_shares
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
MOVED = ((1.0, "up to 1 %"), (2.0, "1–2 %"), (5.0, "2–5 %"), (10.0, "5–10 %"), (100.0, "over 10 %"))
"""Levels of tokens that went to another expert: below 1 % is what rounding does to near ties."""


def plot_profile(location: Location) -> Markup:
    """The error of each kind of unit by layer, over what rounding explains; what is out of line is marked.

    Where the vision tower was walked, it stands beside the decoder.
    """
    parts: list[ModelPart] = ["decoder"]
    if any(reading.part == "vision" for reading in location.readings):
        parts.insert(0, "vision")

    def draw(figure: Figure, is_phone: bool) -> None:
        shape = (len(parts), 1) if is_phone else (1, len(parts))
        named: dict[str, Artist] = {}
        for part, axes in zip(parts, figure.subplots(*shape, sharey=True, squeeze=False).flat, strict=True):
            _plot_part(axes, [reading for reading in location.readings if reading.part == part], location)
            axes.set(yscale="log", xlabel="layer" if len(parts) == 1 else f"layer of the {WORDS[part]}")
            named |= {label: line for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        figure.axes[0].set_title("relative error on the reference's input")
        columns = 2 if is_phone else 4
        figure.legend(list(named.values()), list(named), loc="outside lower left", ncols=columns, fontsize=7.5)

    return picture(draw, label="Error by layer", phone=0.9 + 2.6 * len(parts), desk=3.6)


def _plot_part(axes: Axes, readings: Sequence[Reading], location: Location) -> None:
    for at, (kind, units) in enumerate(KINDS.items()):
        worst: dict[int, float] = defaultdict(float)
        for reading in readings:
            if reading.unit in units:
                worst[reading.layer] = max(worst[reading.layer], reading.error)
        if worst:
            layers = sorted(worst)
            axes.plot(layers, [worst[each] for each in layers], "o-", color=series(at), markersize=3, label=kind)
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
    axes.margins(y=0.15)
    expected = _typical(readings)
    axes.plot(list(expected), list(expected.values()), ":", color=colour("ink"), label="most that rounding explains")


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

    def draw(figure: Figure, is_phone: bool) -> None:
        left, right = figure.subplots(*((2, 1) if is_phone else (1, 2)))
        low, high = float(values.min(initial=1e-9)), float(values.max(initial=2e-9))
        left.hist(values, np.geomspace(low, max(high, 2 * low), 30 if is_phone else 60), color=colour("c1"))
        left.axvline(max(kl.value, 1e-9), color=colour("ink"), linestyle=":", label=f"mean {kl.value:.4g}")
        left.set(xscale="log", xlabel="KL divergence of a token, nats", title="tokens")
        left.legend(loc="upper left")
        _plot_positions(right, seen, judged_WN)

    return picture(draw, label="KL divergence over tokens and positions", phone=4.6, desk=3.0)


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
    title = "mean KL divergence, nats" + (
        f"; dotted: a chunk of {chunk} begins" if chunk < len(sums_N) and chunk else ""
    )
    axes.set(xlabel="position", title=title)
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))


def plot_routing(moved_LE: NDArray[np.float64], layers: Sequence[int]) -> Markup:
    """The share of each expert's tokens that went elsewhere, by layer.

    Args:
        moved_LE: Shares; NaN where the reference sent an expert nothing.
        layers: The layers' numbers.
    """
    return plot_shares(
        100 * moved_LE, layers, MOVED, label="Tokens of each expert that went elsewhere, by layer", empty="no token"
    )
