"""A model folder quantised: text and images in, another model folder out.

Peak memory is one expert, one layer's quantised weights, the images' tiles, and what the system keeps of the hidden
states, which lie in mapped files; it does not grow with depth. A run that was killed goes on at the layer it had
reached; one that ended because experts saw too few tokens goes on from all of its layers. Without images in the data
nothing is known of a vision tower's activations, and it is left as it is. What is refused is refused before PyTorch is
imported, which `writing` does.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import CalibrationError, FolderError, needing
from ..files.folders import check_no_rank, find_files, read_spec
from ..files.output import check_apart, check_free
from ..spec.choice import choose, units
from ..spec.folder import FolderSpec
from ..spec.geometry import VISION, VisionSpec
from ..spec.recipe import Override, Recipe
from ..spec.types import Progress
from ..walk.windows import Windows, read_windows, window_length
from .extent import FLOOR, default_windows
from .presets import check_recipe, parse_recipe

FLOOR_ACTIONS = ("fail", "fallback")


def calibrate_model(
    model: str | Path,
    out: str | Path,
    *,
    recipe: Recipe | str,
    data: Sequence[str | Path] | NDArray[np.int64] | Windows,
    samples: int | None = None,
    window: int | None = None,
    floor: int = FLOOR,
    floor_action: Literal["fail", "fallback"] = "fail",
    all_experts: bool = False,
    device: str = "cpu",
    weights: str | Path | None = None,
    force: bool = False,
    progress: Progress = lambda phase, done, total: None,
    notice: Callable[[str], None] = lambda line: None,
) -> Path:
    """Quantises a model; returns the new model's folder.

    Args:
        model: A model folder that is not quantised; only read.
        out: The model folder to write.
        recipe: A recipe, or the name of a preset: `int8`, `fp8` or `int4`.
        data: Files of text and of rows (JSONL, Parquet: see `walk.rows`), token ids [W, S], or windows of them.
        samples: Windows at most; None takes as many as suit the model's size (`calibration.extent`).
        window: Tokens of a window; None is a chunk and a quarter of the model's attention.
        floor: Tokens that every expert must have seen.
        floor_action: What becomes of experts that saw fewer: `fail` names them all behind the last layer and keeps
            what was done; `fallback` rounds them without statistics of their own.
        all_experts: Whether every expert is measured over every token.
        device: Where PyTorch computes: `cpu`, `cuda`, `cuda:1`, or `auto`: a GPU where it finds one.
        weights: Folder of the weight files, where they have moved.
        force: Whether an existing model folder at `out` is replaced.
        progress: Called with the phase, the tokens done and in all.
        notice: Called with each line that a person should know.

    Raises:
        CalibrationError: The recipe does not fit, or an activation is not finite.
        StarvedError: Experts saw too few tokens; a later call goes on from what is kept.
        DataError: The data cannot be read, or is too little.
        DeviceError: There is no such device, or it has too little memory.
        FolderError: `model` is no model folder, or `out` exists or cannot be written.
    """
    _check_demands(floor, floor_action)
    source, target = Path(model).absolute(), Path(out).absolute()
    spec = _read_unquantised(source)
    recipe = _read_recipe(recipe, spec)
    check_apart(source, target)
    check_free(target, force=force)
    files = find_files(source, spec.weight_files, None if weights is None else Path(weights))
    windows = _windows(source, spec, data, samples, window)
    recipe = recipe if windows.vision is not None else _without_tower(spec, recipe, notice)
    with needing("calibration"):
        from .coverage import Coverage
        from .writing import Task, write_quantised
    coverage = Coverage(floor=floor, all_experts=all_experts, falls_back=floor_action == "fallback")
    task = Task(source, spec, recipe, files, windows, coverage)
    write_quantised(task, target, device, force, progress, notice)
    return target


def _read_recipe(recipe: Recipe | str, spec: FolderSpec) -> Recipe:
    """A recipe that fits the model, by itself or by a preset's name.

    Raises:
        CalibrationError: It does not.
    """
    found = parse_recipe(recipe, {}, ()) if isinstance(recipe, str) else recipe
    check_recipe(found, spec.model, _tower(spec))
    return found


def _tower(spec: FolderSpec) -> VisionSpec | None:
    """The vision tower's geometry; None where there is none."""
    return None if spec.vision is None else spec.vision.spec


def _windows(
    source: Path,
    spec: FolderSpec,
    data: Sequence[str | Path] | NDArray[np.int64] | Windows,
    samples: int | None,
    window: int | None,
) -> Windows:
    """The data as windows."""
    if isinstance(data, Windows):
        return data
    if isinstance(data, np.ndarray):
        return Windows(ids_WS=data)
    if samples is None:
        samples = default_windows(spec.model, window or window_length(spec.model))
    return read_windows(source, data, spec.model, samples, window, _tower(spec))


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


def _without_tower(spec: FolderSpec, recipe: Recipe, notice: Callable[[str], None]) -> Recipe:
    """The recipe with a vision tower left as it is, because nothing is known of its activations."""
    if spec.vision is None:
        return recipe
    names = [name for name, _ in units(spec.model, spec.vision.spec) if name.startswith(VISION)]
    if all(choose(recipe, name).format == "none" for name in names):
        return recipe
    notice(
        f"The data holds no image, so nothing was measured in the vision tower, which stays in {spec.model.dtype}: "
        "give conversations with images (a .jsonl file) to quantise it too."
    )
    left = tuple(Override(pattern=f"{prefix}*", format="none") for prefix in VISION)
    return dataclasses.replace(recipe, overrides=(*recipe.overrides, *left))


def _check_demands(floor: int, floor_action: str) -> None:
    """Checks the demands on experts.

    Raises:
        CalibrationError: One is out of range.
    """
    if floor < 0:
        raise CalibrationError(f"floor is {floor}, expected a number of tokens from 0 up")
    if floor_action not in FLOOR_ACTIONS:
        raise CalibrationError(f"floor-action is {floor_action!r}, expected one of {', '.join(FLOOR_ACTIONS)}")
