"""A model folder quantised: text and images in, another model folder out.

Peak memory is one expert, one layer's quantised weights, the images' tiles, and what the system keeps of the hidden
states, which lie in mapped files; it does not grow with depth. A run that was killed goes on at the layer it had
reached. Without images in the data nothing is known of a vision tower's activations, and it is left as it is.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from .. import __version__
from ..errors import CalibrationError, FolderError
from ..export.quantised_graph import quantise_graph
from ..files.folders import SPEC, carry_files, check_no_rank, find_files, read_spec
from ..files.output import check_apart, check_free, resumed_folder
from ..files.safetensors import identity, open_shard
from ..plugins.canonical_graph import read_graph
from ..spec.choice import choose, units
from ..spec.folder import FolderSpec
from ..spec.geometry import VISION
from ..spec.recipe import Override, Recipe
from ..spec.stored_weights import WeightFile
from ..spec.types import Progress
from ..walk.numbers import Weights
from ..walk.windows import Windows, read_windows
from .decoder import FLOOR, Coverage
from .presets import check_recipe, parse_recipe
from .report import Report, write_report
from .work import Work


def calibrate_model(
    model: str | Path,
    out: str | Path,
    *,
    recipe: Recipe | str,
    data: Sequence[str | Path] | NDArray[np.int64] | Windows,
    samples: int = 128,
    window: int | None = None,
    floor: int = FLOOR,
    all_experts: bool = False,
    weights: str | Path | None = None,
    force: bool = False,
    progress: Progress = lambda phase, done, total: None,
    notice: Callable[[str], None] = lambda line: None,
) -> Path:
    """Quantises a model.

    Args:
        model: A model folder that is not quantised; only read.
        out: The model folder to write.
        recipe: A recipe, or the name of a preset: `int8`, `fp8` or `int4`.
        data: Files of text (UTF-8) and of conversations with images (JSONL, see `walk.conversations`), token ids
            [W, S], or windows of them with their images.
        samples: Windows at most.
        window: Tokens of a window; None is a chunk and a quarter of the model's attention.
        floor: Tokens that every expert must have seen.
        all_experts: Whether every expert is measured over every token.
        weights: Folder of the weight files, where they have moved.
        force: Whether an existing model folder at `out` is replaced.
        progress: Called with the phase, the tokens done and the tokens in all.
        notice: Called with each line that a person should know.

    Returns:
        The model folder.

    Raises:
        CalibrationError: The recipe does not fit, an expert starves, or an activation is not finite.
        DataError: The data cannot be read, or is too little.
        FolderError: `model` is no model folder, or `out` exists or cannot be written.
    """
    source, target = Path(model).absolute(), Path(out).absolute()
    spec = _read_unquantised(source)
    if isinstance(recipe, str):
        recipe = parse_recipe(recipe, {}, ())
    vision = None if spec.vision is None else spec.vision.spec
    check_recipe(recipe, spec.model, vision)
    check_apart(source, target)
    check_free(target, force=force)
    files = find_files(source, spec.weight_files, None if weights is None else Path(weights))
    if isinstance(data, np.ndarray):
        data = Windows(ids_WS=data)
    windows = data if isinstance(data, Windows) else read_windows(source, data, spec.model, samples, window, vision)
    if vision is not None and windows.vision is None:
        recipe = _without_tower(spec, recipe, notice)
    coverage = Coverage(floor=floor, all_experts=all_experts)
    with resumed_folder(target, _job(spec, recipe, coverage, windows), force=force) as (folder, scratch):
        stored = Weights(files, _places(source, spec))
        work = Work(spec.model, vision, recipe, coverage, stored, windows, folder, scratch)
        _finish(source, spec, recipe, folder, work.run(progress, notice))
    return target


def _read_unquantised(source: Path) -> FolderSpec:
    """The spec of a model folder that is not quantised.

    Raises:
        CalibrationError: It is quantised already.
        FolderError: It is no model folder.
    """
    spec = read_spec(source)
    check_no_rank(source, spec)
    if spec.kind != "model":
        raise FolderError(f"{source} is a {spec.kind}: give the model folder it was built from")
    if spec.recipe is not None:
        raise CalibrationError(f"{source} is quantised already ({spec.recipe.format}): give the model it came from")
    return spec


def _places(source: Path, spec: FolderSpec) -> dict[str, tuple[str, int]]:
    """File name and first byte of each tensor that the graphs read."""
    return {
        str(value.name): (str(value.const_value.location), value.const_value.offset or 0)
        for name in (spec.graph, *([spec.vision.graph] if spec.vision else []))
        for value in read_graph(source / name).graph.initializers.values()
        if isinstance(value.const_value, ir.ExternalTensor)
    }


def _without_tower(spec: FolderSpec, recipe: Recipe, notice: Callable[[str], None]) -> Recipe:
    """The recipe with the vision tower left as it is, because nothing is known of its activations."""
    assert spec.vision is not None
    names = [name for name, _ in units(spec.model, spec.vision.spec) if name.startswith(VISION)]
    if all(choose(recipe, name).format == "none" for name in names):
        return recipe
    notice(
        f"The data holds no image, so nothing was measured in the vision tower, which stays in {spec.model.dtype}: "
        "give conversations with images (a .jsonl file) to quantise it too."
    )
    left = tuple(Override(pattern=f"{prefix}*", format="none") for prefix in VISION)
    return dataclasses.replace(recipe, overrides=(*recipe.overrides, *left))


def _job(spec: FolderSpec, recipe: Recipe, coverage: Coverage, windows: Windows) -> str:
    """A fingerprint of everything that the result depends on."""
    files = [(file.name, file.identity) for file in spec.weight_files]
    shapes = windows.ids_WS.shape, windows.tiles_W.tolist()
    settings = dataclasses.asdict(recipe), dataclasses.asdict(coverage), files, __version__, shapes
    digest = hashlib.sha256(json.dumps(settings).encode() + windows.ids_WS.tobytes())
    digest.update(np.ascontiguousarray(windows.pixels_N3PP).data)
    return digest.hexdigest()


def _finish(source: Path, spec: FolderSpec, recipe: Recipe, folder: Path, report: Report) -> None:
    """Writes the graphs, the report, the tokenizer and, last, the spec."""
    shards = [open_shard(path) for path in sorted(folder.glob("*.safetensors"))]
    places = {name: (shard.path.name, region) for shard in shards for name, region in shard.tensors.items()}
    graphs = [spec.graph, *([spec.vision.graph] if spec.vision else [])]
    for name in graphs:
        graph = ir.from_proto(onnx.load(source / name, load_external_data=False))
        quantise_graph(graph, spec.model, recipe, places, folder)
        ir.save(graph, folder / name)
    carry_files(source, folder)
    write_report(folder, report)
    record = dataclasses.replace(
        spec,
        version=__version__,
        source=str(source),
        source_hashes={name: hashlib.sha256((source / name).read_bytes()).hexdigest() for name in graphs},
        weight_files=tuple(
            WeightFile(name=shard.path.name, path="", size=shard.size, identity=identity(shard.path))
            for shard in shards
        ),
        recipe=recipe,
        tools={name: importlib.metadata.version(name) for name in ("torch", "onnx", "onnx-ir")},
    )
    (folder / SPEC).write_text(record.to_json(), "utf-8")
