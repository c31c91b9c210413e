"""A folder's description in schema 1, as schema 2 has it, or refused where the folder itself is another.

Schema 2 moved the inputs of quantised experts' weights behind their outputs, [E, K, N] to [E, N, K], and nothing else.
So a folder without such experts is as it was. A bundle for the CPU has integers in panels, which are the same bytes
whichever they were made from: only the shapes that they had turn. All others hold weights, or kernels that read them,
in the old order, and are refused with the verb that makes them anew.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from ..errors import FolderError, shortened
from .choice import choose, units

if TYPE_CHECKING:
    from .folder import FolderSpec
    from .recipe import Format
    from .stored_weights import Weight

AGAIN = "make its model anew (`arriero export` of a quantised checkpoint, else `arriero calibrate`) and build it"


def read_older(spec: FolderSpec) -> FolderSpec:
    """The description in today's schema.

    Raises:
        FolderError: The folder's weights lie in another order.
    """
    formats = expert_formats(spec)
    if formats - {"int8", "int4"} or (formats and spec.target != "cpu"):
        raise FolderError(f"spec.json has schema 1, of which quantised experts lie in another order: {_remedy(spec)}")
    return dataclasses.replace(spec, schema=2, weights=tuple(map(_turned, spec.weights)))


def expert_formats(spec: FolderSpec) -> set[Format]:
    """The formats that experts are quantised to."""
    if spec.recipe is None:
        return set()
    names = [name for name, _ in units(spec.model) if name.endswith(".experts")]
    formats: set[Format] = {choose(spec.recipe, name).format for name in names}
    return formats - {"none"}


def _turned(weight: Weight) -> Weight:
    """A weight of all experts with outputs in front of inputs; others as they are."""
    if not weight.stacked:
        return weight
    experts, inputs, outputs = weight.shape
    return dataclasses.replace(weight, shape=(experts, outputs, inputs))


def _remedy(spec: FolderSpec) -> str:
    """The way to a folder that is read: by the stage that wrote it."""
    if spec.kind == "bundle" or spec.target:
        return AGAIN
    if spec.graph in spec.source_hashes:
        return f"calibrate {shortened(spec.source)} again"
    return f"export {shortened(spec.source)} again"
