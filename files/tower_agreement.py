"""A lowered vision tower's graph held against `spec.json`, node by node: what it computes is what the spec says.

Enters: a graph's outline, its weights and the spec. Leaves: nothing, or a `ValueError`. The order is that of
`export/llama4_tower` and `export/tower_graph`, whose graphs these are.
"""

from collections.abc import Sequence

from ..spec.choice import ADAPTER, PATCHES, PROJECTOR
from ..spec.geometry import VISION_LAYERS, VisionSpec
from ..spec.recipe import Recipe
from ..spec.stored_weights import Weight
from .angles import check_turns
from .computation import Computation, Ref, ints
from .decoder_agreement import FEATURES, check_outputs
from .onnx_outline import FLOAT, Outline, floats_of
from .products import Products

TOWER, PIXELS, NORM_EPS = "vision_model.", "pixels", 1e-5


def check_tower_nodes(
    outline: Outline, weights: Sequence[Weight], vision: VisionSpec, hidden_size: int, recipe: Recipe | None
) -> None:
    """Finds each node that the spec's tower has, and no other.

    Args:
        outline: The graph.
        weights: The weights that it is given.
        vision: The tower's geometry.
        hidden_size: Width of the decoder that its features enter.
        recipe: How it is quantised; None where it is not.

    Raises:
        ValueError: The graph computes something else.
    """
    nodes = Computation(outline)
    tower = _Tower(nodes, Products(nodes, weights, recipe), vision)
    x, turns = tower.stem()
    for index in range(vision.layers):
        try:
            x = tower.layer(index, x, turns)
        except ValueError as error:
            raise ValueError(f"layer {index}: {error}") from error
    check_outputs(nodes, {FEATURES: tower.head(x, hidden_size)})


class _Tower:
    """The tower that the spec describes."""

    def __init__(self, nodes: Computation, products: Products, vision: VisionSpec) -> None:
        self.nodes, self.find, self.products, self.vision = nodes, nodes.find, products, vision

    def stem(self) -> tuple[Ref, tuple[str, str]]:
        """Patches, class token, places and norm; cosines and sines of each tile's positions."""
        vision, find, grid, side = self.vision, self.find, self.vision.grid, self.vision.patch_size
        x: Ref = PIXELS
        if grid * side < vision.image_size:
            x = find("Slice", x, ints(0, 0), ints(grid * side, grid * side), ints(2, 3))
        squares = find("Transpose", find("Reshape", x, ints(0, 3, grid, side, grid, side)), perm=(0, 2, 4, 1, 3, 5))
        patches = find("Reshape", squares, ints(0, grid * grid, vision.patch_values))
        x = self.products.linear(patches, f"{PATCHES}.weight", vision.hidden_size, vision.patch_values)
        count = find("Concat", find("Shape", PIXELS, start=0, end=1), ints(1, 1), axis=0)
        last = find("Expand", self.products.weight(f"{TOWER}class_embedding", (vision.hidden_size,)), count)
        places = self.products.weight(f"{TOWER}positional_embedding_vlm", (vision.positions, vision.hidden_size))
        x = self._norm(find("Add", find("Concat", x, last, axis=1), places), f"{TOWER}layernorm_pre")
        shape = find("Concat", find("Shape", x, start=0, end=2), ints(vision.head_dim // 2), axis=0)
        self._check_turns()
        return x, (find("Expand", "rope.cos", shape), find("Expand", "rope.sin", shape))

    def _check_turns(self) -> None:
        dims, held = (self.vision.positions, self.vision.head_dim // 2), list[list[float]]()
        for name in ("rope.cos", "rope.sin"):
            tensor = self.nodes.outline.weights.get(name)
            if tensor is None or tensor.dtype != FLOAT or tensor.dims != dims:
                raise ValueError(f"no table {name!r} of {list(dims)}")
            held.append(floats_of(tensor))
            if len(held[-1]) != dims[0] * dims[1]:
                raise ValueError("the graph's file is damaged")
        check_turns(held[0], held[1], self.vision)

    def layer(self, index: int, x: Ref, turns: tuple[str, str]) -> str:
        """One layer: attention and MLP, each behind a norm and beside a residual."""
        size, name, find = self.vision.hidden_size, f"{VISION_LAYERS}{index}", self.find
        normed = self._norm(x, f"{name}.input_layernorm")
        query, key, value = (self._linear(normed, f"{name}.self_attn.{part}_proj", size, size) for part in "qkv")
        heads = self.vision.heads
        query, key = (find("RotaryEmbedding", each, *turns, num_heads=heads, interleaved=1) for each in (query, key))
        attended = find("Attention", query, key, value, q_num_heads=heads, kv_num_heads=heads)
        middle = find("Add", x, self._linear(attended, f"{name}.self_attn.o_proj", size, size))
        normed = self._norm(middle, f"{name}.post_attention_layernorm")
        wide = find("Gelu", self._linear(normed, f"{name}.mlp.fc1", self.vision.mlp_size, size))
        return find("Add", middle, self._linear(wide, f"{name}.mlp.fc2", size, self.vision.mlp_size))

    def head(self, x: Ref, hidden_size: int) -> str:
        """Norm, pixel shuffle, adapter and projector."""
        vision, find = self.vision, self.find
        patches = find("Slice", self._norm(x, f"{TOWER}layernorm_post"), ints(0), ints(vision.grid**2), ints(1))
        across, shuffle = vision.grid // vision.shuffle, vision.shuffle
        squares = find("Reshape", patches, ints(0, across, shuffle, across, shuffle, vision.hidden_size))
        x = find("Reshape", find("Transpose", squares, perm=(0, 1, 3, 2, 4, 5)), ints(-1, vision.mlp_size))
        size = vision.mlp_size
        for name in ADAPTER:
            x, size = (
                find("Gelu", self.products.linear(x, f"{name}.weight", vision.adapter_size, size)),
                vision.adapter_size,
            )
        return self.products.linear(x, f"{PROJECTOR}.weight", hidden_size, size)

    def _linear(self, x: Ref, name: str, outputs: int, inputs: int) -> str:
        """A product and its bias."""
        product = self.products.linear(x, f"{name}.weight", outputs, inputs)
        return self.find("Add", product, self.products.weight(f"{name}.bias", (outputs,)))

    def _norm(self, x: Ref, name: str) -> str:
        weight, bias = (
            self.products.weight(f"{name}.{part}", (self.vision.hidden_size,)) for part in ("weight", "bias")
        )
        return self.find("LayerNormalization", x, weight, bias, epsilon=NORM_EPS)
