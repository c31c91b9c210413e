"""A bundle whose spec, graph and weights contradict each other: refused in a line, before anything is loaded."""

import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

import arriero
from arriero.engine import build_bundle
from arriero.errors import ArrieroError, FolderError
from arriero.files.folders import read_spec
from arriero.files.onnx_outline import read_outline


@pytest.fixture(scope="module")
def good(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_bundle(tiny_model, tmp_path_factory.mktemp("good") / "bundle")


@pytest.fixture
def bundle(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "bundle"))


def without_a_weight(spec: dict[str, Any]) -> None:
    spec["weights"].pop(3)


def with_a_lied_shape(spec: dict[str, Any]) -> None:
    weight = next(each for each in spec["weights"] if "q_proj.weight" in each["name"])
    weight["shape"] = [weight["shape"][0] // 2, weight["shape"][1] * 2]


def with_swapped_offsets(spec: dict[str, Any]) -> None:
    first, second = [each for each in spec["weights"] if each["name"].endswith("input_layernorm.weight")][:2]
    for name in ("offset", "file"):
        first[name], second[name] = second[name], first[name]


def with_another_type(spec: dict[str, Any]) -> None:
    next(each for each in spec["weights"] if each["name"].endswith("norm.weight"))["dtype"] = "float16"


def with_a_layer_less(spec: dict[str, Any]) -> None:
    spec["model"]["layers"].pop()


def with_another_chunk(spec: dict[str, Any]) -> None:
    for layer in spec["model"]["layers"]:
        layer["chunk"] = layer["chunk"] and layer["chunk"] * 2


def setting(place: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(spec: dict[str, Any]) -> None:
        *outer, last = place.split(".")
        for each in outer:
            spec = spec[int(each)] if each.isdigit() else spec[each]
        spec[last] = value

    change.__name__ = place
    return change


LIES: list[tuple[Callable[[dict[str, Any]], None], str]] = [
    (without_a_weight, "the weight 'model.* is not among those of spec.json"),
    (with_a_lied_shape, r"the weight .*q_proj.weight.*' is type 16 \[192, 192\], of spec.json type 16 \[96, 384\]"),
    (
        with_swapped_offsets,
        r"input_layernorm.weight' of .* lies at \d+, in its file at \d+|is not in its file",
    ),
    (with_another_type, "is F16, its file has it as BF16"),
    (with_a_layer_less, "8 layers of caches, spec.json has 7"),
    (with_another_chunk, "layer 0 has chunk 128, spec.json 256"),
    (setting("model.vocab_size", 2049), r"logits of .*2048.*, the vocabulary has 2049"),
    (setting("model.heads", 12), "layer 0 has heads 6, spec.json 12"),
    (setting("model.experts_per_token", 2), "1 experts a token, spec.json 2"),
    (setting("model.head_dim", 64), "expected 2 heads of 64"),
    (
        setting("session", {"session.optimized_model_filepath": "/x"}),
        "the entry 'session.optimized_model_filepath'",
    ),
    (setting("session", {"session.disable_prepacking": "x"}), "which no graph needs"),
    (setting("graph", "../other.onnx"), "the name of the graph is '../other.onnx', expected a plain file name"),
    (setting("graph", "/etc/passwd"), "expected a plain file name"),
    (setting("weight_files.0.name", "../../x"), "the name of a weight file is '../../x', expected a plain file name"),
    (setting("weight_files.0.path", "x/y"), "lies at 'x/y', no absolute path"),
    (setting("weights.0.file", "spec.json"), "is in 'spec.json', no weight file"),
    (setting("weights.0.offset", 10**30), "is no number that anything here has"),
    (setting("weights.0.shape", [2**40]), "which no tensor has"),
    (setting("model.max_positions", 10**12), "max_positions is 1000000000000, expected 1 to"),
    (setting("model.norm_eps", 1e999), "is no number that anything here has"),
]


@pytest.mark.parametrize(("lie", "said"), LIES, ids=[lie.__name__ for lie, _ in LIES])
def test_a_spec_that_lies_is_refused(bundle: Path, lie: Callable[[dict[str, Any]], None], said: str) -> None:
    spec = json.loads((bundle / "spec.json").read_text())
    lie(spec)
    (bundle / "spec.json").write_text(json.dumps(spec))
    with pytest.raises(FolderError, match=said) as refused:
        arriero.load(bundle, max_seq=64, threads=1)
    assert "\n" not in str(refused.value)


def test_a_spec_nested_without_end_or_with_a_name_twice_is_refused(bundle: Path) -> None:
    for text, said in (
        ('{"a":' * 10_000, "damaged .*nested too deeply"),
        ('{"schema": 1, "schema": 1}', "a name appears twice"),
        ('{"schema": %s}' % ("1" * 5000), "a number of 5000 digits"),
    ):
        (bundle / "spec.json").write_text(text)
        with pytest.raises(FolderError, match=said):
            read_spec(bundle)


def with_a_loop(model: onnx.ModelProto) -> None:
    body = onnx.helper.make_graph([], "body", [], [])
    model.graph.node.append(onnx.helper.make_node("Loop", ["", ""], [], body=body))


def with_weights_elsewhere(model: onnx.ModelProto) -> None:
    for entry in model.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = "/etc/passwd"


def with_a_constant_elsewhere(model: onnx.ModelProto) -> None:
    tensor = onnx.TensorProto(name="c", dims=[4], data_type=1, data_location=1)
    tensor.external_data.add(key="location", value="../x")
    model.graph.node.append(onnx.helper.make_node("Constant", [], ["c"], value=tensor))


def with_a_weight_more(model: onnx.ModelProto) -> None:
    tensor = model.graph.initializer.add()
    tensor.CopyFrom(model.graph.initializer[0])
    tensor.name = "another"


def with_another_shape(model: onnx.ModelProto) -> None:
    model.graph.initializer[1].dims[0] += 1


def with_other_heads(model: onnx.ModelProto) -> None:
    node = next(each for each in model.graph.node if each.op_type == "GroupedQueryAttention")
    next(each for each in node.attribute if each.name == "kv_heads").i = 6


def with_a_sum_over_a_weight(model: onnx.ModelProto) -> None:
    node = onnx.helper.make_node("AllReduce", ["logits", "group"], ["total"], domain="arriero.cpu", ranks=1, rank=0)
    model.graph.node.append(node)
    model.graph.initializer.append(onnx.helper.make_tensor("group", 2, [4], bytes(4), raw=True))


def with_functions(model: onnx.ModelProto) -> None:
    model.functions.add(name="f", domain="arriero")


def with_many_nodes(model: onnx.ModelProto) -> None:
    names = ["input_ids", *(f"again.{number}" for number in range(20000))]
    pairs = itertools.pairwise(names)
    model.graph.node.extend([onnx.helper.make_node("Identity", [before], [after]) for before, after in pairs])


GRAPHS = [
    (with_many_nodes, r"2\d{4} nodes, expected at most 2600 of such a model"),
    (with_a_loop, "an attribute of a graph"),
    (with_weights_elsewhere, "is not among those of spec.json"),
    (with_a_constant_elsewhere, "a constant 'c' in another file"),
    (with_a_weight_more, "the weight 'another' is not among those of spec.json"),
    (with_another_shape, r"is type 1 \[193\], of spec.json type 1 \[192\]"),
    (with_other_heads, "layer 0 has kv_heads 6, spec.json 2"),
    (with_a_sum_over_a_weight, "an AllReduce over other memory than the graph's input 'group'"),
    (with_functions, "functions or training in a graph that has none"),
]


@pytest.mark.parametrize(("change", "said"), GRAPHS, ids=[change.__name__ for change, _ in GRAPHS])
def test_another_graph_than_the_spec_describes_is_refused(
    bundle: Path, change: Callable[[onnx.ModelProto], None], said: str
) -> None:
    model = onnx.load(bundle / "decoder.onnx", load_external_data=False)
    change(model)
    (bundle / "decoder.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(FolderError, match=said):
        arriero.load(bundle, max_seq=64, threads=1)


def test_bytes_that_are_no_graph_are_refused(bundle: Path) -> None:
    content = (bundle / "decoder.onnx").read_bytes()
    for damaged in (b"", content[: len(content) // 2], b"\xff" * 100, b"\x3a\xff\xff\xff\xff\x0f"):
        (bundle / "decoder.onnx").write_bytes(damaged)
        with pytest.raises(FolderError, match=r"not the graph that spec\.json describes"):
            arriero.load(bundle, max_seq=64, threads=1)


def test_an_outline_is_what_onnx_reads(good: Path) -> None:
    content = (good / "decoder.onnx").read_bytes()
    outline, model = read_outline(content), onnx.load_from_string(content)
    assert outline.weights.keys() == {each.name for each in model.graph.initializer}
    for each in model.graph.initializer:
        assert outline.weights[each.name].dims == tuple(each.dims)
        assert outline.weights[each.name].dtype == each.data_type
    for each in model.graph.input:
        shape = each.type.tensor_type.shape.dim
        assert outline.inputs[each.name].dims == tuple(dim.dim_param or dim.dim_value for dim in shape)
    assert {node.op for node in outline.nodes} >= {node.op_type for node in model.graph.node}


def test_swapped_weights_of_a_model_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    model = onnx.load(folder / "decoder.onnx", load_external_data=False)
    first, second = [each for each in model.graph.initializer if each.name.endswith("input_layernorm.weight")][:2]
    first.name, second.name = second.name, first.name
    (folder / "decoder.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ArrieroError, match=r"lies at|is not in its file"):
        arriero.load(folder, max_seq=64, threads=1)


def test_weights_that_change_under_a_session_are_noticed(tiny: Path, tmp_path: Path) -> None:
    from arriero.errors import SessionError
    from arriero.export import export_checkpoint

    model = export_checkpoint(tiny, tmp_path / "model", copy_weights=True)
    bundle = build_bundle(model, tmp_path / "bundle")
    session = arriero.load(bundle, max_seq=64, threads=1)
    session.generate([5, 6], max_new_tokens=1)
    path = sorted(bundle.glob("*.safetensors"))[0]
    os.utime(path, ns=(1, 1))
    with pytest.raises(SessionError, match="has changed since it was loaded, and this session reads it in place"):
        session.generate([5, 6], max_new_tokens=1)
    with pytest.raises(SessionError, match="has changed"):
        session.start()
