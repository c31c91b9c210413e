"""The inventory of an already quantised checkpoint: the role of each tensor, and the recipe that they amount to.

Enters: a checkpoint's tensors, its geometry and its `Scheme`. Leaves: a `Prequantised`, which holds the tensors that
are not quantised under `plain`, the others as the graph reads them. The scales are the checkpoint's own.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ...errors import CheckpointError
from ...spec.choice import units
from ...spec.geometry import ModelSpec
from ...spec.recipe import Override, Recipe
from .restacked import GraphTensors
from .scheme import Scheme, WeightGroup
from .stored import CheckpointTensor, Finder, StoredWeight

TensorShapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Prequantised:
    """An already quantised checkpoint's tensors, sorted.

    Attributes:
        scheme: The configuration's description of the quantisation.
        recipe: How the model is quantised.
        tensors: The quantised weights and their scales.
        plain: The checkpoint's other tensors, not yet checked.
        plain_shapes: Names and shapes that those must have.
    """

    scheme: Scheme
    recipe: Recipe
    tensors: GraphTensors
    plain: dict[str, CheckpointTensor]
    plain_shapes: dict[str, tuple[int, ...]]


def find_quantised(
    found: Mapping[str, CheckpointTensor], expected: TensorShapes, spec: ModelSpec, prefix: str, scheme: Scheme
) -> Prequantised:
    """Finds and checks what is quantised.

    Args:
        found: The text decoder's tensors.
        expected: Names and shapes that they would have unquantised.
        spec: Geometry.
        prefix: Beginning of the names.
        scheme: The configuration's description of the quantisation.

    Raises:
        CheckpointError: A scale is missing or none, or a weight is stored as Arriero does not take it.
    """
    return _Search(found, expected, spec, prefix, scheme).search()


class _Search:
    """The walk over a model's units."""

    def __init__(
        self,
        found: Mapping[str, CheckpointTensor],
        expected: TensorShapes,
        spec: ModelSpec,
        prefix: str,
        scheme: Scheme,
    ) -> None:
        self.finder = Finder(found, scheme)
        self.expected, self.spec, self.scheme = dict(expected), spec, scheme
        self.prefix = prefix
        self.tensors = GraphTensors()
        self.groups: dict[str, WeightGroup | None] = {}

    def search(self) -> Prequantised:
        """Takes unit by unit; what is left is plain."""
        for unit, _ in units(self.spec):
            self.groups[unit] = None
            if unit.endswith(".experts"):
                self._find_experts(unit)
            elif unit != "lm_head" or not self.spec.tied_embeddings:
                self._find_linear(unit)
        if not any(self.groups.values()):
            raise CheckpointError("config.json has a quantization_config, but no weight is quantised: remove it there")
        kv_cache = self._find_cache_scales()
        recipe = recipe_of(self.groups, kv_cache, self.scheme.activation_bound)
        return Prequantised(
            scheme=self.scheme,
            recipe=recipe,
            tensors=self.tensors,
            plain=self.finder.left,
            plain_shapes=self.expected,
        )

    def _find_linear(self, unit: str) -> None:
        module = self._full(unit)
        name = f"{module}.weight"
        stored = self.finder.linear(module, *self.expected[name])
        if stored is None or stored.group is None:
            if stored is not None:
                self.finder.left[name] = stored.weight  # checked with the other plain ones, as what is missing is
            return
        del self.expected[name]
        self.groups[unit] = stored.group
        self.tensors.add_linear(stored, self.spec.dtype)

    def _find_experts(self, unit: str) -> None:
        module, spec = self._full(unit), self.spec
        gate_up, down = (f"{module}.{part}_proj" for part in ("gate_up", "down"))
        shapes = (
            (spec.experts, spec.hidden_size, 2 * spec.expert_size),
            (spec.experts, spec.expert_size, spec.hidden_size),
        )
        if gate_up in self.finder.left or down in self.finder.left:
            stacks = [self.finder.stack(name, shape) for name, shape in zip((gate_up, down), shapes, strict=True)]
            if stacks[0] is None and stacks[1] is None:
                return
            if stacks[0] is None or stacks[1] is None:
                raise CheckpointError(
                    f"of {module!r} only one of gate_up_proj and down_proj is quantised: quantise both"
                )
            self.tensors.add_stack(module, stacks[0], stacks[1])
            self.groups[unit] = stacks[0].group
        elif any(name.startswith(f"{module}.0.") for name in self.finder.left):
            gates, ups, downs = (self._modules(module, part) for part in ("gate", "up", "down"))
            self.tensors.add_experts(module, gates, ups, downs, spec.dtype)
            self.groups[unit] = gates[0].group
        else:
            return
        del self.expected[gate_up], self.expected[down]

    def _modules(self, experts: str, part: str) -> list[StoredWeight]:
        """One linear of every expert."""
        outputs, inputs = self.spec.expert_size, self.spec.hidden_size
        if part == "down":
            outputs, inputs = inputs, outputs
        found = []
        for expert in range(self.spec.experts):
            module = f"{experts}.{expert}.{part}_proj"
            stored = self.finder.linear(module, outputs, inputs)
            if stored is None:
                raise CheckpointError(f"tensor {f'{module}.weight'!r} is missing: download the weights again")
            found.append(stored)
        return found

    def _find_cache_scales(self) -> Literal["none", "int8", "fp8"]:
        """Keys' and values' scales, spread over heads and channels: one of a layer each, or none at all."""
        if self.scheme.kv_cache == "none":
            return "none"
        spec = self.spec
        missing = []
        for index in range(len(spec.layers)):
            layer = self._full(f"layers.{index}.self_attn")
            for part, name in (("k", "key_scale"), ("v", "value_scale")):
                names = f"{layer}.{part}_proj.{part}_scale", f"{layer}.{part}_scale"
                scale = self.finder.cache_scale(*names)
                if scale is None:
                    missing.append(names[0 if self.scheme.method == "modelopt" else 1])
                    continue
                self.tensors.add_values(f"{layer}.{name}", np.full((spec.kv_heads, spec.head_dim), scale, np.float32))
        if len(missing) == 2 * len(spec.layers):
            return "none"
        if missing:
            raise CheckpointError(f"tensor {missing[0]!r} is missing, other layers have it: download it again")
        return self.scheme.kv_cache

    def _full(self, unit: str) -> str:
        """A unit's name in the checkpoint."""
        return f"{self.prefix}{unit}" if unit == "lm_head" else f"{self.prefix}model.{unit}"


