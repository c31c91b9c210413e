"""The report's pictures, as base64 PNGs."""

import base64
import io
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ..spec.choice import ADAPTER, PATCHES, PROJECTOR
from .locate.location import STEM, Location, ModelPart, Reading
from .metrics import Comparison

matplotlib.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 10})

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

COLOURS = dict(zip(KINDS, ("#4477aa", "#66ccee", "#888888", "#228833", "#ccbb44", "#aa3377", "#222255"), strict=True))
"""Paul Tol's bright scheme, which colour-blind people can tell apart, and a dark blue."""

WORDS = {"vision": "vision tower", "decoder": "decoder"}
RED = "#cc3311"
MOST_LABELLED = 16
"""Experts up to which the matrix has its numbers written in."""


def plot_profile(location: Location) -> str:
    """The error of each kind of unit by layer, over what rounding explains; what is out of line is marked.

    Where the vision tower was walked, it stands beside the decoder.
    """
    parts: list[ModelPart] = ["decoder"]
    if any(reading.part == "vision" for reading in location.readings):
        parts.insert(0, "vision")
    figure = Figure(figsize=(10, 4), layout="constrained")
    named: dict[str, Artist] = {}
    for part, axes in zip(parts, figure.subplots(1, len(parts), sharey=True, squeeze=False)[0], strict=True):
        _plot_part(axes, [reading for reading in location.readings if reading.part == part], location)
        axes.set(yscale="log", xlabel="layer" if len(parts) == 1 else f"layer of the {WORDS[part]}")
        axes.grid(axis="y", alpha=0.3)
        named |= {label: line for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.axes[0].set_ylabel("relative error on the reference's input")
    figure.legend(list(named.values()), list(named), loc="outside lower center", ncols=4, frameon=False)
    return _png(figure)


def _plot_part(axes: Axes, readings: Sequence[Reading], location: Location) -> None:
    for kind, units in KINDS.items():
        worst: dict[int, float] = defaultdict(float)
        for reading in readings:
            if reading.unit in units:
                worst[reading.layer] = max(worst[reading.layer], reading.error)
        if worst:
            layers = sorted(worst)
            axes.plot(layers, [worst[at] for at in layers], "o-", color=COLOURS[kind], markersize=4, label=kind)
    blamed = location.part, location.layer, location.unit
    for reading in readings:
        if (reading.part, reading.layer, reading.unit) == blamed:
            axes.plot(reading.layer, reading.error, "o", color=RED, markersize=13, fillstyle="none", markeredgewidth=2)
            axes.annotate(
                f"{reading.place}, {reading.unit}",
                (reading.layer, reading.error),
                textcoords="offset points",
                xytext=(10, 4),
                color=RED,
            )
    expected = _typical(readings)
    axes.plot(list(expected), list(expected.values()), ":", color="#222222", label="largest that rounding explains")


def _typical(readings: Sequence[Reading]) -> dict[int, float]:
    largest: dict[int, float] = defaultdict(float)
    for reading in readings:
        if any(reading.unit in units for units in KINDS.values()):
            largest[reading.layer] = max(largest[reading.layer], reading.expected)
    return dict(sorted(largest.items()))


def plot_divergence(seen: Comparison) -> str:
    """How divergence is spread over tokens, and how it goes along the position."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    values = np.maximum(seen.divergence_WN.ravel(), 1e-9)
    bins = np.geomspace(max(values.min(), 1e-9), max(values.max(), 2e-9), 60)
    left.hist(values, bins, color="#4477aa")
    left.axvline(values.mean(), color="#222222", linestyle=":", label=f"mean {values.mean():.2g}")
    left.set(xscale="log", xlabel="KL divergence of a token, nats", ylabel="tokens")
    left.legend(frameon=False)
    by_position = seen.divergence_WN.mean(0)
    width = max(1, len(by_position) // 64)
    groups = by_position[: len(by_position) // width * width].reshape(-1, width).mean(1)
    right.plot(np.arange(len(groups)) * width + width / 2, groups, color="#4477aa")
    chunk = seen.golden.spec.chunk
    if chunk:
        for boundary in range(chunk, len(by_position), chunk):
            right.axvline(boundary, color="#bbbbbb", linewidth=1)
    title = f"lines: every {chunk} positions a chunk begins" if chunk else ""
    right.set(xlabel="position", ylabel="mean KL divergence, nats", ylim=(0, None))
    right.set_title(title, fontsize=9, color="#666666")
    return _png(figure)


def plot_routing(matrix_EE: NDArray[np.int64]) -> str:
    """Where the tokens of each of the reference's experts went, in percent."""
    share_EE = 100 * matrix_EE / np.maximum(1, matrix_EE.sum(1, keepdims=True))
    experts = len(share_EE)
    size = min(9.0, 3.2 + 0.3 * experts)
    figure = Figure(figsize=(size + 0.8, size), layout="constrained")
    axes = figure.subplots()
    off = np.where(np.eye(experts, dtype=bool), np.nan, share_EE)
    largest = max(float(np.nanmax(off)) if experts > 1 else 0.0, 0.1)
    image = axes.imshow(off, cmap="Reds", vmin=0, vmax=largest)
    axes.set(xlabel="the candidate's expert", ylabel="the reference's expert")
    step = 1 if experts <= 32 else 8
    axes.set_xticks(range(0, experts, step))
    axes.set_yticks(range(0, experts, step))
    if experts <= MOST_LABELLED:
        for row, column in np.ndindex(share_EE.shape):
            value = share_EE[row, column]
            colour = "#228833" if row == column else "white" if value > 0.6 * largest else "black"
            text = f"{value:.0f}" if row == column else f"{value:.1f}"
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    figure.colorbar(image, label="% of the reference's tokens that went elsewhere", shrink=0.8)
    return _png(figure)


def _png(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return base64.b64encode(buffer.getvalue()).decode()
