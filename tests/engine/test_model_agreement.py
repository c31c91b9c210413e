"""Engines are built of graphs that compute what `spec.json` says, or not at all."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from graph_changes import Change, changes, nodes_of, signature

from arriero.engine import Options, build_bundle
from arriero.engine.model_agreement import check_model
from arriero.errors import BuildError, FolderError
from arriero.export import export_checkpoint
from arriero.files.folders import find_files, rank_folder, read_spec
from arriero.spec.recipe import Recipe


def check(folder: Path) -> None:
    """Holds a model folder against its spec as a build does."""
    spec = read_spec(folder)
    check_model(folder, spec, find_files(folder, spec.weight_files))


def changed(model: Path, out: Path, change: Change) -> Path:
    """A copy of a model whose decoder is another."""
    shutil.copytree(model, out)
    graph = onnx.load(out / "decoder.onnx", load_external_data=False)
    change(graph.graph)
    (out / "decoder.onnx").write_bytes(graph.SerializeToString())
    return out


def other_scale(graph: onnx.GraphProto) -> None:
    node = next(node for node in graph.node if node.op_type == "GroupedQueryAttention")
    next(each for each in node.attribute if each.name == "scale").f *= 1.5


def place_of(graph: onnx.GraphProto, name: str, key: str) -> onnx.StringStringEntryProto:
    tensor = next(each for each in graph.initializer if each.name.endswith(name))
    return next(each for each in tensor.external_data if each.key == key)


def other_place(graph: onnx.GraphProto) -> None:
    place_of(graph, "layers.1.input_layernorm.weight", "offset").value = place_of(
        graph, "layers.2.input_layernorm.weight", "offset"
    ).value


def unread_elsewhere(graph: onnx.GraphProto) -> None:
    tensor = graph.initializer.add(name="more", dims=[4], data_type=onnx.TensorProto.FLOAT, data_location=1)
    tensor.external_data.add(key="location", value="../../secret")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (other_scale, r"layer 0: GroupedQueryAttention .* has 'scale'"),
        (other_place, r"layers\.1\.input_layernorm\.weight' .* lies at \d+, in its file at \d+"),
        (unread_elsewhere, r"the weight 'more', which no node reads"),
    ],
)
def test_no_engine_is_built_of_another_graph_than_the_spec_describes(
    change: Change, said: str, tiny_model: Path, tmp_path: Path
) -> None:
    model, target = changed(tiny_model, tmp_path / "model", change), "tensorrt-rtx:sm89"
    with pytest.raises(FolderError, match=said) as refused:
        build_bundle(model, tmp_path / "bundle", target=target, options=Options(max_seq=64))
    assert "\n" not in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


RECIPES = {
    "int8": (Recipe(format="int8"), 13),
    "int8, static": (Recipe(format="int8", activations="static"), 13),
    "fp8": (Recipe(format="fp8", activations="dynamic"), 25),
    "int4": (Recipe(format="int4"), 13),
}


@pytest.mark.parametrize("kind", ["plain", *RECIPES])
def test_no_change_of_one_node_of_a_model_goes_unseen(
    kind: str, tiny_model: Path, quantised_tiny: Callable[[Recipe], Path], tmp_path: Path
) -> None:
    recipe, every = RECIPES.get(kind, (None, 6))
    folder = shutil.copytree(tiny_model if recipe is None else quantised_tiny(recipe), tmp_path / "model")
    check(folder)
    whole = onnx.load(folder / "decoder.onnx", load_external_data=False)
    read = {name for node in nodes_of(whole.graph) for name in node.input}
    read |= {value.name for value in whole.graph.output}
    nodes = {signature(node): node for node in nodes_of(whole.graph) if read & set(node.output)}
    made = [change for node in nodes.values() for change in changes(node, whole.graph.initializer[-1].name)]
    assert len(made) > 100
    for change in made[::every]:
        graph = copy.deepcopy(whole)
        change(graph.graph)
        (folder / "decoder.onnx").write_bytes(graph.SerializeToString())
        with pytest.raises((BuildError, FolderError)):
            check(folder)


def test_each_rank_of_a_group_is_held_against_its_part(tiny_model: Path, tmp_path: Path) -> None:
    group = export_checkpoint(tiny_model, tmp_path / "group", tp=2)
    for rank in range(2):
        folder, spec = rank_folder(group, read_spec(group), rank)
        check_model(folder, spec, find_files(folder, spec.weight_files))