def recipe_of(
    groups: Mapping[str, WeightGroup | None], kv_cache: Literal["none", "int8", "fp8"], activation_bound: float
) -> Recipe:
    """The recipe that says of each unit what a checkpoint has.

    What most units have is the recipe's own; of the others each kind of linear gets an override, for all layers at once
    where they agree.
    """
    counts = Counter(group for unit, group in groups.items() if group is not None)
    first = counts.most_common(1)[0][0]
    kinds: dict[str, dict[str, WeightGroup | None]] = {}
    for unit, group in groups.items():
        kinds.setdefault(re.sub(r"^layers\.\d+\.", "layers.*.", unit), {})[unit] = group
    overrides = []
    for pattern, members in kinds.items():
        kept = None if pattern.endswith(("router", "lm_head")) else first
        same = len(set(members.values())) == 1
        for unit, group in members.items():
            if group != kept:
                overrides.append(_override(pattern if same else unit, group, first))
            if same:
                break
    return Recipe(
        format=first.format,
        activations=first.activations,
        group_size=first.group_size or 64,
        kv_cache=kv_cache,
        activation_bound=activation_bound,
        overrides=tuple(overrides),
    )


def _override(pattern: str, group: WeightGroup | None, first: WeightGroup) -> Override:
    """The recipe's exception for some units."""
    if group is None:
        return Override(pattern=pattern, format="none")
    given = Override(pattern=pattern, format=group.format)
    if group.activations != first.activations:
        given = dataclasses.replace(given, activations=group.activations)
    if group.group_size and group.group_size != (first.group_size or 64):
        given = dataclasses.replace(given, group_size=group.group_size)
    return given
