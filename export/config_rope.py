"""RoPE's parameters, which may stand in four places of a configuration, by the precedence of `transformers` 5.

| quantity | first | then | else |
|---|---|---|---|
| the object | `rope_scaling`, where it is not empty | `rope_parameters` | no scaling |
| base | `rope_theta` in that object | `rope_theta` beside it | 500000 (text), 10000 (vision) |
| type | `rope_type` in that object | `type` in it | `default` |
| original context | `original_max_position_embeddings` beside it | the same in it | `max_position_embeddings` |

So an object that is not taken gives nothing, its base included. Null is a value: it does not fall through.
"""

from typing import Any

from ..spec.geometry import RopeScaling
from .config_fields import Fields

LAYER_KINDS = ("chunked_attention", "full_attention", "sliding_attention", "attention")
"""Names of kinds of layers, under which an object may hold parameters for each: no Llama 4 does."""

ORIGINAL = "original_max_position_embeddings"


def text_rope(fields: Fields, max_positions: int) -> tuple[float, RopeScaling | None]:
    """The text decoder's base and scaling."""
    name, rope = _chosen(fields)
    theta = _theta(fields, rope, 500000.0)
    kind = _kind(rope)
    if kind == "default":
        return theta, None
    if kind != "llama3":
        fields.refuse(name, "of type 'default' or 'llama3'")
    inside = "partial_rotary_factor" in rope.values
    partial = rope if inside else fields
    if partial.get("partial_rotary_factor", 1) != 1 and (inside or not fields.is_null("partial_rotary_factor")):
        partial.refuse("partial_rotary_factor", "1, since Llama 4 rotates whole heads")
    original = next((each for each in (fields, rope) if ORIGINAL in each.values), Fields({ORIGINAL: max_positions}))
    return theta, RopeScaling(
        factor=rope.positive("factor"),
        low_freq_factor=rope.positive("low_freq_factor"),
        high_freq_factor=rope.positive("high_freq_factor"),
        original_max_positions=_whole(original).count(ORIGINAL),
    )


def _whole(fields: Fields) -> Fields:
    """Fields with a context that is written with a point (8192.0) as a whole number."""
    value = fields.get(ORIGINAL)
    is_point = isinstance(value, float) and value.is_integer()
    return Fields({ORIGINAL: int(value)}, fields.place) if is_point else fields


def vision_theta(fields: Fields) -> float:
    """The vision tower's base; it knows no scaling."""
    name, rope = _chosen(fields)
    if _kind(rope) != "default":
        fields.refuse(name, "of type 'default'")
    return _theta(fields, rope, 10000.0)


def refuse_outside(whole: Fields) -> None:
    """Refuses scaling beside a multimodal checkpoint's parts, where neither would heed it.

    Raises:
        CheckpointError: There is some.
    """
    name, rope = _chosen(whole)
    if _kind(rope) != "default":
        whole.refuse(name, "it within text_config")


def _chosen(fields: Fields) -> tuple[str, Fields]:
    """The name of the object that is taken, and its values; the other's type is checked only."""
    objects: dict[str, dict[str, Any]] = {}
    for name in ("rope_parameters", "rope_scaling"):
        found = fields.get(name)
        if found is not None and not isinstance(found, dict):
            fields.refuse(name, "an object or null")
        objects[name] = found or {}
    name = "rope_scaling" if objects["rope_scaling"] else "rope_parameters"
    if any(key in LAYER_KINDS or isinstance(value, dict) for key, value in objects[name].items()):
        fields.refuse(name, "one object for all layers, since Llama 4 rotates them alike")
    return name, Fields(objects[name], f"{fields.place}{name}.")


def _theta(fields: Fields, rope: Fields, default: float) -> float:
    return rope.positive("rope_theta") if "rope_theta" in rope.values else fields.positive("rope_theta", default)


def _kind(rope: Fields) -> Any:
    return rope.get("rope_type", rope.get("type", "default"))
