"""Faults planted in checkpoints, models and bundles, each with what a person would have to be told."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from safetensors.torch import load_file
from torch import Tensor

from arriero.files.folders import read_spec
from arriero.files.safetensors import identity, open_shard

Change = Callable[[Tensor], Tensor]


def changed_tensors(source: Path, target: Path, changes: dict[str, Change]) -> Path:
    """A copy of a checkpoint or of a quantised model with some of its tensors changed."""
    shutil.copytree(source, target)
    left = set(changes)
    for path in target.glob("*.safetensors"):
        regions = open_shard(path).tensors
        tensors = load_file(path)
        for name in left & set(tensors):
            changed = changes[name](tensors[name]).to(tensors[name].dtype).contiguous()
            with path.open("r+b") as file:  # in its place: graphs know where tensors lie
                file.seek(regions[name].offset)
                file.write(changed.view(-1).view(torch.uint8).numpy().data)
        left -= set(tensors)
    assert not left, left
    if (target / "spec.json").exists():
        _sign(target)
    return target


def _sign(folder: Path) -> None:
    """Makes a model accept its changed files."""
    spec = read_spec(folder)
    files = tuple(
        dataclasses.replace(file, size=(folder / file.name).stat().st_size, identity=identity(folder / file.name))
        for file in spec.weight_files
    )
    (folder / "spec.json").write_text(dataclasses.replace(spec, weight_files=files).to_json())


def changed_config(source: Path, target: Path, **fields: Any) -> Path:
    """A copy of a checkpoint with another config."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | fields))
    return target


def changed_graph(
    source: Path, target: Path, change: Callable[[onnx.GraphProto], int], file: str = "decoder.onnx"
) -> Path:
    """A copy of a folder with another graph; the change says in how many places it was made."""
    shutil.copytree(source, target)
    model = onnx.load(target / file, load_external_data=False)
    assert change(model.graph)
    onnx.save(model, target / file)
    return target


def without_temperature(layer: int) -> Callable[[onnx.GraphProto], int]:
    """A model's layer whose queries are not tuned."""

    def change(graph: onnx.GraphProto) -> int:
        node = next(node for node in graph.node if node.name == f"layers.{layer}/GroupedQueryAttention")
        tuned = [attribute for attribute in node.attribute if attribute.name == "temperature_scale" and attribute.f]
        for attribute in tuned:
            attribute.f = 0.0
        return len(tuned)

    return change


def rope_over_halves(layer: int) -> Callable[[onnx.GraphProto], int]:
    """A bundle's layer, or a vision tower's, whose RoPE has the other layout."""

    def change(graph: onnx.GraphProto) -> int:
        count = 0
        for node in list(graph.node):
            if not node.name.startswith(f"layers.{layer}/"):
                continue
            if node.op_type == "RotaryEmbedding":
                next(attribute for attribute in node.attribute if attribute.name == "interleaved").i = 0
                count += 1
            elif node.op_type == "GroupedQueryAttention":  # its pairs are made of what halves would pair
                head_dim = next(each for each in graph.input if each.name == f"past.{layer}.key").type.tensor_type
                pairs_D = np.arange(head_dim.shape.dim[3].dim_value).reshape(2, -1).T.ravel()
                heads = {attribute.name: attribute.i for attribute in node.attribute}
                for place, name in enumerate(("heads", "kv_heads")):
                    order = (np.arange(heads[name])[:, None] * len(pairs_D) + pairs_D).ravel()
                    made = [f"{node.name}/order.{place}", f"{node.name}/paired.{place}"]
                    graph.initializer.append(onnx.numpy_helper.from_array(order, made[0]))
                    gather = onnx.helper.make_node("Gather", [node.input[place], made[0]], made[1:], axis=2)
                    graph.node.insert(list(graph.node).index(node), gather)
                    node.input[place] = made[1]
                    count += 1
        return count

    return change


def without_shared_expert(layer: int) -> Callable[[onnx.GraphProto], int]:
    """A bundle's layer whose output lacks its shared expert."""

    def change(graph: onnx.GraphProto) -> int:
        prefix = f"layers.{layer}/feed_forward.shared_expert.down_proj"
        down = [node for node in graph.node if node.name.startswith(prefix)][-1].output[0]
        total = next(node for node in graph.node if node.op_type == "Add" and down in node.input)
        routed = next(name for name in total.input if name != down)
        for node in graph.node:
            for place, name in enumerate(node.input):
                if name == total.output[0]:
                    node.input[place] = routed
        return 1

    return change


