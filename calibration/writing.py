"""The making of a quantised model: PyTorch walks the layers, and the new folder is written.

Enters: a model and data that are refused no more. Leaves: the new folder: shards, graphs, report, tokenizer and, last,
the spec. Here PyTorch is imported; `quantised_model` does without it until there is something to do.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from .. import __version__
from ..errors import StarvedError
from ..export.quantised_graph import quantise_graph
from ..files.folders import SPEC, carry_files
from ..files.output import resumed_folder
from ..files.reading import read_bytes
from ..files.safetensors import identity, open_shard
from ..plugins.canonical_graph import LARGEST, read_graph
from ..spec.folder import SCHEMA, FolderSpec
from ..spec.recipe import Recipe
from ..spec.stored_weights import WeightFile
from ..spec.types import Progress
from ..walk.accelerator import HOST, find_device, memory_bounded
from ..walk.numbers import Weights
from ..walk.windows import Windows
from .coverage import Coverage
from .draft import quantise_draft
from .duration import expected
from .report import Report, Written, write_report
from .work import Work


@dataclass(frozen=True, slots=True)
class Task:
    """A calibration, checked.

    Attributes:
        source: The model's folder.
        spec: Its spec.
        recipe: How it is quantised.
        files: Its weight files, by name.
        windows: The data.
        coverage: Demands on the routing.
    """

    source: Path
    spec: FolderSpec
    recipe: Recipe
    files: Mapping[str, Path]
    windows: Windows
    coverage: Coverage


def write_quantised(
    task: Task, target: Path, device: str, force: bool, progress: Progress, notice: Callable[[str], None]
) -> None:
    """Quantises a model and writes the new one's folder.

    Args:
        task: The calibration.
        target: The folder to write.
        device: Where PyTorch computes, as `walk.accelerator` has it.
        force: Whether an existing model folder is replaced.
        progress: Called with the phase, the tokens done and in all.
        notice: Called with each line that a person should know.

    Raises:
        CalibrationError: An activation is not finite.
        StarvedError: Experts saw too few tokens; a later call goes on from what is kept.
        DeviceError: There is no such device, or it has too little memory.
    """
    place, spec, windows = find_device(device), task.spec, task.windows
    all_experts, tower = task.coverage.all_experts, None if spec.vision is None else spec.vision.spec
    if place == HOST and (line := expected(spec.model, task.recipe, windows.ids_WS, all_experts=all_experts)):
        notice(line)
    job = _job(spec, task.recipe)
    with resumed_folder(target, job, force=force, kept=StarvedError) as (folder, scratch), memory_bounded(place):
        stored, data_read = Weights(task.files, _places(task.source, spec), device=place), _fingerprint(windows)
        work = Work(spec.model, tower, task.recipe, task.coverage, stored, windows, folder, scratch, data_read)
        _finish(task, folder, work.run(progress, notice), target.name)


def _places(source: Path, spec: FolderSpec) -> dict[str, tuple[str, int]]:
    """File name and first byte of each tensor that the graphs read."""
    return {
        str(value.name): (str(value.const_value.location), value.const_value.offset or 0)
        for name in (spec.graph, *([spec.vision.graph] if spec.vision else []))
        for value in read_graph(source / name).graph.initializers.values()
        if isinstance(value.const_value, ir.ExternalTensor)
    }


def _job(spec: FolderSpec, recipe: Recipe) -> str:
    """A fingerprint of the model and the recipe, on which every kept layer depends."""
    files = [(file.name, file.identity) for file in spec.weight_files]
    settings = dataclasses.asdict(recipe), files, __version__, SCHEMA
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


def _fingerprint(windows: Windows) -> str:
    """A fingerprint of the data."""
    shapes = windows.ids_WS.shape, windows.tiles_W.tolist()
    digest = hashlib.sha256(json.dumps(shapes).encode() + windows.ids_WS.tobytes())
    digest.update(np.ascontiguousarray(windows.pixels_N3PP).data)
    return digest.hexdigest()


def _finish(task: Task, folder: Path, report: Report, name: str) -> None:
    """Writes the graphs, the report, the tokenizer and, last, the spec."""
    source, spec, recipe = task.source, task.spec, task.recipe
    shards = [open_shard(path) for path in sorted(folder.glob("*.safetensors"))]
    places = {name: (shard.path.name, region) for shard in shards for name, region in shard.tensors.items()}
    graphs = [spec.graph, *([spec.vision.graph] if spec.vision else [])]
    for each in graphs:
        graph = ir.from_proto(onnx.load(source / each, load_external_data=False))
        quantise_graph(graph, spec.model, recipe, places, folder)
        ir.save(graph, folder / each)
    carry_files(source, folder)
    draft, drafts = quantise_draft(source, spec, recipe, folder, task.files, places)
    written = Written(
        name=name,
        source=str(source),
        bytes_before=sum(file.size for file in spec.weight_files),
        bytes_after=sum(shard.size for shard in shards),
    )
    write_report(folder, report, written)
    record = dataclasses.replace(
        spec,
        version=__version__,
        source=str(source),
        source_hashes={
            each: hashlib.sha256(read_bytes(source / each, folder=source, most=LARGEST)).hexdigest() for each in graphs
        },
        weight_files=(
            *(
                WeightFile(name=shard.path.name, path="", size=shard.size, identity=identity(shard.path))
                for shard in shards
            ),
            *drafts,
        ),
        draft=draft,
        recipe=recipe,
        unmeasured=report.unmeasured,
        tools={name: importlib.metadata.version(name) for name in ("torch", "onnx", "onnx-ir")},
    )
    (folder / SPEC).write_text(record.to_json(), "utf-8")
