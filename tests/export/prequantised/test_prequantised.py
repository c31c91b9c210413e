"""Checkpoints that came quantised: written by the libraries, exported, and compared with the libraries' own logits."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import prequantised as write
import pytest
import torch
from canonical import canonical_logits
from merged_ranks import merge_ranks
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import arriero
from arriero.engine import build_bundle
from arriero.errors import CheckpointError, ExportError
from arriero.export import export_checkpoint
from arriero.files.folders import read_spec
from arriero.plugins.linear import read_linear
from arriero.spec.choice import choose, units
from arriero.spec.recipe import Override, Recipe

IDS = np.random.default_rng(0).integers(3, 97, (2, 24))
GEOMETRY = {
    "num_hidden_layers": 2,
    "interleave_moe_layer_step": 2,
    "hidden_size": 64,
    "intermediate_size": 32,
    "intermediate_size_mlp": 64,
}
CACHE = {"kv_cache_scheme": {**write.FLOAT8, **write.TENSOR}}

Make = Callable[..., Any]


@pytest.fixture(scope="module")
def int4(make_llama4: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A W4A16 checkpoint, to be copied before it is damaged."""
    pytest.importorskip("compressed_tensors")
    folder = tmp_path_factory.mktemp("quantised") / "int4"
    write.write_compressed_tensors(make_llama4(**GEOMETRY), folder, write.SCHEMES["int4"], torch.tensor(IDS))
    return folder


