"""Graphs that compute something else than `spec.json` says, and specs that say something else than their graphs do."""

import copy
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graph_changes import Change, changes, nodes_of, signature
from onnx import helper, numpy_helper

from arriero.engine import build_bundle
from arriero.errors import FolderError
from arriero.files.agreement import check_decoder, check_tower
from arriero.files.folders import read_spec
from arriero.spec.folder import FolderSpec
from arriero.spec.recipe import Recipe

BIG = 10**9
"""Elements of a tensor that no step of a model has."""


@pytest.fixture(scope="module")
def plain(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_bundle(tiny_model, tmp_path_factory.mktemp("plain") / "bundle")


@pytest.fixture(scope="module")
def fp8(quantised_tiny: Callable[[Recipe], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = Recipe(format="fp8", activations="dynamic")
    return build_bundle(quantised_tiny(recipe), tmp_path_factory.mktemp("fp8") / "bundle")


@pytest.fixture(scope="module")
def int8(quantised_tiny: Callable[[Recipe], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_bundle(quantised_tiny(Recipe(format="int8")), tmp_path_factory.mktemp("int8") / "bundle")


@pytest.fixture(scope="module")
def seeing(multimodal_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_bundle(multimodal_model, tmp_path_factory.mktemp("seeing") / "bundle")


def check(folder: Path, graph: bytes, spec: FolderSpec, file: str = "decoder.onnx") -> None:
    """Holds a graph against a spec as loading does."""
    if file == "vision.onnx":
        assert spec.vision is not None
        check_tower(graph, spec.vision.weights, spec, folder / file)
    else:
        check_decoder(graph, spec.weights, spec, folder / file)


def grown(op: str, inputs: list[Any], **attributes: Any) -> Change:
    """A node whose output has a thousand million elements, and goes into the stream."""

    def change(graph: onnx.GraphProto) -> None:
        names = []
        for index, value in enumerate(inputs):
            if not isinstance(value, str):
                graph.initializer.append(numpy_helper.from_array(np.array(value), f"big.{index}"))
            names.append(value if isinstance(value, str) else f"big.{index}")
        last = next(node for node in graph.node if "layers.0/y" in node.output)
        last.output[0] = "layers.0/small"
        made = [
            helper.make_node(op, names, ["big"], **attributes),
            helper.make_node("ReduceMax", ["big"], ["largest"], keepdims=0),
            helper.make_node("Cast", ["largest"], ["wide"], to=1),
            helper.make_node("Add", ["layers.0/small", "wide"], ["layers.0/y"]),
        ]
        place = list(graph.node).index(last) + 1
        for node in reversed(made):
            graph.node.insert(place, node)

    change.__name__ = f"{op}-{len(inputs)}"
    return change


def body(*nodes: onnx.NodeProto) -> onnx.GraphProto:
    return helper.make_graph(list(nodes), "body", [], [helper.make_tensor_value_info("inner", 1, None)])


def doubled(times: int) -> Change:
    """A tensor put behind itself again and again."""

    def change(graph: onnx.GraphProto) -> None:
        names = ["layers.0/y", *(f"twice.{number}" for number in range(times))]
        for before, after in itertools.pairwise(names):
            graph.node.append(helper.make_node("Concat", [before, before], [after], axis=0))

    return change


def crossed(graph: onnx.GraphProto) -> None:
    """Sums that make a cube of each token beside each other."""
    graph.node.append(helper.make_node("Unsqueeze", ["layers.0/y", "axes"], ["column"]))
    graph.initializer.append(numpy_helper.from_array(np.array([3, 4]), "axes"))
    graph.node.append(helper.make_node("Add", ["column", "layers.0/y"], ["cube"]))


def with_a_wide_product(graph: onnx.GraphProto) -> None:
    graph.initializer.append(numpy_helper.from_array(np.zeros((192, 1), np.float32), "thin"))
    graph.node.append(helper.make_node("MatMul", ["thin", "layers.0/y"], ["wide"]))


def with_another_name_twice(graph: onnx.GraphProto) -> None:
    graph.node.append(helper.make_node("Identity", ["layers.0/y"], ["layers.1/y"]))


GROWING = [
    grown("Expand", [np.float32(1), [BIG]]),
    grown("ConstantOfShape", [[BIG]]),
    grown("Tile", [np.ones(2, np.float32), [BIG]]),
    grown("Range", [0, BIG, 1]),
    grown("Pad", [np.ones(1, np.float32), [0, BIG]]),
    grown("Resize", [np.ones((1, 1), np.float32), "", "", [1, BIG]]),
    grown("Gather", ["layers.0/small", np.zeros(1000, np.int64)], axis=1),
    grown("OneHot", [np.zeros(1000, np.int64), 10**6, np.array([0, 1], np.float32)]),
    grown("Einsum", ["layers.0/small", "layers.0/small"], equation="bsh,btg->sthg"),
    grown("RandomNormal", [], shape=[BIG]),
    grown("CumSum", ["layers.0/small", 0]),
    grown("Loop", [BIG, True], body=body()),
    grown("Scan", ["layers.0/small"], body=body(), num_scan_inputs=1),
    grown("If", [True], then_branch=body(), else_branch=body(helper.make_node("ConstantOfShape", ["s"], ["inner"]))),
    doubled(30),
    crossed,
    with_a_wide_product,
    with_another_name_twice,
]


@pytest.mark.parametrize("change", GROWING, ids=[change.__name__ for change in GROWING])
def test_a_graph_that_grows_a_tensor_is_refused(plain: Path, change: Change) -> None:
    model = onnx.load(plain / "decoder.onnx", load_external_data=False)
    change(model.graph)
    with pytest.raises(FolderError, match=r"not the graph that spec\.json describes") as refused:
        check(plain, model.SerializeToString(), read_spec(plain))
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 600


@pytest.mark.parametrize(
    ("kind", "file", "every"),
    [
        ("plain", "decoder.onnx", 1),
        ("int8", "decoder.onnx", 4),
        ("fp8", "decoder.onnx", 12),
        ("seeing", "vision.onnx", 1),
    ],
)
def test_no_change_of_one_node_goes_unseen(kind: str, file: str, every: int, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(kind)
    spec, whole = read_spec(folder), onnx.load(folder / file, load_external_data=False)
    check(folder, whole.SerializeToString(), spec, file)
    read = {name for node in nodes_of(whole.graph) for name in node.input}
    read |= {value.name for value in whole.graph.output}
    seen, count = set[tuple[str, ...]](), 0
    for node in nodes_of(whole.graph):
        if signature(node) in seen or not read & set(node.output):
            continue
        seen.add(signature(node))
        for change in changes(node, whole.graph.initializer[-1].name):
            count += 1
            if count % every:
                continue
            model = copy.deepcopy(whole)
            change(model.graph)
            with pytest.raises(FolderError):
                check(folder, model.SerializeToString(), spec, file)
    assert count > 100


NOT_COMPUTED = {"max_positions"}
"""Numbers of a spec that no graph has: the longest context that is taken."""


def numbers(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Each number and truth of a spec, with another in its place."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from numbers(inner, (*place, key))
    elif isinstance(value, bool):
        yield place, not value
    elif isinstance(value, int):
        yield from ((place, value + 1), (place, value * 2), (place, 2**31 - 1))
    elif isinstance(value, float):
        yield from ((place, value * 1.001 + 1e-6), (place, -1.0), (place, 1e300))


@pytest.mark.parametrize(("kind", "part"), [("plain", "model"), ("seeing", "vision")])
def test_a_spec_of_another_number_than_its_graph_is_refused(
    kind: str, part: str, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(kind)
    fields = json.loads((folder / "spec.json").read_text())
    geometry = fields["model"] if part == "model" else fields["vision"]["spec"]
    graphs = {
        file: (folder / file).read_bytes() for file in ("decoder.onnx", "vision.onnx") if (folder / file).exists()
    }
    taken = set()
    for place, value in numbers(copy.deepcopy(geometry)):
        inner = changed = copy.deepcopy(geometry)
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = value
        whole = fields | ({"model": changed} if part == "model" else {"vision": fields["vision"] | {"spec": changed}})
        if changed != geometry and is_taken(folder, json.dumps(whole), graphs):
            taken.add(place[-1])
    assert taken == (NOT_COMPUTED if part == "model" else set())


def is_taken(folder: Path, text: str, graphs: dict[str, bytes]) -> bool:
    """Whether a spec is taken for these graphs; else it is refused in a line."""
    said = ""
    try:
        spec = FolderSpec.from_json(text)
        for file, graph in graphs.items():
            check(folder, graph, spec, file)
    except FolderError as error:
        said = str(error)
    assert "\n" not in said
    return not said


def test_a_spec_of_another_recipe_than_its_graph_is_refused(plain: Path, fp8: Path, int8: Path) -> None:
    recipes = {None: plain, Recipe(format="fp8", activations="dynamic"): fp8, Recipe(format="int8"): int8}
    others = [*recipes, Recipe(format="int4"), Recipe(format="int8", activations="dynamic"), Recipe(format="fp8")]
    others += [Recipe(format="int8", kv_cache="int8"), dataclasses.replace(list(recipes)[1], activation_bound=9.0)]
    for own, folder in recipes.items():
        spec, graph = read_spec(folder), (folder / "decoder.onnx").read_bytes()
        for recipe in others:
            changed = dataclasses.replace(spec, recipe=recipe)
            if recipe == own:
                check(folder, graph, changed)
                continue
            with pytest.raises(FolderError, match=r"not the graph that spec\.json describes"):
                check(folder, graph, changed)


def test_the_line_names_the_layer_and_both_numbers(plain: Path) -> None:
    spec = read_spec(plain)
    changed = dataclasses.replace(spec, model=dataclasses.replace(spec.model, norm_eps=0.001))
    said = r"layer 0: RMSNormalization of .* has 'epsilon' 9.99.*e-06, spec.json 0.001"
    with pytest.raises(FolderError, match=said):
        check(plain, (plain / "decoder.onnx").read_bytes(), changed)
    turned = dataclasses.replace(spec, model=dataclasses.replace(spec.model, rope_theta=9000.0))
    with pytest.raises(FolderError, match=r"a position, by spec\.json's rope_theta 9000"):
        check(plain, (plain / "decoder.onnx").read_bytes(), turned)
