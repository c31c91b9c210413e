"""Polygraphy's own commands on our models: those that the README shows, run as a person runs them."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.inliner import inline_local_functions
from polygraphy.comparator import RunResults

import arriero
from arriero.calibration import calibrate_model
from arriero.calibration.presets import parse_recipe
from arriero.engine import Options, build_bundle
from arriero.engine.polygraphy import RTX, Scripts
from arriero.errors import BuildError, FolderError
from arriero.export import export_checkpoint

Loader = Callable[..., Any]
SCRIPT = """
from arriero.engine.polygraphy import Scripts

scripts = Scripts({!r})
load_data, load_network, load_config = scripts.load_data, scripts.load_network, scripts.load_config
"""


@pytest.fixture(scope="module")
def model(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama 4 in float32, which ONNX Runtime's CPU runs as it is."""
    return export_checkpoint(tiny, tmp_path_factory.mktemp("polygraphy") / "model", dtype="float32")


def write_script(model: Path) -> str:
    """A script as the README shows it, beside the model. Returns its path."""
    path = model.parent / f"{model.name}_script.py"
    path.write_text(SCRIPT.format(str(model)))
    return str(path)


def polygraphy(*arguments: str | Path, folder: Path, rtx: bool = False) -> tuple[bool, str]:
    """Runs Polygraphy in a folder. Returns whether it passed, and what it printed."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", RTX: str(int(rtx))}
    command = ["polygraphy", *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode == 0, done.stdout + done.stderr


def test_inspect_shows_a_models_ops_inputs_and_attributes(tiny_model: Path, tmp_path: Path) -> None:
    arguments = ("inspect", "model", tiny_model / "decoder.onnx", "--ignore-external-data", "--show", "layers", "attrs")
    passed, output = polygraphy(*arguments, folder=tmp_path)
    assert passed, output
    assert "{'arriero': 1}" in output
    assert "logit_positions [dtype=int64, shape=('batch', 'logit_positions')]" in output
    assert output.count("[Op: GroupedQueryAttention]") == 8
    assert output.count("[Op: MoeDispatch]") == 4
    assert "layers.0/GroupedQueryAttention.chunk = 128" in output


def test_models_run_and_are_compared(model: Path, tiny: Path, tmp_path: Path) -> None:
    script, inputs, outputs = write_script(model), tmp_path / "inputs.json", tmp_path / "model.json"
    run = ("run", "--onnxrt")
    saved = ("--data-loader-script", script, "--save-inputs", inputs, "--save-outputs", outputs)
    passed, output = polygraphy(*run, model / "decoder.onnx", *saved, folder=tmp_path)
    assert passed, output
    (results,) = RunResults.load(str(outputs)).values()
    prefill = next(Scripts(model).load_data())
    expected = arriero.load(model).logits(prefill["input_ids"])
    assert np.abs(np.asarray(results[0]["logits"]) - expected).max() < 1e-4

    recipe = parse_recipe("int8", {"smoothing": "none"}, ())
    quantised = calibrate_model(
        model, tmp_path / "int8", recipe=recipe, data=[tiny / "train.py"], samples=2, window=256, floor=0
    )
    compared = ("--load-inputs", inputs, "--load-outputs", outputs, "--compare", "cosine_similarity")
    compared = (*compared, "--cosine-similarity-threshold", "0.995")
    passed, output = polygraphy(*run, quantised / "decoder.onnx", *compared, folder=tmp_path)
    assert passed, output
    assert "Pass Rate: 100.00%" in output
    sabotage(quantised / "layer-00003.safetensors", "model.layers.3.self_attn.o_proj.weight_scale")
    passed, output = polygraphy(*run, quantised / "decoder.onnx", *compared, folder=tmp_path)
    assert not passed
    assert "Mismatched outputs: ['logits'" in output


def sabotage(path: Path, name: str) -> None:
    """Makes one float32 tensor of a file four times as large."""
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    first, end = (start + offset for offset in header[name]["data_offsets"])
    data[first:end] = (np.frombuffer(bytes(data[first:end]), np.float32) * 4).tobytes()
    path.write_bytes(data)


def test_debug_reduce_finds_the_weight_that_is_not_a_number(make_llama4: Loader, tmp_path: Path) -> None:
    make_llama4(num_hidden_layers=1).save_pretrained(tmp_path / "checkpoint")
    model = export_checkpoint(tmp_path / "checkpoint", tmp_path / "model", copy_weights=True)
    broken, culprit = onnx.load(model / "decoder.onnx"), "model.layers.0.self_attn.o_proj.weight"
    for weight in broken.graph.initializer:
        if weight.name == culprit:
            values = onnx.numpy_helper.to_array(weight).copy()
            values[5, 7] = np.nan
            weight.CopyFrom(onnx.numpy_helper.from_array(values, culprit))
    onnx.save(inline_local_functions(broken), tmp_path / "plain.onnx")
    check = f"polygraphy run polygraphy_debug.onnx --onnxrt --validate --data-loader-script {write_script(model)}"
    reduce = ("debug", "reduce", "plain.onnx", "-o", "reduced.onnx", "--mode", "bisect", "--no-reduce-inputs")
    passed, output = polygraphy(*reduce, "--check", *check.split(), folder=tmp_path)
    assert passed, output
    reduced = onnx.load(tmp_path / "reduced.onnx").graph
    assert [weight.name for weight in reduced.initializer] == [culprit]
    assert len(reduced.node) == 1


def test_the_tensorrt_network_holds_our_plugins_and_builds_as_ours(tiny_model: Path, tmp_path: Path) -> None:
    script = write_script(tiny_model)
    network = (script, "--model-type", "trt-network-script")
    passed, output = polygraphy("inspect", "model", *network, "--show", "layers", folder=tmp_path, rtx=True)
    assert passed, output
    assert "past.0.key [dtype=bfloat16, shape=(-1, 2, 128, 32)]" in output
    assert output.count("LayerType.PLUGIN_V3") == 12
    built = ("--convert-to", "trt", "--trt-config-script", script, "-o", "decoder.engine")
    passed, output = polygraphy("convert", *network, *built, folder=tmp_path, rtx=True)
    assert passed, output
    assert "2 profile(s)" in output
    bundle = build_bundle(tiny_model, tmp_path / "bundle", target=Scripts(tiny_model).target, options=Options())
    # Engines are not the same byte for byte from one build to the next.
    assert (tmp_path / "decoder.engine").stat().st_size == (bundle / "decoder.engine").stat().st_size


def test_polygraphy_is_told_which_tensorrt_to_use(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RTX, "0")
    with pytest.raises(BuildError, match=f"uses another TensorRT than tensorrt-rtx:sm89: set {RTX}=1"):
        Scripts(tiny_model).load_network()
    with pytest.raises(BuildError, match="target is cpu: give a TensorRT"):
        Scripts(tiny_model, "cpu").load_network()
    with pytest.raises(BuildError, match=r"past\.0\.key is BFLOAT16, .*: export with --dtype float32"):
        next(Scripts(tiny_model).load_data())


@pytest.mark.parametrize("size", ["rows", 1 << 40, 3, None])
def test_inputs_are_made_only_of_a_graph_that_its_spec_describes(
    model: Path, tmp_path: Path, size: str | int | None
) -> None:
    """A cache of unknown or endless rows, or of another rank, is nothing to make inputs of."""
    folder = shutil.copytree(model, tmp_path / "model")
    graph = onnx.load(folder / "decoder.onnx", load_external_data=False)
    shape = next(value for value in graph.graph.input if value.name == "past.3.value").type.tensor_type.shape
    if size is None:
        del shape.dim[0]
    elif isinstance(size, str):
        shape.dim[2].dim_param = size
    else:
        shape.dim[2].dim_value = size
    onnx.save(graph, folder / "decoder.onnx")
    said = "not the graph that spec.json describes (past.3.value of" if size is None else "past.3.value is ["
    with pytest.raises(FolderError, match=re.escape(said)):
        next(Scripts(folder).load_data())