def score_on_output(layer: int) -> Callable[[onnx.GraphProto], int]:
    """A bundle's layer whose router scores multiply what the experts give, not what they take."""

    def change(graph: onnx.GraphProto) -> int:
        name = f"layers.{layer}/MoeDispatch"
        node = next(each for each in graph.node if each.op_type.endswith("MoeDispatch") and each.name.startswith(name))
        logits, output = node.input[1], node.output[0]
        hundred, axis = np.array(100, dtype=np.float32), np.array([1])  # whose sigmoid is 1
        graph.initializer.append(onnx.numpy_helper.from_array(hundred, f"{name}/hundred"))
        graph.initializer.append(onnx.numpy_helper.from_array(axis, f"{name}/axis"))
        node.input[1], node.output[0] = f"{name}/sure", f"{name}/unscaled"
        place = list(graph.node).index(node)
        scaled = onnx.helper.make_node("Mul", [f"{name}/unscaled", f"{name}/score"], [output], name=f"{name}/scaled")
        graph.node.insert(place + 1, scaled)
        for kind, given, made in (
            ("Sigmoid", [f"{name}/largest"], f"{name}/score"),
            ("ReduceMax", [logits, f"{name}/axis"], f"{name}/largest"),
            ("Add", [logits, f"{name}/hundred"], f"{name}/sure"),
        ):
            graph.node.insert(place, onnx.helper.make_node(kind, given, [made], name=made))
        return 1

    return change


def swapped_experts(first: int, second: int) -> Change:
    """Two experts' weights in each other's place."""

    def change(weight: Tensor) -> Tensor:
        weight = weight.clone()
        weight[[first, second]] = weight[[second, first]]
        return weight

    return change


def rows_over_halves(head_dim: int) -> Change:
    """Queries' or keys' rows as a RoPE over halves wants them."""

    def change(weight: Tensor) -> Tensor:
        within = torch.arange(head_dim).view(-1, 2).T.flatten()
        return weight.view(-1, head_dim, weight.shape[1])[:, within].flatten(0, 1)

    return change


def other_order(place: str, order: list[int]) -> Callable[[onnx.GraphProto], int]:
    """A vision tower whose stem or head puts patches in another order."""

    def change(graph: onnx.GraphProto) -> int:
        nodes = [each for each in graph.node if each.name.startswith(f"{place}/") and each.op_type == "Transpose"]
        moved = [each.attribute[0].ints for each in nodes if len(each.attribute[0].ints) == 6]
        for ints in moved:
            ints[:] = order
        return len(moved)

    return change


def without_bias(name: str) -> Callable[[onnx.GraphProto], int]:
    """A graph in which a bias is not added."""

    def change(graph: onnx.GraphProto) -> int:
        (node,) = (each for each in graph.node if each.op_type == "Add" and name in each.input)
        left = next(each for each in node.input if each != name)
        for reader in graph.node:
            reader.input[:] = [left if each == node.output[0] else each for each in reader.input]
        graph.node.remove(node)
        return 1

    return change


def without_residual(layer: int, norm: str) -> Callable[[onnx.GraphProto], int]:
    """A vision tower whose layer does not add what enters a half to what the half computes, before a norm."""

    def change(graph: onnx.GraphProto) -> int:
        read = next(each.input[0] for each in graph.node if each.name == f"layers.{layer}/{norm}")
        total = next(each for each in graph.node if read in each.output)
        total.input[0] = total.input[1]
        total.op_type = "Mean"
        return 1

    return change


def exchanged_inputs(layer: int) -> Callable[[onnx.GraphProto], int]:
    """A vision tower's layer whose queries and keys stand in each other's place."""

    def change(graph: onnx.GraphProto) -> int:
        node = next(each for each in graph.node if each.name == f"layers.{layer}/Attention")
        node.input[0], node.input[1] = node.input[1], node.input[0]
        return 1

    return change


def approximate_gelu(place: str) -> Callable[[onnx.GraphProto], int]:
    """A vision tower's layer or head whose GELUs are approximated by a tanh."""

    def change(graph: onnx.GraphProto) -> int:
        nodes = [each for each in graph.node if each.op_type == "Gelu" and each.name.startswith(f"{place}/")]
        for node in nodes:
            del node.attribute[:]
            node.attribute.append(onnx.helper.make_attribute("approximate", "tanh"))
        return len(nodes)

    return change


def without_gelu(place: str) -> Callable[[onnx.GraphProto], int]:
    """A vision tower's layer or head whose last GELU is left out."""

    def change(graph: onnx.GraphProto) -> int:
        node = [each for each in graph.node if each.op_type == "Gelu" and each.name.startswith(f"{place}/")][-1]
        node.op_type = "Identity"
        del node.attribute[:]
        return 1

    return change
