"""The fused layers of an engine, read from the build log: kinds, types, sizes, and the graph's nodes in each.

An engine cannot be inspected without its GPU, but TensorRT prints each layer when it is built. What leaves is plain
JSON, `layers.json` of a bundle.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

TENSOR = re.compile(r"\{ Name: ([^,]*), (?:Location: \w+, )?Dimensions: \[([^\]]*)\].*?Datatype: ([^,]*),")
PART = re.compile(r"(?:^|, )(Name|LayerType|Inputs|Constants|Outputs|TacticName|Metadata): ")
NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerTensor:
    """A tensor of a layer: its name, its dimensions with -1 where they vary, its type in TensorRT's words."""

    name: str
    dims: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """One fused layer.

    Attributes:
        name: The builder's name for it.
        kind: Its kind, such as `gemm`, `kgen` (generated pointwise code), `PluginV3`.
        inputs: The tensors it reads, weights included, whether inputs of the engine or constants in it.
        outputs: The tensors it writes.
        nodes: The graph's nodes that were fused into it.
        tactic: The kernel's name, where the builder chose one.
    """

    name: str
    kind: str
    inputs: tuple[LayerTensor, ...]
    outputs: tuple[LayerTensor, ...]
    nodes: tuple[str, ...]
    tactic: str


def read_layers(lines: Sequence[str]) -> tuple[Layer, ...]:
    """Reads the log's descriptions, one a line; lines of another form are left out."""
    return tuple(layer for line in lines if (layer := _read_layer(line)) is not None)


def _read_layer(line: str) -> Layer | None:
    parts = _parts(line)
    if not {"Name", "LayerType", "Inputs", "Outputs"} <= parts.keys():
        return None
    constants = [tensor for tensor in _tensors(parts.get("Constants", "")) if len(tensor.dims) > 1]
    return Layer(
        name=parts["Name"],
        kind=parts["LayerType"],
        inputs=(*_tensors(parts["Inputs"]), *constants),
        outputs=_tensors(parts["Outputs"]),
        nodes=tuple(NODE.findall(parts.get("Metadata", ""))),
        tactic=parts.get("TacticName", "").partition(",")[0],
    )


def _parts(line: str) -> dict[str, str]:
    """The line's own fields; those within the braces of its tensors are left in their field."""
    found: dict[str, str] = {}
    name, start = "", 0
    for match in re.finditer(PART, line):
        depth = line.count("{", 0, match.start()) - line.count("}", 0, match.start())
        if depth:
            continue
        if name:
            found[name] = line[start : match.start()]
        name, start = match[1], match.end()
    if name:
        found[name] = line[start:]
    return found


def _tensors(text: str) -> tuple[LayerTensor, ...]:
    return tuple(
        LayerTensor(name=name, dims=tuple(int(dim) for dim in dims.split(",") if dim), dtype=dtype)
        for name, dims, dtype in TENSOR.findall(text)
    )
