"""The progress of a calibration as it lies in the scratch folder: what is done, and the words for it.

Enters: reports of finished layers. Leaves: `progress.json`, which is replaced whole, and sentences about it.
"""

import dataclasses
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import FolderError, shortened_text
from ..files.fields import check_fields
from ..files.output import resumable
from ..files.reading import read_json
from ..spec.geometry import ModelSpec, VisionSpec
from .product import Record
from .report import LayerReport

PROGRESS = "progress.json"
PARTS = {"tower": [dict], "layers": [dict], "head": ([dict], None), "data": str}
"""The fields of that file."""


@dataclass(slots=True)
class Reached:
    """The reports of what is done.

    Attributes:
        tower: The vision tower's layers, with one more of its linears around them.
        layers: The decoder's.
        head: The LM head's records; None until all that lies around the layers is written.
        data: Fingerprint of the windows that are walked.
    """

    tower: list[LayerReport] = field(default_factory=list)
    layers: list[LayerReport] = field(default_factory=list)
    head: list[Record] | None = None
    data: str = ""


def read_progress(scratch: Path) -> Reached:
    """The progress of an earlier run; nothing where there was none."""
    path = scratch / PROGRESS
    if not path.exists():
        return Reached()
    remedy = "remove the folder, and run it again"
    fields: dict[str, Any] = read_json(path, remedy=remedy, folder=scratch)
    try:
        check_fields(fields, PARTS)
        return Reached(
            tower=[LayerReport.from_fields(each) for each in fields["tower"]],
            layers=[LayerReport.from_fields(each) for each in fields["layers"]],
            head=None if fields["head"] is None else [Record(**each) for each in fields["head"]],
            data=fields["data"],
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FolderError(f"{path} is damaged ({shortened_text(str(error), 100)}): {remedy}") from error


def write_progress(scratch: Path, reached: Reached) -> None:
    """Writes the progress, whole."""
    temporary = scratch / f"{PROGRESS}.new"
    temporary.write_text(json.dumps(dataclasses.asdict(reached)), "utf-8")
    temporary.replace(scratch / PROGRESS)


def restarted(folder: Path, scratch: Path) -> Reached:
    """Empties both folders."""
    for each in (folder, scratch):
        shutil.rmtree(each, ignore_errors=True)
        each.mkdir(exist_ok=True)
    return Reached()


def described(reached: Reached, spec: ModelSpec, vision: VisionSpec | None) -> str:
    """The progress in words; empty where nothing is."""
    tower, layers, count = len(reached.tower), len(reached.layers), len(spec.layers)
    if reached.head is not None:
        return f"all {count} layers are done and kept."
    if layers or (vision is not None and tower > vision.layers):
        before = f"the {layers} before it {'are' if layers > 1 else 'is'}" if layers else "the vision tower is"
        return f"at layer {layers} of {count}; {before} kept."
    if vision is not None and tower:
        is_kept = f"{tower} before it {'are' if tower > 1 else 'is'} kept"
        return f"at layer {tower} of {vision.layers} of the vision tower; the {is_kept}."
    return ""


def kept(out: str | Path) -> str:
    """The part of an interrupted run that the next one takes over, in words; empty where it leaves nothing."""
    work = resumable(Path(out))
    try:
        reached = read_progress(work / "scratch")
    except (OSError, FolderError):
        return ""
    tower, layers = len(reached.tower), len(reached.layers)
    if not (tower or layers):
        return ""
    parts = [f"{layers} layer{'s' if layers != 1 else ''}"] if layers else []
    parts += [f"{tower} part{'s' if tower != 1 else ''} of the vision tower"] if tower else []
    verb = "is" if layers + tower == 1 else "are"
    return f"{' and '.join(parts)} {verb} kept in {work}: run the same command again to go on, or remove the folder"
