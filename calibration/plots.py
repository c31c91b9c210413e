"""The report's pictures: errors, ranges and expert loads over the layers."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..pages.pictures import colour, picture, series
from ..pages.scales import plot_shares
from .product import Record

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

EXACT = 200.0
"""Decibels that stand for no error at all; they are marked at the top and stretch no axis."""

LOADS = (
    (0.1, "under 0.1 × an even share"),
    (0.5, "0.1–0.5 ×"),
    (2.0, "0.5–2 ×"),
    (4.0, "2–4 ×"),
    (np.inf, "over 4 ×"),
)
LOAD_COLOURS = ("#c0341d", "#d9b62f", "#7f9bb8", "#4f9d69", "#8565a8")


def plot_errors(records: Sequence[Record], kinds: Kinds) -> Markup:
    """SQNR of weights and of outputs by layer; empty where none of the records is of these kinds."""
    if not grouped(records, "clip", kinds):
        return Markup()

    def draw(figure: Figure, is_phone: bool) -> None:
        panels = figure.subplots(*((2, 1) if is_phone else (1, 2)), sharey=True, sharex=True)
        for axes, name, title in zip(panels, ("weight_sqnr", "output_sqnr"), ("weights", "outputs"), strict=True):
            groups = grouped(records, name, kinds)
            for at, kind in enumerate(kinds):
                if kind in groups:
                    _line(axes, kind, groups[kind], series(at))
            axes.set_title(f"SQNR of {title}, dB")
        panels[-1].set_xlabel("layer")
        _mark_exact(panels, records, kinds)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower left", ncols=2 if is_phone else 4)

    return picture(draw, label="SQNR by layer", phone=5.2, desk=3.6)


def _mark_exact(panels: Sequence[Axes], records: Sequence[Record], kinds: Kinds) -> None:
    """Marks where nothing is lost, above all that is."""
    for axes, name in zip(panels, ("weight_sqnr", "output_sqnr"), strict=True):
        groups = grouped(records, name, kinds)
        exact = [
            (at, kind) for at, kind in enumerate(kinds) for each in groups.get(kind, {}).values() if min(each) >= EXACT
        ]
        low, high = axes.get_ylim()
        if not exact:
            continue
        top = high + 0.06 * (high - low)
        for at, kind in dict.fromkeys(exact):
            layers = [layer for layer, values in groups[kind].items() if min(values) >= EXACT]
            axes.plot(layers, [top] * len(layers), "^", color=series(at), markersize=4, clip_on=False)
        axes.text(0.995, 0.985, "▲ exact", transform=axes.transAxes, ha="right", va="top", color=colour("faint"))
        axes.set_ylim(low, top + 0.06 * (high - low))


def plot_clips(records: Sequence[Record], kinds: Kinds) -> Markup:
    """The largest magnitude and the clip of each kind of input by layer; empty as `plot_errors` is."""
    largest, clips = grouped(records, "largest", kinds), grouped(records, "clip", kinds)
    if not clips:
        return Markup()

    def draw(figure: Figure, is_phone: bool) -> None:
        columns = 2 if is_phone else -(-len(kinds) // 2)
        rows = -(-len(kinds) // columns)
        for axes, (at, kind) in zip(figure.subplots(rows, columns, sharex=True).flat, enumerate(kinds), strict=True):
            axes.set_title(kind, fontsize=8)
            if kind not in largest:
                axes.text(0.5, 0.5, "not quantised", ha="center", transform=axes.transAxes, color=colour("faint"))
                axes.set_yticks([])
                continue
            layers = sorted(largest[kind])
            values = np.array([[max(largest[kind][each]), max(clips[kind][each])] for each in layers])
            width = max(1.0, min(4.0, (70 if is_phone else 160) / len(layers)))
            axes.vlines(layers, 0, values[:, 0], color=series(at), alpha=0.55, linewidth=width)
            axes.plot(layers, values[:, 1], "_", color=colour("ink"), markersize=1.6 * width + 2, markeredgewidth=1.3)
            axes.set_ylim(bottom=0)
        for axes in figure.axes[-columns:]:
            axes.set_xlabel("layer")

    return picture(draw, label="Ranges and clips by layer", phone=5.2, desk=4.4)


def plot_loads(loads: Mapping[int, Sequence[int]]) -> Markup:
    """Each expert's tokens in each layer that has some, as multiples of an even share."""
    ratio_LE = np.array([np.array(tokens) * len(tokens) / max(1, sum(tokens)) for tokens in loads.values()])
    label = "Tokens of each expert by layer, in multiples of an even share"
    return plot_shares(ratio_LE, list(loads), LOADS, label=label, empty="", colours=LOAD_COLOURS)


def grouped(records: Iterable[Record], name: str, kinds: Kinds) -> dict[str, dict[int, list[float]]]:
    """The values of one field by kind of product and layer, without those that are unknown."""
    groups: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        for kind, pattern in kinds.items():
            if (layer := re.match(pattern, record.name)) and getattr(record, name) is not None:
                groups[kind][int(layer[1])].append(getattr(record, name))
    return groups


def _line(axes: Axes, kind: str, by_layer: Mapping[int, Sequence[float]], shade: str) -> None:
    """A line of medians with the range as a band; layers that are exact are left out of both."""
    known = {at: [value for value in values if value < EXACT] for at, values in sorted(by_layer.items())}
    layers = [at for at, values in known.items() if values]
    axes.plot(layers, [np.median(known[at]) for at in layers], "o-", color=shade, markersize=2.5, label=kind)
    low, high = ([extreme(known[at]) for at in layers] for extreme in (min, max))
    axes.fill_between(layers, low, high, color=shade, alpha=0.18, linewidth=0)
