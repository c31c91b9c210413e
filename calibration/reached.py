"""The progress of a calibration as it lies in the scratch folder: what is done, and the words for it.

Enters: reports of finished layers. Leaves: `progress.json`, which is replaced whole, and sentences about it.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import FolderError, shortened_text
from ..files.fields import check_fields
from ..files.output import resumable
from ..files.reading import read_json
from ..files.safetensors import samples
from ..spec.geometry import ModelSpec, VisionSpec
from .product import Record
from .report import LayerReport

PROGRESS = "progress.json"
RECORD = {
    **{"name": str, "format": str, "activations": str, "tokens": int, "largest": float, "clip": float},
    **{"strength": (float, None), "weight_sqnr": float, "output_sqnr": (float, None), "measured": bool},
}
LAYER = {"records": [RECORD], "expert_tokens": [int], "unmeasured": [int], "all_experts": bool, "data": str}
PARTS = {
    **{"tower": [LAYER], "layers": [LAYER], "head": ([RECORD], None), "data": str},
    **{"shards": {str: str}, "output": ([str], None)},
}
"""The fields of that file."""

REMEDY = "remove the folder, and run it again"


@dataclass(slots=True)
class Reached:
    """The reports of what is done.

    Attributes:
        tower: The vision tower's layers, with one more of its linears around them.
        layers: The decoder's.
        head: The LM head's records; None until all that lies around the layers is written.
        data: Fingerprint of the windows that are walked.
        shards: Fingerprint of each finished step's shard, by its name; empty of one that is being written anew.
        output: Name and fingerprint of the file that the last finished step has left for the next; None before.
    """

    tower: list[LayerReport] = field(default_factory=list)
    layers: list[LayerReport] = field(default_factory=list)
    head: list[Record] | None = None
    data: str = ""
    shards: dict[str, str] = field(default_factory=dict)
    output: tuple[str, str] | None = None


def read_progress(scratch: Path) -> Reached:
    """The progress of an earlier run; nothing where there was none."""
    path = scratch / PROGRESS
    if not path.exists():
        return Reached()
    fields: dict[str, Any] = read_json(path, remedy=REMEDY, folder=scratch)
    try:
        check_fields(fields, PARTS)
        return Reached(
            tower=[LayerReport.from_fields(each) for each in fields["tower"]],
            layers=[LayerReport.from_fields(each) for each in fields["layers"]],
            head=None if fields["head"] is None else [Record(**each) for each in fields["head"]],
            data=fields["data"],
            shards=fields["shards"],
            output=None if fields["output"] is None else _pair(*fields["output"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FolderError(f"{path} is damaged ({shortened_text(str(error), 100)}): {REMEDY}") from error


def _pair(name: str, fingerprint: str) -> tuple[str, str]:
    return name, fingerprint


def write_progress(scratch: Path, reached: Reached) -> None:
    """Writes the progress, whole."""
    temporary = scratch / f"{PROGRESS}.new"
    temporary.write_text(json.dumps(dataclasses.asdict(reached)), "utf-8")
    temporary.replace(scratch / PROGRESS)


def fingerprint(path: Path) -> str:
    """A cheap fingerprint of a file: SHA-256 over its length and 16 samples of it."""
    size, digest = path.stat().st_size, hashlib.sha256()
    digest.update(str(size).encode())
    with path.open("rb") as file:
        for sample in samples(file, 0, size):
            digest.update(sample)
    return digest.hexdigest()


def check_reached(reached: Reached, folder: Path, scratch: Path, spec: ModelSpec, vision: VisionSpec | None) -> None:
    """Holds the progress against the model, and what it says is done against the files that hold it.

    Raises:
        FolderError: A step is said to be done that the model has not, or whose file is missing or another.
    """
    path, layers = scratch / PROGRESS, len(spec.layers)
    of_layers, of_tower = _shards("layer", layers), []
    if vision is not None:
        of_tower = [*_shards("vision", vision.layers), "vision-rest.safetensors"]
    counts = (len(reached.layers), layers), (len(reached.tower), len(of_tower))
    if any(done > most for done, most in counts) or (reached.head is not None and len(reached.layers) < layers):
        said = f"{len(reached.layers)} layers and {len(reached.tower)} parts of a vision tower"
        raise FolderError(f"{path} is damaged ({said} are done, of {layers} and {len(of_tower)}): {REMEDY}")
    head = ["rest.safetensors"]
    done = (
        of_layers[: len(reached.layers)] + of_tower[: len(reached.tower)] + (head if reached.head is not None else [])
    )
    if reached.shards.keys() != set(done):
        raise FolderError(
            f"{path} is damaged ({len(done)} shards are done, {len(reached.shards)} are listed): {REMEDY}"
        )
    known = {*of_layers, *of_tower, *head}
    files = [(folder / name, reached.shards[name]) for name in done]
    if reached.output is not None and reached.head is None:
        files.append((scratch / os.path.basename(reached.output[0]), reached.output[1]))
    for file, expected in files:
        if not file.is_file() or (expected != "" and fingerprint(file) != expected):
            raise FolderError(
                f"{file} is not as the run that was interrupted left it: remove {scratch.parent}, and run it again"
            )
    for file in folder.glob("*.safetensors"):
        if file.name not in known:
            raise FolderError(f"{file} is no file of this run: remove {scratch.parent}, and run it again")


def _shards(kind: str, count: int) -> list[str]:
    return [f"{kind}-{index:05}.safetensors" for index in range(count)]


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
