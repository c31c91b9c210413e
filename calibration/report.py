"""The report of a calibration: `report.json` for programs, and `report.html`, one self-contained page, for people.

Enters: a record of every weight, the experts' loads, the recipe, the sizes. Leaves: the two files beside the model.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Self

from ..files.circumstances import circumstances
from ..pages.page import Cell, Column, Section, render, table
from ..spec.recipe import Recipe
from ..spec.recipe_words import NAMES, in_words
from .plots import DECODER, TOWER, plot_clips, plot_errors, plot_loads
from .product import Record

SCHEMA = 1
"""Version of `report.json`."""

WORST = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerReport:
    """One layer.

    Attributes:
        records: A record for each weight.
        expert_tokens: How many tokens chose each expert; none in a dense layer.
        unmeasured: Experts that are rounded without statistics of their own.
        all_experts: Whether every expert was measured over every token.
        data: Fingerprint of the windows that it was measured over.
    """

    records: tuple[Record, ...]
    expert_tokens: tuple[int, ...]
    unmeasured: tuple[int, ...] = ()
    all_experts: bool = False
    data: str = ""

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Self:
        """Reads what `dataclasses.asdict` wrote."""
        records = tuple(Record(**record) for record in fields["records"])
        lists = {name: tuple(fields[name]) for name in ("expert_tokens", "unmeasured")}
        return cls(records=records, all_experts=fields["all_experts"], data=fields["data"], **lists)


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """A whole model.

    Attributes:
        recipe: How it was quantised.
        windows: Windows of text.
        tokens: Their tokens.
        layers: In order.
        head: The LM head's record, where it is quantised.
        kept: The weights that are not quantised, and their type.
        tiles: Tiles of the images.
        tower: The vision tower's layers in order, behind them what lies around them; empty where there were no images.
        other_data: Whether some layers were measured over other data than the last run's.
    """

    recipe: Recipe
    windows: int
    tokens: int
    layers: tuple[LayerReport, ...]
    head: tuple[Record, ...]
    kept: dict[str, str]
    tiles: int = 0
    tower: tuple[LayerReport, ...] = ()
    other_data: bool = False

    @property
    def records(self) -> list[Record]:
        """The record of every weight of the decoder, in the order of the layers."""
        return [record for layer in self.layers for record in layer.records] + list(self.head)

    @property
    def tower_records(self) -> list[Record]:
        """The record of every weight of the vision tower, in the order of the layers."""
        return [record for layer in self.tower for record in layer.records]

    @property
    def unmeasured(self) -> tuple[str, ...]:
        """The experts that are rounded without statistics of their own."""
        layers = enumerate(self.layers)
        return tuple(f"layers.{at}.feed_forward.experts[{each}]" for at, layer in layers for each in layer.unmeasured)

    @property
    def loads(self) -> dict[int, tuple[int, ...]]:
        """The tokens of each expert by layer."""
        return {index: layer.expert_tokens for index, layer in enumerate(self.layers) if layer.expert_tokens}


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """The model that was written, and the one it was made from.

    Attributes:
        name: Name of the folder.
        source: Path of the model that it was made from.
        bytes_before: Bytes of the source's weights.
        bytes_after: Bytes of the new weights.
        circumstances: Date, command, machine and versions.
    """

    name: str
    source: str
    bytes_before: int
    bytes_after: int
    circumstances: Mapping[str, Any] = field(default_factory=circumstances)


def balance(loads: Mapping[int, Sequence[int]]) -> dict[str, Any] | None:
    """How evenly tokens went to experts: multiples of an even share, over all layers; None without experts.

    Returns:
        `fewest_tokens` that an expert saw, and `least`, `median` and `most`, multiples of an even share.
    """
    shares = [tokens * len(layer) / total for layer in loads.values() if (total := sum(layer)) for tokens in layer]
    if not shares:
        return None
    fewest = min(min(tokens) for tokens in loads.values())
    return {"fewest_tokens": fewest, "least": min(shares), "median": median(shares), "most": max(shares)}


def write_report(folder: Path, report: Report, written: Written) -> None:
    """Writes the report beside the model."""
    fields = {
        "schema": SCHEMA,
        **written.circumstances,
        "source": written.source,
        "bytes_before": written.bytes_before,
        "bytes_after": written.bytes_after,
        "experts_balance": balance(report.loads),
        "unmeasured": list(report.unmeasured),
        **dataclasses.asdict(report),
    }
    (folder / "report.json").write_text(json.dumps(fields, indent=1) + "\n", "utf-8")
    (folder / "report.html").write_text(render_report(report, written), "utf-8")


def size(count: int) -> str:
    """Bytes for a person; no line ends between number and unit."""
    return f"{count / 1e9:,.1f}\N{NO-BREAK SPACE}GB" if count >= 1e9 else f"{count / 1e6:,.1f}\N{NO-BREAK SPACE}MB"


def render_report(report: Report, written: Written) -> str:
    """The page."""
    decoder, tower = report.records, report.tower_records
    tiles = f", {report.tiles:,} tiles of images" if report.tiles else ""
    sizes = f"{size(written.bytes_before)} → {size(written.bytes_after)}"
    share = written.bytes_after / max(1, written.bytes_before)
    return render(
        title=f"{written.name}: {NAMES[report.recipe.format]}, {sizes}",
        lead=(
            f"{share:.0%} of {written.source}. Measured over {report.tokens:,} tokens in {report.windows} "
            f"windows{tiles}; {len(decoder) + len(tower):,} weights quantised, {len(report.kept):,} kept as they were."
        ),
        sections=[
            Section(title="Recipe", text=f"{in_words(report.recipe)}."),
            *_unmeasured(report),
            *_worst(decoder + tower),
            *_parts("Decoder", decoder, DECODER),
            *_parts("Vision tower", tower, TOWER),
            *_experts(report),
            Section(title=f"All {len(decoder) + len(tower):,} quantised", body=_rows(decoder + tower), folded=True),
            _kept(report),
        ],
        circumstances=written.circumstances,
    )


def _unmeasured(report: Report) -> list[Section]:
    sections = []
    if report.unmeasured:
        text = (
            f"{_counted(len(report.unmeasured), 'expert')} saw too few tokens: rounded to nearest, smoothed as their "
            "layer's input is; where scales of activations are static, theirs are the largest of the layer's others."
        )
        rows = [[name] for name in report.unmeasured]
        body = table([Column(name="expert", breaks=True)], rows)
        sections.append(Section(title="Rounded without statistics of their own", text=text, body=body))
    if report.other_data:
        text = "Some layers were measured again over other data than the rest, after experts had seen too few tokens."
        sections.append(Section(title="Several texts", text=text))
    return sections


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _worst(records: Sequence[Record]) -> list[Section]:
    known = [record for record in records if record.output_sqnr is not None]
    if not known:
        return []
    text = "The weights whose products are furthest off, over sample tokens: 6 dB are one bit, higher is better."
    worst = sorted(known, key=lambda record: record.output_sqnr or 0.0)[:WORST]
    return [Section(title="The worst", text=text, body=_rows(worst))]


def _parts(title: str, records: Sequence[Record], kinds: Mapping[str, str]) -> list[Section]:
    errors, clips = plot_errors(records, kinds), plot_clips(records, kinds)
    sections = []
    if errors:
        text = (
            "Signal to quantisation noise by layer: of the weights alone, and of the products with their inputs "
            "quantised too. Higher is better; 6 dB are one bit. Of experts the median and, as a band, the range."
        )
        sections.append(Section(title=f"{title}: errors", text=text, body=errors))
    if clips:
        text = "The largest magnitude of each product's input (bar), and the clip that its scale represents (dash)."
        sections.append(Section(title=f"{title}: ranges", text=text, body=clips))
    return sections


def _experts(report: Report) -> list[Section]:
    found = balance(report.loads)
    if found is None:
        return []
    text = (
        f"The least busy expert saw {_counted(found['fewest_tokens'], 'token')}, {found['least']:.2g} of an even "
        f"share; the busiest {found['most']:.2g} times one."
    )
    return [Section(title="Expert load", text=text, body=plot_loads(report.loads))]


def _kept(report: Report) -> Section:
    rows = [[name, dtype] for name, dtype in report.kept.items()]
    body = table([Column(name="weight", breaks=True), Column(name="type")], rows)
    return Section(title=f"{len(report.kept):,} kept as they were", body=body, folded=True)


def _rows(records: Sequence[Record]) -> Any:
    columns = [Column(name="weight", breaks=True), Column(name="output, dB", numeric=True)]
    columns += [Column(name="weight, dB", numeric=True), Column(name="format")]
    columns += [Column(name=name, numeric=True) for name in ("tokens", "largest input", "clip")]
    return table(columns, [_row(record) for record in records])


def _row(record: Record) -> list[str | Cell]:
    return [
        record.name,
        decibels(record.output_sqnr),
        decibels(record.weight_sqnr),
        record.format,
        f"{record.tokens:,}",
        f"{record.largest:.3g}",
        f"{record.clip:.3g}",
    ]


def decibels(value: float | None) -> str:
    """An error for a table: `exact` where nothing is lost, `unseen` where no token came."""
    return "unseen" if value is None else "exact" if value >= EXACT else f"{value:.1f}"


EXACT = 200.0
"""Decibels that stand for no error at all."""
