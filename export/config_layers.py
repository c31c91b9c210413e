"""The kinds of a text decoder's layers, from three lists and the rules that fill in for them, as `transformers` 5.

`layer_types` says which layers attend within chunks, and has one entry a layer. Left out or null, the layers that
rotate do. `no_rope_layers` says which layers rotate (1) and which do not (0); left out, null or empty, every
`no_rope_layer_interval`-th does not. It may be longer than the model is deep only beside `layer_types`. `moe_layers`
says which layers have experts, an empty list that none has; numbers beyond the model's layers say nothing. Left out or
null, every `interleave_moe_layer_step`-th has. `attention_chunk_size` null is attention without chunks.
"""

from ..spec.geometry import LayerSpec
from .config_fields import Fields, is_whole

MOST_LAYERS = 1000
"""A configuration with more is damaged."""

KINDS = {"chunked_attention": True, "full_attention": False, "attention": False}
"""Whether a layer attends within chunks, by the names in `layer_types`; the last is an older one."""


def read_layers(fields: Fields) -> tuple[LayerSpec, ...]:
    """Which layers rotate, chunk and route."""
    count = fields.count("num_hidden_layers")
    if count > MOST_LAYERS:
        fields.refuse("num_hidden_layers", f"at most {MOST_LAYERS}")
    ropes = _rotating(fields, count)
    chunked = _chunked(fields, ropes)
    routed = _routed(fields, count)
    chunk = 0 if fields.is_null("attention_chunk_size") else fields.count("attention_chunk_size", 8192)
    return tuple(
        LayerSpec(rope=rope, chunk=chunk if chunked[index] else 0, experts=index in routed)
        for index, rope in enumerate(ropes)
    )


def _rotating(fields: Fields, count: int) -> list[bool]:
    interval = fields.count("no_rope_layer_interval", 4)
    found = fields.get("no_rope_layers")
    if found is None or found == []:
        return [(index + 1) % interval != 0 for index in range(count)]
    expected = f"a list with one of 0, 1 for each of the {count} layers"
    if not isinstance(found, list) or not all(is_whole(value) and value in (0, 1) for value in found):
        fields.refuse("no_rope_layers", expected)
    if len(found) < count or (len(found) > count and fields.get("layer_types") is None):
        fields.refuse("no_rope_layers", f"{expected}, found {len(found)}")
    return [value == 1 for value in found[:count]]


def _chunked(fields: Fields, ropes: list[bool]) -> list[bool]:
    found = fields.get("layer_types")
    if found is None:
        return ropes
    expected = f"a list with one of chunked_attention, full_attention for each of the {len(ropes)} layers"
    if not isinstance(found, list) or not all(isinstance(value, str) and value in KINDS for value in found):
        fields.refuse("layer_types", expected)
    if len(found) != len(ropes):
        fields.refuse("layer_types", f"{expected}, found {len(found)}")
    return [KINDS[value] for value in found]


def _routed(fields: Fields, count: int) -> frozenset[int]:
    listed = fields.list_of_whole("moe_layers")
    step = fields.get("interleave_moe_layer_step", 1)
    if not is_whole(step) or (listed is None and step < 1):
        fields.refuse("interleave_moe_layer_step", "a whole number from 1 up, or 0 beside a list of moe_layers")
    return frozenset(range(step - 1, count, step) if listed is None else listed)
