"""A folder's weights as schema 1 describes them, turned into those of schema 2, or refused where they are others.

Schema 2 moved the inputs of quantised experts' weights behind their outputs, [E, K, N] to [E, N, K], and nothing else.
So a folder without such experts is as it was. A bundle for the CPU has integers in panels, which are the same bytes
whichever they were made from: only the shapes that they had turn. All others hold weights, or kernels that read them,
in the old order, and are refused with the verb that makes them anew.
"""

import dataclasses

from ..errors import FolderError
from .choice import choose, units
from .geometry import ModelSpec
from .recipe import Format, Recipe
from .stored_weights import Weight

BUILD_AGAIN = "make its model anew (`arriero export` of a quantised checkpoint, else `arriero calibrate`) and build it"


def read_older(
    model: ModelSpec, recipe: Recipe | None, target: str, weights: tuple[Weight, ...], remedy: str
) -> tuple[Weight, ...]:
    """The weights that a folder's graph is given, as today's schema describes them.

    Args:
        model: Geometry.
        recipe: How it is quantised.
        target: What it was built for; empty in a model.
        weights: The weights as they are described.
        remedy: The way to a folder that is read.

    Raises:
        FolderError: The folder's own weights, or what its kernels read, lie in another order.
    """
    formats = expert_formats(model, recipe)
    if formats - {"int8", "int4"} or (formats and target != "cpu"):
        raise FolderError(f"spec.json has schema 1, of which quantised experts lie in another order: {remedy}")
    return tuple(map(_turned, weights))


def expert_formats(model: ModelSpec, recipe: Recipe | None) -> set[Format]:
    """The formats that experts are quantised to."""
    if recipe is None:
        return set()
    names = [name for name, _ in units(model) if name.endswith(".experts")]
    formats: set[Format] = {choose(recipe, name).format for name in names}
    return formats - {"none"}


def _turned(weight: Weight) -> Weight:
    """A weight of all experts with outputs in front of inputs; others as they are."""
    if not weight.stacked:
        return weight
    experts, inputs, outputs = weight.shape
    return dataclasses.replace(weight, shape=(experts, outputs, inputs))
