"""The report's pictures: errors, ranges and expert loads over the layers."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes

from ..pages.pictures import Mark, Panel, colour, picture, series
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
    values = [each for record in records for each in (record.weight_sqnr, record.output_sqnr)]
    known = [each for each in values if each is not None and each < EXACT]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    room = 0.08 * max(high - low, 1.0)

    def panel(name: str, title: str) -> Panel:
        def draw(axes: Axes) -> None:
            groups = grouped(records, name, kinds)
            for at, kind in enumerate(kinds):
                _line(axes, groups.get(kind, {}), series(at), high + 2 * room)
            has_exact = any(min(each) >= EXACT for by_layer in groups.values() for each in by_layer.values())
            axes.set_ylim(low - room, high + (3.2 if has_exact else 1) * room)
            if has_exact:
                axes.text(1, 1.02, "▲ exact", transform=axes.transAxes, ha="right", va="bottom", color=colour("faint"))

        return Panel(title=f"SQNR of {title}, dB", below="layer", draw=draw, counted=True)

    panels = [panel("weight_sqnr", "weights"), panel("output_sqnr", "outputs")]
    found = grouped(records, "weight_sqnr", kinds)
    legend = [Mark(colour=f"c{at % 7 + 1}", words=kind) for at, kind in enumerate(kinds) if kind in found]
    return picture(panels, label="SQNR by layer", legend=legend)


def plot_clips(records: Sequence[Record], kinds: Kinds) -> Markup:
    """The largest magnitude and the clip of each kind of input by layer; empty as `plot_errors` is."""
    largest, clips = grouped(records, "largest", kinds), grouped(records, "clip", kinds)

    def panel(at: int, kind: str) -> Panel:
        def draw(axes: Axes) -> None:
            layers = sorted(largest[kind])
            values = np.array([[max(largest[kind][each]), max(clips[kind][each])] for each in layers])
            width = max(1.0, min(5.0, 120 / len(layers)))
            axes.vlines(layers, 0, values[:, 0], color=series(at), alpha=0.55, linewidth=width)
            axes.plot(layers, values[:, 1], "_", color=colour("ink"), markersize=1.5 * width + 2, markeredgewidth=1.3)
            axes.set_ylim(bottom=0)
            axes.margins(x=0.02)

        return Panel(title=kind, below="layer", draw=draw, height=1.75, counted=True)

    panels = [panel(at, kind) for at, kind in enumerate(kinds) if kind in largest]
    if not panels:
        return Markup()
    legend = [Mark(colour="c7", words="largest input", sign="area"), Mark(colour="ink", words="clip")]
    return picture(panels, label="Ranges and clips by layer", legend=legend, columns=3)


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


def _line(axes: Axes, by_layer: Mapping[int, Sequence[float]], shade: str, top: float) -> None:
    """A line of medians with the range as a band; layers that are exact are marked at the top, and in neither."""
    known = {at: [value for value in values if value < EXACT] for at, values in sorted(by_layer.items())}
    layers = [at for at, values in known.items() if values]
    axes.plot(layers, [np.median(known[at]) for at in layers], "o-", color=shade, markersize=2.5, linewidth=1.3)
    low, high = ([extreme(known[at]) for at in layers] for extreme in (min, max))
    axes.fill_between(layers, low, high, color=shade, alpha=0.18, linewidth=0)
    exact = [at for at, values in known.items() if not values]
    axes.plot(exact, [top] * len(exact), "^", color=shade, markersize=4)
