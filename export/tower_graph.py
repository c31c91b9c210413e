"""The canonical vision graph: the traced layer cloned for each of the tower's, patches before them, projector behind.

Leaves: an onnx-ir model from `pixels` [N, 3, P, P] in float32, normalised, to `image_features` [M, H] in the model's
type, in the order of the tiles. Its initializers are named as in the checkpoint and read in place from safetensors.
"""

import onnx_ir as ir

from ..plugins.nodes import OPSET, Nodes, ints, onnx_type
from ..spec.choice import ADAPTER, PATCHES, PROJECTOR
from ..spec.geometry import VISION_LAYERS, VisionSpec
from ..spec.types import DType
from .assembly import IR_VERSION, Initializers, PlaceOf, clone
from .llama4_tower import NORM_EPS, turns
from .trace import trace_tower_layer

TOWER = "vision_model."


def stitch_tower(vision: VisionSpec, text_size: int, dtype: DType, place_of: PlaceOf) -> ir.Model:
    """Builds the vision graph.

    Args:
        vision: Geometry.
        text_size: Hidden size of the text decoder (H).
        dtype: Type of the graph.
        place_of: Finds a tensor in the weight files.
    """
    tensors = Initializers(place_of)
    pixels = ir.val("pixels", ir.DataType.FLOAT, ["tiles", 3, vision.image_size, vision.image_size])
    nodes = Nodes("stem/")
    x = _stem(nodes, pixels, tensors, vision, dtype)
    cos, sin = _turns(nodes, x, tensors, vision)
    written, traced = nodes.list, trace_tower_layer(vision, dtype)
    for index in range(vision.layers):
        x, added = _layer(traced, tensors, index, x, cos, sin)
        written += added
    nodes = Nodes("head/")
    features = _head(nodes, x, tensors, vision)
    output = ir.val("image_features", onnx_type(dtype), ["features", text_size])
    nodes.node("MatMul", [features, _turned(nodes, tensors, PROJECTOR)], outputs=[output])
    graph = ir.Graph(
        [pixels],
        [output],
        nodes=written + nodes.list,
        initializers=list(tensors.values.values()),
        opset_imports={"": OPSET},
        name="vision",
        doc_string="Llama 4 vision tower and projector: tiles of images to the features that stand for them.",
    )
    return ir.Model(graph, ir_version=IR_VERSION, producer_name="arriero")


def _stem(nodes: Nodes, pixels: ir.Value, tensors: Initializers, vision: VisionSpec, dtype: DType) -> ir.Value:
    """Patches, class token, places and norm: [N, S, C]."""
    grid, side = vision.grid, vision.patch_size
    x = nodes.Cast(pixels, to=onnx_type(dtype))
    if grid * side < vision.image_size:
        x = nodes.Slice(x, ints(0, 0), ints(grid * side, grid * side), ints(2, 3))
    squares = nodes.Reshape(x, ints(0, 3, grid, side, grid, side))
    patches = nodes.Reshape(
        nodes.Transpose(squares, perm=[0, 2, 4, 1, 3, 5]), ints(0, grid * grid, vision.patch_values)
    )
    x = nodes.MatMul(patches, _turned(nodes, tensors, PATCHES))
    count = nodes.Shape(pixels, start=0, end=1)
    last = nodes.Expand(tensors.weight(f"{TOWER}class_embedding"), nodes.Concat(count, ints(1, 1), axis=0))
    placed = nodes.Add(nodes.Concat(x, last, axis=1), tensors.weight(f"{TOWER}positional_embedding_vlm"))
    return _norm(nodes, placed, tensors, "layernorm_pre")


def _turns(nodes: Nodes, x: ir.Value, tensors: Initializers, vision: VisionSpec) -> tuple[ir.Value, ir.Value]:
    """Cosine and sine of each position's angles, for each tile: [N, S, D/2]."""
    shape = nodes.Concat(nodes.Shape(x, start=0, end=2), ints(vision.head_dim // 2), axis=0)
    constants = (
        tensors.constant(f"rope.{name}", angle.numpy())
        for name, angle in zip(("cos", "sin"), turns(vision), strict=True)
    )
    cos, sin = (nodes.Expand(each, shape) for each in constants)
    return cos, sin


def _layer(
    traced: ir.Graph, tensors: Initializers, index: int, x: ir.Value, cos: ir.Value, sin: ir.Value
) -> tuple[ir.Value, list[ir.Node]]:
    """Clones the traced layer. Returns its output and its nodes."""
    mapped: dict[ir.Value, ir.Value] = dict(zip(traced.inputs, [x, cos, sin], strict=True))
    for name, value in traced.initializers.items():
        mapped[value] = tensors.weight(f"{VISION_LAYERS}{index}.{name}")
    nodes = [clone(node, mapped, f"layers.{index}", ("tiles",)) for node in traced]
    return mapped[traced.outputs[0]], nodes


def _head(nodes: Nodes, x: ir.Value, tensors: Initializers, vision: VisionSpec) -> ir.Value:
    """Norm, pixel shuffle and adapter: [M, adapter size]."""
    normed = _norm(nodes, x, tensors, "layernorm_post")
    patches = nodes.Slice(normed, ints(0), ints(vision.grid**2), ints(1))
    across, shuffle = vision.grid // vision.shuffle, vision.shuffle
    squares = nodes.Reshape(patches, ints(0, across, shuffle, across, shuffle, vision.hidden_size))
    x = nodes.Reshape(nodes.Transpose(squares, perm=[0, 1, 3, 2, 4, 5]), ints(-1, vision.mlp_size))
    for name in ADAPTER:
        x = nodes.Gelu(nodes.MatMul(x, _turned(nodes, tensors, name)))
    return x


def _norm(nodes: Nodes, x: ir.Value, tensors: Initializers, name: str) -> ir.Value:
    weight, bias = (tensors.weight(f"{TOWER}{name}.{part}") for part in ("weight", "bias"))
    normed: ir.Value = nodes.LayerNormalization(x, weight, bias, axis=-1, epsilon=NORM_EPS)
    return normed


def _turned(nodes: Nodes, tensors: Initializers, name: str) -> ir.Value:
    """A linear's weight as a product takes it."""
    weight: ir.Value = nodes.Transpose(tensors.weight(f"{name}.weight"), perm=[1, 0])
    return weight
