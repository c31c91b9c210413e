"""Recipes: the presets, what a command line changes of them, and whether they fit a model.

Enters: a preset's name and changes. Leaves: a `spec.Recipe` that fits the model it is checked against.
"""

import dataclasses
import typing
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase

from ..errors import CalibrationError
from ..spec.choice import choose, is_grouped_int8, units
from ..spec.geometry import ModelSpec, VisionSpec
from ..spec.recipe import Format, Override, Recipe


def int8(**changes: object) -> Recipe:
    """W8A8: weights by output channel, a scale for each token, SmoothQuant with a searched strength."""
    return _changed(Recipe(format="int8", activations="dynamic", smoothing="smoothquant"), changes)


def fp8(**changes: object) -> Recipe:
    """E4M3 W8A8: weights by output channel with GPTQ's rounding, static activations.

    There is no smoothing: a power of two moves a floating-point value and not its relative error.
    """
    return _changed(Recipe(format="fp8", rounding="gptq"), changes)


def int4(**changes: object) -> Recipe:
    """Weights only, in groups: AWQ's scaling, scales of least squared error, GPTQ's rounding."""
    return _changed(Recipe(format="int4", smoothing="awq", weight_clip="mse", rounding="gptq"), changes)


PRESETS: dict[str, Callable[..., Recipe]] = {"int8": int8, "fp8": fp8, "int4": int4}


def _changed(recipe: Recipe, changes: dict[str, object]) -> Recipe:
    """A preset with other fields; None leaves a field as it is.

    Raises:
        CalibrationError: A value is out of range.
    """
    given = {name: value for name, value in changes.items() if value is not None}
    try:
        return dataclasses.replace(recipe, **given)  # type: ignore[arg-type]
    except ValueError as error:
        raise CalibrationError(f"recipe: {error}") from error


def parse_recipe(name: str, changes: Mapping[str, object], overrides: Sequence[str]) -> Recipe:
    """A preset with what a command line changes of it.

    Args:
        name: The preset.
        changes: Other fields; None leaves a field as it is.
        overrides: `PATTERN=FORMAT` each.

    Raises:
        CalibrationError: A name or value is unknown.
    """
    if name not in PRESETS:
        raise CalibrationError(f"recipe {name!r} is unknown: choose one of {', '.join(PRESETS)}")
    for field, hint in typing.get_type_hints(Recipe).items():
        valid, value = typing.get_args(hint), changes.get(field)
        if typing.get_origin(hint) is typing.Literal and value is not None and value not in valid:
            raise CalibrationError(f"{field.replace('_', '-')} is {value!r}, expected one of {', '.join(valid)}")
    parsed = []
    for text in overrides:
        pattern, found, chosen = text.rpartition("=")
        if not found or chosen not in typing.get_args(Format):
            formats = ", ".join(typing.get_args(Format))
            raise CalibrationError(f"override {text!r} is no PATTERN=FORMAT with a format of {formats}")
        parsed.append(Override(pattern=pattern, format=chosen))  # type: ignore[arg-type]
    return PRESETS[name](**changes, overrides=tuple(parsed))


APPLIES: dict[str, tuple[str, Callable[[Recipe, Sequence[Format]], bool]]] = {
    "group_size": (
        "groups are int4's, and of 32 int8's: choose 32",
        lambda recipe, formats: "int4" in formats or is_grouped_int8(recipe),
    ),
    "percentile": (
        "it is the clip's of that name: add --clip percentile",
        lambda recipe, formats: "percentile" in (recipe.clip, *(each.clip for each in recipe.overrides)),
    ),
    "strength": ("nothing is smoothed: add --smoothing", lambda recipe, formats: recipe.smoothing != "none"),
    "activations": (
        "int4 leaves activations as they are",
        lambda recipe, formats: "int8" in formats or "fp8" in formats,
    ),
    "clip": (
        "there is no static activation to clip: add --activations static, with int8 or fp8",
        lambda recipe, formats: _is_static(recipe) and ("int8" in formats or "fp8" in formats),
    ),
}
"""Changes that a recipe may have no use for: why, and whether it has."""


def check_applies(recipe: Recipe, changes: Mapping[str, object]) -> None:
    """Refuses changes that would change nothing.

    Args:
        recipe: The recipe with the changes.
        changes: The changes as they were given; None is none.

    Raises:
        CalibrationError: One of them does not apply to the recipe.
    """
    formats: list[Format] = [recipe.format, *(each.format for each in recipe.overrides if each.format)]
    for name, (why, applies) in APPLIES.items():
        if changes.get(name) is not None and not applies(recipe, formats):
            option = f"--{name.replace('_', '-')}"
            leave = ", or leave it out" if ": " in why else ": leave it out"
            raise CalibrationError(f"{option} does not apply to this {recipe.format} recipe, {why}{leave}")


def _is_static(recipe: Recipe) -> bool:
    return "static" in (recipe.activations, *(each.activations for each in recipe.overrides))


def check_recipe(recipe: Recipe, spec: ModelSpec, vision: VisionSpec | None = None) -> None:
    """Refuses a recipe that does not fit a model, before anything is read.

    Raises:
        CalibrationError: A group size does not divide, a pattern matches nothing, or a method is not for its format.
    """
    named = dict(units(spec, vision))
    for override in recipe.overrides:
        if not any(fnmatchcase(name, override.pattern) for name in named):
            some = ", ".join(list(named)[:3])
            raise CalibrationError(f"pattern {override.pattern!r} matches no weight: names are {some}, …")
    if spec.tied_embeddings and choose(recipe, "lm_head").format != "none":
        raise CalibrationError("lm_head is the embedding in this model, which is not quantised: leave it out")
    for name, inputs in named.items():
        choice = choose(recipe, name)
        if choice.format == "fp8" and choice.clip == "entropy":
            raise CalibrationError(f"{name}: clip 'entropy' counts int8's levels: choose absmax, percentile or mse")
        sizes = (inputs, spec.expert_size) if name.endswith(".experts") else (inputs,)
        for size in sizes if choice.group_size else ():
            _check_group(name, choice.group_size, size)


def _check_group(name: str, group: int, size: int) -> None:
    """Group sizes are those that every target's kernels take."""
    if group not in (32, 64, 128):
        raise CalibrationError(f"{name}: group size {group} is none of 32, 64 and 128")
    if size % group:
        fitting = [str(other) for other in (32, 64, 128) if size % other == 0]
        remedy = f"choose {' or '.join(fitting)}" if fitting else "leave it out with an override of format none"
        raise CalibrationError(f"{name}: group size {group} does not divide its {size} inputs: {remedy}")
