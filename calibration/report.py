"""The report of a calibration: `report.json` for programs, and `report.html`, one self-contained page, for people.

Enters: a record of every weight, the experts' loads, the recipe. Leaves: the two files beside the model.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from jinja2 import Environment

from .. import __version__
from ..spec.recipe import Recipe
from .plots import DECODER, TOWER, plot_clips, plot_errors, plot_loads
from .product import Record

WORST = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerReport:
    """One layer: a record for each weight, and how many tokens chose each expert (none in a dense layer)."""

    records: tuple[Record, ...]
    expert_tokens: tuple[int, ...]

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Self:
        """Reads what `dataclasses.asdict` wrote."""
        records = tuple(Record(**record) for record in fields["records"])
        return cls(records=records, expert_tokens=tuple(fields["expert_tokens"]))


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
    """

    recipe: Recipe
    windows: int
    tokens: int
    layers: tuple[LayerReport, ...]
    head: tuple[Record, ...]
    kept: dict[str, str]
    tiles: int = 0
    tower: tuple[LayerReport, ...] = ()

    @property
    def records(self) -> list[Record]:
        """The record of every weight of the decoder, in the order of the layers."""
        return [record for layer in self.layers for record in layer.records] + list(self.head)

    @property
    def tower_records(self) -> list[Record]:
        """The record of every weight of the vision tower, in the order of the layers."""
        return [record for layer in self.tower for record in layer.records]


def write_report(folder: Path, report: Report) -> None:
    """Writes the report beside the model."""
    (folder / "report.json").write_text(json.dumps(dataclasses.asdict(report), indent=1) + "\n", "utf-8")
    (folder / "report.html").write_text(render(report), "utf-8")


def render(report: Report) -> str:
    """The page."""
    decoder, tower = report.records, report.tower_records
    loads = {index: layer.expert_tokens for index, layer in enumerate(report.layers) if layer.expert_tokens}
    template = Environment(autoescape=True).from_string(TEMPLATE)
    return template.render(
        report=report,
        recipe={field.name: getattr(report.recipe, field.name) for field in dataclasses.fields(Recipe)},
        version=__version__,
        worst=sorted(decoder + tower, key=lambda record: record.output_sqnr)[:WORST],
        records=decoder + tower,
        parts=[
            {"title": title, "errors": plot_errors(records, kinds), "clips": plot_clips(records, kinds)}
            for title, records, kinds in (("Decoder", decoder, DECODER), ("Vision tower", tower, TOWER))
        ],
        loads=plot_loads(loads) if loads else "",
        fewest=min((min(tokens) for tokens in loads.values()), default=0),
    )


TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Calibration: {{ report.recipe.format }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1, h2 { font-weight: 600; line-height: 1.2 } h2 { margin-top: 2.5rem }
img { width: 100% } table { border-collapse: collapse; font-size: 14px }
td, th { padding: .2rem .8rem .2rem 0; text-align: left; border-bottom: 1px solid #ddd }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums } summary { cursor: pointer }
</style></head><body>
<h1>Calibration to {{ report.recipe.format }}</h1>
<p>{{ "{:,}".format(report.tokens) }} tokens in {{ report.windows }} windows
{%- if report.tiles %}, {{ "{:,}".format(report.tiles) }} tiles of images{% endif %}; {{ records|length }} weights
quantised, {{ report.kept|length }} kept as they were. Arriero {{ version }}.</p>
<p>Recipe: {% for name, value in recipe.items() if name != "overrides" %}{{ name }} {{ value }}
{{- ", " if not loop.last }}{% endfor %}
{%- for other in recipe.overrides %}; {{ other.pattern }}: {{ other.format or "changed" }}{% endfor %}.</p>
{% macro rows(some) %}
<table><tr><th>weight</th><th>format</th><th class="n">tokens</th><th class="n">largest input</th>
<th class="n">clip</th><th class="n">weight SQNR, dB</th><th class="n">output SQNR, dB</th></tr>
{% for r in some %}<tr><td>{{ r.name }}</td><td>{{ r.format }}</td><td class="n">{{ "{:,}".format(r.tokens) }}</td>
<td class="n">{{ "%.3g"|format(r.largest) }}</td><td class="n">{{ "%.3g"|format(r.clip) }}</td>
<td class="n">{{ "%.1f"|format(r.weight_sqnr) }}</td><td class="n">{{ "%.1f"|format(r.output_sqnr) }}</td></tr>
{% endfor %}</table>{% endmacro %}
{% if worst %}<h2>The worst</h2><p>The weights whose products are furthest off, over sample tokens.</p>
{{ rows(worst) }}{% endif %}
{% for part in parts %}
{% if part.errors %}<h2>{{ part.title }}: errors</h2><p>Signal to quantisation noise by layer: of the weights alone, and
of the products with their inputs quantised too. Higher is better; 6 dB are one bit. Of experts the median and, as a
band, the range.</p>
<img alt="SQNR by layer" src="data:image/png;base64,{{ part.errors }}">{% endif %}
{% if part.clips %}<h2>{{ part.title }}: ranges</h2>
<p>The largest magnitude of each product's input, and the clip that its scale
represents.</p><img alt="Ranges and clips by layer" src="data:image/png;base64,{{ part.clips }}">{% endif %}
{% endfor %}
{% if loads %}<h2>Expert load</h2><p>The share of a layer's tokens that chose each expert; the least busy saw
{{ "{:,}".format(fewest) }} tokens.</p><img alt="Expert load" src="data:image/png;base64,{{ loads }}">{% endif %}
<h2>Every weight</h2><details><summary>{{ records|length }} quantised</summary>{{ rows(records) }}</details>
<details><summary>{{ report.kept|length }} kept</summary><table>{% for name, dtype in report.kept.items() %}
<tr><td>{{ name }}</td><td>{{ dtype }}</td></tr>{% endfor %}</table></details>
</body></html>
"""
