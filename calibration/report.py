"""What calibration found, as `report.json`."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from ..spec import Recipe
from .product import Record


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
    """A whole model: the recipe, how much text was read, the layers, and the LM head where it is quantised."""

    recipe: Recipe
    windows: int
    tokens: int
    layers: tuple[LayerReport, ...]
    head: tuple[Record, ...]

    @property
    def records(self) -> list[Record]:
        """Every weight's record, in the order of the layers."""
        return [record for layer in self.layers for record in layer.records] + list(self.head)


def write_report(folder: Path, report: Report) -> None:
    """Writes the report beside the model."""
    (folder / "report.json").write_text(json.dumps(dataclasses.asdict(report), indent=1) + "\n", "utf-8")
