"""Refusals with the remedies that they print, for tests that follow each literally."""

import itertools
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import arriero
from arriero.accuracy import check
from arriero.calibration import calibrate_model
from arriero.calibration.presets import parse_recipe
from arriero.engine import build_bundle
from arriero.errors import ArrieroError
from arriero.export import export_checkpoint


@dataclass(frozen=True, kw_only=True)
class Place:
    """Folders that refusals are provoked with; those of the session are only read.

    Attributes:
        tiny: The trained checkpoint.
        model: Its export.
        int8: The export, quantised.
        small: A random checkpoint of two layers with the tiny one's tokenizer.
        seeing: An export of a random multimodal checkpoint.
        text: A text of some thousand tokens.
        room: An empty folder to write in.
    """

    tiny: Path
    model: Path
    int8: Path
    small: Path
    seeing: Path
    text: Path
    room: Path
    numbers: Any = field(default_factory=itertools.count)

    def new(self, name: str = "new") -> Path:
        """A path in the room where nothing is yet."""
        return self.room / f"{name}-{next(self.numbers)}"

    def copy(self, source: Path) -> Path:
        """A copy of a folder, free to be damaged."""
        return Path(shutil.copytree(source, self.new(source.name)))

    def write(self, name: str, content: str) -> Path:
        """A file in the room, with the name given."""
        path = self.room / name
        path.write_text(content, "utf-8")
        return path


@dataclass(frozen=True, kw_only=True)
class Remedy:
    """A refusal, and what its remedy literally does.

    Attributes:
        name: Name in the test's report.
        provoke: Does what is refused.
        says: Regular expression found in the message: the remedy.
        follow: Does what the message says; true where the outcome is another.
    """

    name: str
    provoke: Callable[[Place], object]
    says: str
    follow: Callable[[Place], object]


def follow(remedy: Remedy, place: Place) -> None:
    """Provokes a refusal, checks that it is one short line with the remedy, and follows it."""
    with pytest.raises(ArrieroError) as caught:
        remedy.provoke(place)
    message = str(caught.value)
    assert re.search(remedy.says, message), message
    assert "\n" not in message
    assert len(message.replace(str(place.room), "")) < 700
    assert remedy.follow(place)


def edited(path: Path, **changes: Any) -> Path:
    """Changes fields of a JSON file; None removes one. Returns its folder."""
    content = json.loads(path.read_text("utf-8"))
    content.update(changes)
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}), "utf-8")
    return path.parent


def runs(folder: Path, **options: Any) -> bool:
    return arriero.load(folder, max_seq=32, **options).generate([5, 6, 7], max_new_tokens=2).finish != ""


def exported(place: Place, checkpoint: Path | None = None, **options: Any) -> Path:
    return export_checkpoint(checkpoint or place.small, place.new("model"), **options)


def calibrated(place: Place, model: Path | None = None, out: Path | None = None, **options: Any) -> Path:
    options = {"recipe": "int8", "data": [place.text], "samples": 2, "floor": 0, **options}
    recipe = options.pop("recipe")
    recipe = parse_recipe(recipe, options.pop("changes", {}), options.pop("override", ()))
    return calibrate_model(model or exported(place), out or place.new("quantised"), recipe=recipe, **options)


def built(place: Place, model: Path | None = None, **options: Any) -> Path:
    return build_bundle(model or place.model, place.new("bundle"), **options)


def checked(place: Place, candidate: Path, against: Path, **options: Any) -> str:
    chosen = (
        {} if "data" in options and against.is_file() else {"samples": 1, "window": 32}
    )  # a golden file has its own
    return check(candidate, against, **{"data": [place.text], **chosen, **options}).outcome
