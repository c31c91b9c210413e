"""A recipe in words, for reports and for `inspect`."""

from .choice import INT8_GROUP, is_grouped_int8
from .recipe import Override, Recipe

NAMES = {"int8": "INT8", "fp8": "FP8", "int4": "INT4", "none": "as stored"}
CLIPS = {
    "absmax": "up to the largest seen",
    "percentile": "up to the {percentile:g}th percentile",
    "entropy": "clipped at least divergence",
    "mse": "clipped at least squared error",
}


def in_words(recipe: Recipe | None) -> str:
    """A recipe as a sentence, as in `INT8 weights, a scale an output channel; rounding to nearest`."""
    if recipe is None:
        return "not quantised"
    name = NAMES[recipe.format]
    if recipe.format == "int4":
        parts = [f"{name} weights in groups of {recipe.group_size} inputs, activations as they are"]
    else:
        clip = CLIPS[recipe.clip].format(percentile=recipe.percentile)
        scale = "a scale a token" if recipe.activations == "dynamic" else f"one scale a tensor, {clip}"
        weights = f"in groups of {INT8_GROUP} inputs" if is_grouped_int8(recipe) else "a scale an output channel"
        parts = [f"{name} weights, {weights}", f"{name} activations, {scale}"]
    if recipe.weight_clip == "mse":
        parts.append("weights' scales of least squared error")
    if recipe.smoothing != "none":
        method = {"smoothquant": "SmoothQuant", "awq": "AWQ's scaling"}[recipe.smoothing]
        strength = "searched strength" if recipe.strength is None else f"strength {recipe.strength:g}"
        parts.append(f"{method} of {strength}")
    parts.append("GPTQ's rounding" if recipe.rounding == "gptq" else "rounding to nearest")
    if recipe.kv_cache != "none":
        parts.append(f"keys and values in {NAMES[recipe.kv_cache]}")
    parts += [_exception(each) for each in recipe.overrides]
    return "; ".join(parts)


def _exception(override: Override) -> str:
    """An exception in words."""
    changes = [NAMES[override.format]] if override.format else []
    changes += [
        f"{name.replace('_', ' ')} {value}"
        for name in ("activations", "clip", "group_size", "rounding")
        if (value := getattr(override, name)) is not None
    ]
    return f"{override.pattern}: {', '.join(changes) or 'as the others'}"


BITS = {"int8": 8, "fp8": 8, "int4": 4}


def bits(recipe: Recipe | None, dtype_bits: int) -> int:
    """Bits of a quantised weight; those of the model's type where nothing is quantised."""
    return dtype_bits if recipe is None else BITS[recipe.format]
