"""The report's pictures: errors, ranges and expert loads over the layers, as base64 PNGs."""

import base64
import io
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from .product import Record

matplotlib.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 10})

Kinds = Mapping[str, str]
"""Kinds of products, each a line, and the pattern of their weights' names, whose first group is the layer's number."""

DECODER = {
    "attention in": r"layers\.(\d+)\.self_attn\.[qkv]_proj$",
    "attention out": r"layers\.(\d+)\.self_attn\.o_proj$",
    "MLP gate and up": r"layers\.(\d+)\.feed_forward\.(shared_expert\.)?(gate|up)_proj$",
    "MLP down": r"layers\.(\d+)\.feed_forward\.(shared_expert\.)?down_proj$",
    "experts gate and up": r"layers\.(\d+)\.feed_forward\.experts\.gate_up_proj",
    "experts down": r"layers\.(\d+)\.feed_forward\.experts\.down_proj",
}
TOWER = {
    "attention in": r"vision_model\.model\.layers\.(\d+)\.self_attn\.[qkv]_proj$",
    "attention out": r"vision_model\.model\.layers\.(\d+)\.self_attn\.o_proj$",
    "MLP fc1": r"vision_model\.model\.layers\.(\d+)\.mlp\.fc1$",
    "MLP fc2": r"vision_model\.model\.layers\.(\d+)\.mlp\.fc2$",
}

COLOURS = ("#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677", "#aa3377")
"""Colours of the kinds, in order: Paul Tol's bright scheme, which colour-blind people can tell apart."""


def plot_errors(records: Sequence[Record], kinds: Kinds) -> str:
    """SQNR of weights and of outputs by layer; empty where none of the records is of these kinds."""
    if not grouped(records, "clip", kinds):
        return ""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, name, title in ((left, "weight_sqnr", "weights"), (right, "output_sqnr", "outputs")):
        groups = grouped(records, name, kinds)
        for kind, colour in zip(kinds, COLOURS, strict=False):
            if kind in groups:
                _line(axes, kind, groups[kind], colour)
        axes.set(title=title, xlabel="layer")
        axes.grid(axis="y", alpha=0.3)
    left.set_ylabel("SQNR, dB")
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return _png(figure)


def plot_clips(records: Sequence[Record], kinds: Kinds) -> str:
    """The largest magnitude and the clip of each kind of input by layer; empty as `plot_errors` is."""
    largest, clips = grouped(records, "largest", kinds), grouped(records, "clip", kinds)
    if not clips:
        return ""
    figure = Figure(figsize=(10, 5.4), layout="constrained")
    columns = len(kinds) // 2
    panels = figure.subplots(2, columns, sharex=True).flat
    for axes, kind, colour in zip(panels, kinds, COLOURS, strict=False):
        axes.set_title(kind)
        if kind not in largest:
            axes.text(0.5, 0.5, "not quantised", ha="center", transform=axes.transAxes, color="#888888")
            continue
        layers = sorted(largest[kind])
        values = np.array([[max(largest[kind][at]), max(clips[kind][at])] for at in layers])
        axes.vlines(layers, 0, values[:, 0], color=colour, alpha=0.35, linewidth=4, label="largest")
        axes.plot(layers, values[:, 1], "_", color="#222222", markersize=10, markeredgewidth=2, label="clip")
        axes.set_ylim(bottom=0)
    for axes in figure.axes[-columns:]:
        axes.set_xlabel("layer")
    handles = next(axes.get_legend_handles_labels() for axes in figure.axes if axes.get_legend_handles_labels()[0])
    figure.legend(*handles, loc="outside lower center", ncols=2, frameon=False)
    return _png(figure)


def plot_loads(loads: Mapping[int, Sequence[int]]) -> str:
    """The share of tokens of each expert in each layer that has some."""
    share_LE = np.array([np.array(tokens) / max(1, sum(tokens)) for tokens in loads.values()])
    layers, experts = share_LE.shape
    figure = Figure(figsize=(10, 1.4 + 0.28 * min(layers, 40)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(share_LE * 100, aspect="auto", cmap="viridis", vmin=0)
    axes.set(xlabel="expert", ylabel="layer")
    axes.set_yticks(range(layers), [str(layer) for layer in loads], fontsize=8)
    axes.set_xticks(range(experts) if experts <= 32 else range(0, experts, 8))
    figure.colorbar(image, label="% of choices")
    if layers * experts <= 256:
        for row, column in np.ndindex(layers, experts):
            value = share_LE[row, column]
            colour = "white" if value < 0.6 * share_LE.max() else "black"
            axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", color=colour, fontsize=8)
    return _png(figure)


def grouped(records: Iterable[Record], name: str, kinds: Kinds) -> dict[str, dict[int, list[float]]]:
    """The values of one field by kind of product and layer."""
    groups: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        for kind, pattern in kinds.items():
            if layer := re.match(pattern, record.name):
                groups[kind][int(layer[1])].append(getattr(record, name))
    return groups


def _line(axes: "matplotlib.axes.Axes", kind: str, by_layer: Mapping[int, Sequence[float]], colour: str) -> None:
    layers = sorted(by_layer)
    axes.plot(layers, [np.median(by_layer[at]) for at in layers], "o-", color=colour, markersize=3, label=kind)
    low, high = ([extreme(by_layer[at]) for at in layers] for extreme in (min, max))
    axes.fill_between(layers, low, high, color=colour, alpha=0.15)


def _png(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return base64.b64encode(buffer.getvalue()).decode()
