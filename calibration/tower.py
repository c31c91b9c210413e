"""The vision tower quantised while the tiles of calibration images run through it.

Enters: a layer's input for all tiles; at the end the last layer's output. Leaves: the quantised tower's tensors and
records, the unquantised tower's hidden states, and at the end the image features, which the decoder is calibrated with.
Layer norms and biases take their part of the smoothing: nothing is smoothed across a GELU.

Shapes: as in `export.llama4_tower`.
"""

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..spec.choice import ADAPTER, PATCHES, PROJECTOR
from ..spec.geometry import VISION, VISION_LAYERS, VisionSpec
from ..spec.recipe import Recipe
from ..walk.decoder import Hidden
from ..walk.numbers import Weights
from ..walk.tower import Pixels, TowerLayerWalk, each_patches, project
from .linears import Linears, observer


def quantise_tower_layer(
    vision: VisionSpec, index: int, weights: Weights, recipe: Recipe, x: Hidden, attended: Hidden, out: Hidden
) -> Linears:
    """Quantises one layer and writes its unquantised output.

    Args:
        vision: Geometry.
        index: Which layer.
        weights: Where its tensors are read from.
        recipe: How they are quantised.
        x: Its input.
        attended: Room for what is behind the attention.
        out: Room for its output.

    Returns:
        Every tensor of the quantised layer.

    Raises:
        CalibrationError: An activation is not finite.
    """
    linears = Linears(weights, recipe, f"{VISION_LAYERS}{index}.", f"vision layer {index}")
    walk = TowerLayerWalk(vision, index, weights, attended, out)
    _quantise_attention(linears, walk, x)
    _quantise_feed(linears, walk)
    return linears


def _quantise_attention(linears: Linears, walk: TowerLayerWalk, x: Hidden) -> None:
    size, names = walk.vision.hidden_size, {part: f"self_attn.{part}_proj" for part in "qkvo"}
    source = linears.input("attention_input", size, [names[part] for part in "qkv"])
    attended = linears.input("attention_output", size, [names["o"]])
    walk.attend(x, observer(source, attended))
    weights = {part: walk.weight(f"{name}.weight") for part, name in names.items()}
    linears.smooth(source, linears.readers(source, {names[part]: weights[part] for part in "qkv"}))
    linears.smooth(attended, linears.readers(attended, {names["o"]: weights["o"]}))
    _emit_norm(linears, "input_layernorm", source.exponents_K)
    for part, name in names.items():
        divided = attended.exponents_K if part == "v" else None
        linears.emit_linear(name, weights[part], attended if part == "o" else source, divided)
        if part == "v":  # attention averages values, biases and all, so that what it divides is divided behind it
            linears.emit_divided(f"{name}.bias", attended.exponents_K)
        else:
            linears.emit_kept(f"{name}.bias")


def _quantise_feed(linears: Linears, walk: TowerLayerWalk) -> None:
    source = linears.input("feed_input", walk.vision.hidden_size, ["mlp.fc1"])
    activated = linears.input("down_input", walk.vision.mlp_size, ["mlp.fc2"])
    walk.feed(observer(source, activated))
    fc1, fc2 = (walk.weight(f"mlp.{name}.weight") for name in ("fc1", "fc2"))
    linears.smooth(source, linears.readers(source, {"mlp.fc1": fc1}))
    _emit_norm(linears, "post_attention_layernorm", source.exponents_K)
    linears.emit_linear("mlp.fc1", fc1, source)
    linears.emit_linear("mlp.fc2", fc2, activated)
    for name in ("fc1", "fc2"):
        linears.emit_kept(f"mlp.{name}.bias")


def _emit_norm(linears: Linears, name: str, exponents_K: Tensor) -> None:
    for part in ("weight", "bias"):
        linears.emit_divided(f"{name}.{part}", exponents_K)


def quantise_tower_ends(
    vision: VisionSpec,
    weights: Weights,
    recipe: Recipe,
    pixels_N3PP: Pixels,
    x: Hidden,
    features_MH: NDArray[np.float32],
) -> Linears:
    """Quantises the linears before and behind the layers, where an override asks for it, and writes the features.

    Args:
        vision: Geometry.
        weights: Where the tensors are read from.
        recipe: How they are quantised.
        pixels_N3PP: The tiles.
        x: The last layer's output.
        features_MH: Room for the unquantised tower's image features.

    Returns:
        Every tensor of the tower that is none of its layers'.

    Raises:
        CalibrationError: An activation is not finite.
    """
    linears = Linears(weights, recipe, "", "vision tower")
    patches = linears.input("patches", vision.patch_values, [PATCHES])
    if linears.choice(PATCHES).format != "none":
        for _, patches_NSK in each_patches(vision, pixels_N3PP, weights.device):
            patches.statistics.update(patches_NSK.flatten(0, 1))
    behind = [
        linears.input("adapter_input", vision.mlp_size, [ADAPTER[0]]),
        linears.input("adapter_middle", vision.adapter_size, [ADAPTER[1]]),
        linears.input("projector_input", vision.adapter_size, [PROJECTOR]),
    ]
    project(vision, weights, x, features_MH, observer(*behind))
    sources = dict(zip((PATCHES, *ADAPTER, PROJECTOR), (patches, *behind), strict=True))
    for unit, source in sources.items():
        linears.emit_linear(unit, weights.wide(f"{unit}.weight"), source)
    for name in weights.regions:
        is_end = name.startswith(VISION) and not name.startswith(VISION_LAYERS)
        if is_end and name.removesuffix(".weight") not in sources:
            linears.emit_kept(name)
    return linears
