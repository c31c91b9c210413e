"""A recipe's choice for one linear or for one layer's experts.

Enters: a `spec.Recipe`. Leaves: a `Choice` for each unit of a model. The units are named as in the checkpoint, without
`model.` and `.weight`. Router and LM head, and of the vision tower all but its layers, are left as they are unless an
override gives them a format.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from .geometry import VISION, VISION_LAYERS, ModelSpec, VisionSpec
from .recipe import Format, Recipe

INT8_GROUP = 32
"""Inputs that share a scale where int8 weights are in groups."""

KEPT = ("router", "lm_head")
"""Last names of units that stay in high precision unless asked."""

PATCHES = "vision_model.patch_embedding.linear"
ADAPTER = ("vision_model.vision_adapter.mlp.fc1", "vision_model.vision_adapter.mlp.fc2")
PROJECTOR = "multi_modal_projector.linear_1"
"""The vision tower's units before and behind its layers, which stay so too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """A recipe's choice for one unit; the fields are those of `spec.Recipe`, and a `group_size` of 0 is all inputs."""

    format: Format
    activations: str
    clip: str
    group_size: int
    rounding: str

    @property
    def quantises_activations(self) -> bool:
        """Whether the input is quantised too."""
        return self.format in ("int8", "fp8")


def units(spec: ModelSpec, vision: VisionSpec | None = None) -> Iterator[tuple[str, int]]:
    """Every unit that can be quantised, and the inputs of its products (of experts, of their first)."""
    for index, layer in enumerate(spec.layers):
        attention, feed = f"layers.{index}.self_attn", f"layers.{index}.feed_forward"
        for name in ("q", "k", "v"):
            yield f"{attention}.{name}_proj", spec.hidden_size
        yield f"{attention}.o_proj", spec.heads * spec.head_dim
        mlp, size = feed, spec.dense_size
        if layer.experts:
            yield f"{feed}.router", spec.hidden_size
            yield f"{feed}.experts", spec.hidden_size
            mlp, size = f"{feed}.shared_expert", spec.expert_size
        yield f"{mlp}.gate_proj", spec.hidden_size
        yield f"{mlp}.up_proj", spec.hidden_size
        yield f"{mlp}.down_proj", size
    yield "lm_head", spec.hidden_size
    if vision is not None:
        yield from _tower_units(vision)


def _tower_units(vision: VisionSpec) -> Iterator[tuple[str, int]]:
    yield PATCHES, vision.patch_values
    for index in range(vision.layers):
        layer = f"{VISION_LAYERS}{index}"
        for name in "qkvo":
            yield f"{layer}.self_attn.{name}_proj", vision.hidden_size
        yield f"{layer}.mlp.fc1", vision.hidden_size
        yield f"{layer}.mlp.fc2", vision.mlp_size
    yield ADAPTER[0], vision.mlp_size
    yield ADAPTER[1], vision.adapter_size
    yield PROJECTOR, vision.adapter_size


def is_kept(name: str) -> bool:
    """Whether a unit stays in high precision unless asked."""
    is_end = name.startswith(VISION) and not name.startswith(VISION_LAYERS)
    return is_end or name.rpartition(".")[2] in KEPT


def choose(recipe: Recipe, name: str) -> Choice:
    """The recipe's choice for a unit."""
    choice = Choice(
        format="none" if is_kept(name) else recipe.format,
        activations=recipe.activations,
        clip=recipe.clip,
        group_size=recipe.group_size,
        rounding=recipe.rounding,
    )
    for override in recipe.overrides:
        if fnmatchcase(name, override.pattern):
            given = {field.name: getattr(override, field.name) for field in dataclasses.fields(Choice)}
            choice = dataclasses.replace(
                choice, **{field: value for field, value in given.items() if value is not None}
            )
    has_groups = choice.format == "int4" or (choice.format == "int8" and is_grouped_int8(recipe))
    return choice if has_groups else dataclasses.replace(choice, group_size=0)


def is_grouped_int8(recipe: Recipe) -> bool:
    """Whether a recipe's int8 weights have a scale for each `INT8_GROUP` inputs, which CPUs alone take."""
    return recipe.format == "int8" and recipe.group_size == INT8_GROUP