@pytest.fixture(scope="module")
def fp8(make_llama4: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A static FP8 checkpoint with FP8 caches, to be copied before it is damaged."""
    pytest.importorskip("compressed_tensors")
    folder = tmp_path_factory.mktemp("quantised") / "fp8"
    scheme = write.SCHEMES["fp8 static"]
    write.write_compressed_tensors(make_llama4(**GEOMETRY), folder, scheme, torch.tensor(IDS), **CACHE)
    return folder


@pytest.fixture(scope="module")
def fp8_model(fp8: Path) -> Path:
    return export_checkpoint(fp8, fp8.parent / "model")


def logits(folder: Path) -> np.ndarray[Any, Any]:
    return arriero.load(folder).logits(IDS)


def difference(model: Path, expected: torch.Tensor) -> float:
    return float(np.abs(logits(model) - expected.numpy()).max())


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("name", ["fp8 static", "fp8 dynamic", "int8 static", "int8 dynamic", "int4"])
def test_a_compressed_tensors_checkpoint_computes_what_its_library_does(
    make_llama4: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    library = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    if name == "int8 dynamic":  # the library's own scales go to 127.5, those of serving kernels, and ours, to 127
        monkeypatch.setattr(library, "compute_dynamic_scales_and_zp", scales_to_127)
    cache = CACHE if name == "fp8 static" else {}
    expected = write.write_compressed_tensors(
        make_llama4(**GEOMETRY), tmp_path / "checkpoint", write.SCHEMES[name], torch.tensor(IDS), **cache
    )
    model = export_checkpoint(tmp_path / "checkpoint", tmp_path / "model")
    kind, _, activations = name.partition(" ")
    recipe = Recipe(
        format=kind,  # type: ignore[arg-type]
        activations=activations or "dynamic",  # type: ignore[arg-type]
        group_size=32 if kind == "int4" else 64,
        kv_cache="fp8" if cache else "none",
    )
    assert read_spec(model).recipe == recipe
    error = np.abs(canonical_logits(model, IDS) - expected.numpy())
    assert np.median(error) < 5e-6
    assert error.max() < (0.05 if name == "int8 dynamic" else 1e-5)  # an activation on a tie falls to either side
    # What the CPU's kernels round by 32 activations, a recipe rounds by tokens, or not at all.
    as_recipe = kind == "fp8" or activations == "static"
    assert difference(model, expected) < (1e-5 if as_recipe else 0.15)
    assert np.array_equal(*(logits(folder) for folder in (model, build_bundle(model, tmp_path / "bundle"))))


def scales_to_127(value: torch.Tensor, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    largest = value.abs().amax(-1, keepdim=True)
    return torch.where(largest == 0, 1.0, largest / 127), torch.zeros_like(largest)


@pytest.mark.parametrize("stacked", [True, False])
def test_a_modelopt_checkpoint_computes_what_its_library_does(make_llama4: Make, tmp_path: Path, stacked: bool) -> None:
    pytest.importorskip("modelopt.torch.quantization")
    expected = write.write_modelopt(make_llama4(**GEOMETRY), tmp_path / "checkpoint", torch.tensor(IDS))
    if not stacked:
        write.unstack_experts(tmp_path / "checkpoint")
    model = export_checkpoint(tmp_path / "checkpoint", tmp_path / "model")
    assert read_spec(model).recipe == Recipe(format="fp8", activations="static", kv_cache="fp8")
    assert difference(model, expected) < 1e-5


def test_a_fbgemm_checkpoint_computes_what_its_kernels_do(make_llama4: Make, tmp_path: Path) -> None:
    expected = write.write_fbgemm(make_llama4(**GEOMETRY), tmp_path / "checkpoint", torch.tensor(IDS), bound=0.75)
    model = export_checkpoint(tmp_path / "checkpoint", tmp_path / "model")
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    recipe = Recipe(
        format="fp8",
        activations="dynamic",
        activation_bound=0.75,
        overrides=tuple(Override(pattern=f"layers.*.self_attn.{name}", format="none") for name in names),
    )
    assert read_spec(model).recipe == recipe
    assert difference(model, expected) < 1e-5
    unbounded = write.write_fbgemm(make_llama4(**GEOMETRY), tmp_path / "unbounded", torch.tensor(IDS), bound=1200.0)
    assert (unbounded - expected).abs().max() > 0.01


def test_groups_of_several_formats_make_a_recipe_with_overrides(make_llama4: Make, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    groups = {
        "experts": {"targets": [r"re:.*experts\.\d+\..*"], **write.SCHEMES["int4"]},
        "rest": {"targets": [r"re:.*self_attn\..*", r"re:.*shared_expert.*"], **write.SCHEMES["fp8 static"]},
    }
    folder = tmp_path / "checkpoint"
    expected = write.write_compressed_tensors(make_llama4(**GEOMETRY), folder, {}, torch.tensor(IDS), groups=groups)
    model = export_checkpoint(folder, tmp_path / "model")
    spec = read_spec(model)
    assert spec.recipe is not None
    chosen = {name: choose(spec.recipe, name).format for name, _ in units(spec.model)}
    assert chosen["layers.1.feed_forward.experts"] == "int4"
    assert chosen["layers.0.self_attn.q_proj"] == chosen["layers.1.feed_forward.shared_expert.up_proj"] == "fp8"
    assert chosen["layers.0.feed_forward.up_proj"] == chosen["layers.1.feed_forward.router"] == "none"
    assert np.abs(canonical_logits(model, IDS) - expected.numpy()).max() < 1e-5
    assert difference(model, expected) < 0.15  # the CPU's kernels round what int4 experts take in


def test_experts_that_are_left_out_are_stacked_as_they_are(make_llama4: Make, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    folder, left_out = tmp_path / "checkpoint", [r"re:.*experts\.\d+\..*"]
    expected = write.write_compressed_tensors(
        make_llama4(**GEOMETRY), folder, write.SCHEMES["int8 static"], torch.tensor(IDS), ignore=left_out
    )
    model = export_checkpoint(folder, tmp_path / "model")
    assert difference(model, expected) < 1e-5
    assert tensors_of(model)["model.layers.1.feed_forward.experts.down_proj"].dtype == torch.float32


def test_what_fits_stays_in_place_and_the_rest_is_written_once(fp8: Path, fp8_model: Path) -> None:
    spec = read_spec(fp8_model)
    places = {file.name: file.path for file in spec.weight_files}
    assert places.pop("model.safetensors") == str(fp8 / "model.safetensors")
    assert set(places) == {"quantised-00000.safetensors", "quantised-00001.safetensors"}
    written, stored = tensors_of(fp8_model), tensors_of(fp8)
    assert not [name for name in written if name.endswith("q_proj.weight")]
    experts = "model.layers.1.feed_forward.experts"
    wanted = torch.stack(
        [
            torch.cat([stored[f"{experts}.{i}.{part}_proj.weight"].view(torch.uint8) for part in ("gate", "up")])
            for i in range(4)
        ]
    )
    assert torch.equal(written[f"{experts}.gate_up_proj"].view(torch.uint8), wanted)
    assert written[f"{experts}.gate_up_proj_scale"].shape == (4, 64, 1)
    assert written["model.layers.0.self_attn.key_scale"].shape == (2, 16)


def test_weights_that_are_copied_make_the_folder_stand_alone(int4: Path, tmp_path: Path) -> None:
    shutil.copytree(int4, tmp_path / "checkpoint")
    model = export_checkpoint(tmp_path / "checkpoint", tmp_path / "model", copy_weights=True)
    in_place = arriero.load(export_checkpoint(int4, tmp_path / "other")).logits(IDS)
    shutil.rmtree(tmp_path / "checkpoint")
    onnx.checker.check_model(str(model / "decoder.onnx"))
    assert np.array_equal(arriero.load(model).logits(IDS), in_place)


def test_the_canonical_graph_is_that_of_a_calibrated_model(fp8_model: Path) -> None:
    graph = ir.load(fp8_model / "decoder.onnx").graph
    linears = [linear for node in graph if (linear := read_linear(node)) is not None]
    assert {linear.kind for linear in linears} == {"fp8"}
    assert len(linears) == 2 * 4 + 2 * 3
    assert len([node for node in graph if node.op_type == "QuantizeLinear"]) == 2 * 4  # one for all that read an input


def test_it_is_not_converted(fp8: Path, tmp_path: Path) -> None:
    expected = "dtype is bfloat16, a quantised checkpoint is not converted: leave it at float32"
    with pytest.raises(ExportError, match=expected):
        export_checkpoint(fp8, tmp_path / "model", dtype="bfloat16")


@pytest.mark.usefixtures("unheld_graphs")
@pytest.mark.parametrize(("kind", "tp", "ep"), [("int4", 2, 1), ("fp8", 2, 2)])
def test_it_is_split_over_ranks_with_its_scales(
    kind: str, tp: int, ep: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    checkpoint = request.getfixturevalue(kind)
    whole = logits(export_checkpoint(checkpoint, tmp_path / "whole"))
    group = export_checkpoint(checkpoint, tmp_path / "group", tp=tp, ep=ep)
    assert not any((group / "scratch").glob("*"))
    merged = logits(merge_ranks(group, tmp_path / "merged"))
    # An int4 model's activations are rounded in blocks of its ranks' own inputs.
    assert np.abs(merged - whole).max() < (0.05 if kind == "int4" else 1e-4) * np.abs(whole).max()
    assert (merged.argmax(-1) == whole.argmax(-1)).mean() > 0.9


DAMAGES: list[tuple[str, Callable[[dict[str, Any]], object], str]] = [
    ("fp8", lambda t: t.pop(Q + "weight_scale"), r"q_proj.weight_scale' is missing, which the quantised weight needs"),
    ("fp8", lambda t: t.pop(Q + "input_scale"), r"q_proj.input_scale' is missing"),
    (
        "fp8",
        lambda t: t[Q + "weight_scale"].fill_(0),
        r"q_proj.weight_scale' holds the scale 0.0, expected numbers above",
    ),
    ("fp8", lambda t: t[Q + "input_scale"].fill_(-1), r"q_proj.input_scale' holds the scale -1.0"),
    (
        "fp8",
        lambda t: t[E + "1.up_proj.weight_scale"].fill_(float("nan")),
        r"experts.1.up_proj.weight_scale' holds .* nan",
    ),
    ("fp8", lambda t: t.update({Q + "weight_scale": torch.ones(3)}), r"shape \[3\], expected \[\] or \[1\] or \[64\]"),
    (
        "fp8",
        lambda t: t.update({Q + "weight": torch.zeros(3, 3, dtype=torch.int16)}),
        r"q_proj.weight' is I16, expected",
    ),
    ("fp8", lambda t: t.update({Q + "weight_zero_point": torch.zeros(1)}), r"zero points are not taken"),
    ("fp8", lambda t: t.pop(E + "2.down_proj.weight"), r"experts.2.down_proj.weight' is missing"),
    ("fp8", lambda t: t.update({E + "2.down_proj.weight": torch.ones(64, 32)}), r"all experts of .* must be quantised"),
    (
        "fp8",
        lambda t: t.pop("model.layers.1.self_attn.v_scale"),
        r"self_attn.v_scale' is missing, other layers have it",
    ),
    ("fp8", lambda t: t.update({"model.layers.1.self_attn.q_scale": torch.ones(1)}), r"unexpected tensor .*q_scale"),
    ("fp8", lambda t: t.pop("model.norm.weight"), r"'model.norm.weight' is missing"),
    ("int4", lambda t: t.update({Q + "weight_g_idx": torch.zeros(64)}), r"act-order shuffles the inputs of groups"),
    ("int4", lambda t: t.update({Q + "weight_scale": torch.ones(64, 4)}), r"shape \[64, 4\], expected \[64, 2\]"),
    (
        "int4",
        lambda t: t[Q + "weight_shape"].fill_(32),
        r"weight_shape' is \[32, 32\], config.json makes it \[64, 64\]",
    ),
    (
        "int4",
        lambda t: t[E + "3.gate_proj.weight_scale"].fill_(float("inf")),
        r"experts.3.gate_proj.weight_scale' .* inf",
    ),
]
Q, E = "model.layers.1.self_attn.q_proj.", "model.layers.1.feed_forward.experts."


def test_a_multimodal_checkpoint_keeps_its_tower_and_its_quantised_text(
    fp8: Path, fp8_model: Path, make_multimodal: Callable[..., Any], tmp_path: Path
) -> None:
    config = json.loads((fp8 / "config.json").read_text())
    reference = make_multimodal(hidden_size=config["hidden_size"])
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    nested = json.loads(reference.config.to_json_string())
    nested |= {"image_token_index": 1, "text_config": config, "quantization_config": config.pop("quantization_config")}
    (folder / "config.json").write_text(json.dumps(nested))
    tensors = {f"language_model.{name}": tensor for name, tensor in tensors_of(fp8).items()}
    tower = {name: x for name, x in reference.state_dict().items() if not name.startswith("language_model.")}
    save_file(tensors | tower, folder / "model.safetensors", {"format": "pt"})
    said: list[str] = []
    model = export_checkpoint(folder, tmp_path / "model", notice=said.append)
    assert said[0] == "The checkpoint is quantised (compressed-tensors, fp8): its own scales are kept."
    spec = read_spec(model)
    assert spec.recipe is not None
    assert choose(spec.recipe, "vision_model.model.layers.0.mlp.fc1").format == "none"
    assert np.array_equal(arriero.load(model).logits(IDS), arriero.load(fp8_model).logits(IDS))


def test_caches_without_scales_are_left_as_they_are_with_a_notice(fp8: Path, tmp_path: Path) -> None:
    shutil.copytree(fp8, tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(path).items() if not name.endswith(("k_scale", "v_scale"))}
    save_file(tensors, path, {"format": "pt"})
    said: list[str] = []
    model = export_checkpoint(tmp_path / "checkpoint", tmp_path / "model", notice=said.append)
    assert "It asks for fp8 caches but holds no scales of keys and values: they are not quantised." in said
    recipe = read_spec(model).recipe
    assert recipe is not None
    assert recipe.kv_cache == "none"


@pytest.mark.parametrize("case", range(len(DAMAGES)))
def test_a_damaged_checkpoint_is_named_and_nothing_is_written(
    request: pytest.FixtureRequest, tmp_path: Path, case: int
) -> None:
    kind, damage, expected = DAMAGES[case]
    folder = tmp_path / "checkpoint"
    shutil.copytree(request.getfixturevalue(kind), folder)
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=expected):
        export_checkpoint(folder, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_scale_may_be_of_any_float(fp8: Path, tmp_path: Path) -> None:
    shutil.copytree(fp8, tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / "model.safetensors"
    tensors = load_file(path)
    narrow = {name: tensor.bfloat16() if name.endswith("weight_scale") else tensor for name, tensor in tensors.items()}
    save_file(narrow, path, {"format": "pt"})
    model = export_checkpoint(tmp_path / "checkpoint", tmp_path / "model")
    with safe_open(model / "quantised-00001.safetensors", "pt") as file:
        found = file.get_tensor(f"{Q}weight_scale")
    assert found.dtype == torch.float32
    assert torch.equal(found, narrow[f"{Q}weight_scale"].float().expand(64))
