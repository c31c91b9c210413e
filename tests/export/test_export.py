"""Export as its user meets it: where the weights may lie, what is written, what interrupts it."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import load_file, save_file

import arriero
from arriero.errors import ExportError, FolderError
from arriero.export import export_checkpoint

IDS = [[5, 3, 90, 41, 7, 7, 12, 60, 33, 2, 1, 8, 96, 14, 15, 16, 17, 18, 19, 20]]


def digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def logits_of(checkpoint: Path, model: Path) -> float:
    """The largest difference between the model's logits and those of `transformers`."""
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)(torch.tensor(IDS)).logits
    return float(np.abs(arriero.load(model).logits(IDS) - expected.numpy()).max())


def test_the_checkpoint_is_left_untouched_and_the_weights_in_place(checkpoint: Path, tmp_path: Path) -> None:
    before = digest(checkpoint)
    model = export_checkpoint(checkpoint, tmp_path / "model")
    assert digest(checkpoint) == before
    assert not list(model.glob("*.safetensors"))
    assert logits_of(checkpoint, model) < 1e-5


def test_the_same_checkpoint_gives_the_same_graph(checkpoint: Path, tmp_path: Path) -> None:
    first, second = (export_checkpoint(checkpoint, tmp_path / name) for name in "ab")
    assert (first / "decoder.onnx").read_bytes() == (second / "decoder.onnx").read_bytes()


def test_the_checker_accepts_the_graph_with_the_weights_beside_it(checkpoint: Path, tmp_path: Path) -> None:
    model = export_checkpoint(checkpoint, tmp_path / "model", copy_weights=True)
    onnx.checker.check_model(model / "decoder.onnx", full_check=True)


def test_the_graph_has_the_contracts_inputs_outputs_and_names(checkpoint: Path, tmp_path: Path) -> None:
    model = export_checkpoint(checkpoint, tmp_path / "model")
    graph = onnx.load(model / "decoder.onnx", load_external_data=False).graph
    layers = [f"{index}.{kind}" for index in range(2) for kind in ("key", "value")]
    inputs = ["input_ids", "past_lengths", "logit_positions", *(f"past.{name}" for name in layers)]
    assert [value.name for value in graph.input] == inputs
    assert [value.name for value in graph.output] == ["logits", *(f"present.{name}" for name in layers)]
    dims = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in [*graph.input, *graph.output]
    }
    assert dims["input_ids"] == ["batch", "sequence"]
    assert dims["past.0.key"] == ["batch", 2, "chunk_slots", 16]
    assert dims["logits"] == ["batch", "logit_positions", 97]
    weights = {tensor.name for tensor in graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL}
    assert weights == {name for path in checkpoint.glob("*.safetensors") for name in load_file(path)}
    assert "layers.0/self_attn.q_proj" in {node.name for node in graph.node}


def test_any_onnx_runtime_runs_the_canonical_graph_through_its_functions(checkpoint: Path, tmp_path: Path) -> None:
    model = export_checkpoint(checkpoint, tmp_path / "model", copy_weights=True)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    graph = ort.InferenceSession(str(model / "decoder.onnx"), options, providers=["CPUExecutionProvider"])
    session = arriero.load(model)
    rows = [IDS[0][:14], IDS[0][3:9]]
    caches = {
        f"past.{index}.{kind}": np.zeros((2, 2, 24, 16), np.float32) for index in (0, 1) for kind in ("key", "value")
    }
    past = np.zeros(2, np.int32)
    for length in (3, 2, 1):  # ragged: the second row has a token less in each piece, then as many
        ids, real = np.zeros((2, length), np.int64), (length, max(1, length - 1))
        for row, tokens in enumerate(rows):
            ids[row, : real[row]] = tokens[past[row] : past[row] + real[row]]
        positions = np.array(real, np.int64)[:, None] - 1
        feed = {"input_ids": ids, "past_lengths": past, "logit_positions": positions, **caches}
        logits, *present = graph.run(None, feed)
        caches = dict(zip(caches, present, strict=True))
        past += np.array(real, np.int32)
        for row, tokens in enumerate(rows):
            expected = session.logits([tokens[: past[row]]])[0, -1]
            assert np.abs(logits[row, 0] - expected).max() < 1e-5


def test_a_model_moves_with_its_copied_weights(checkpoint: Path, tmp_path: Path) -> None:
    model = export_checkpoint(checkpoint, tmp_path / "model", copy_weights=True)
    moved = tmp_path / "elsewhere" / "moved"
    moved.parent.mkdir()
    model.rename(moved)
    kept = tmp_path / "kept"
    shutil.copytree(checkpoint, kept)
    shutil.rmtree(checkpoint)
    assert logits_of(kept, moved) < 1e-5


def test_a_hub_cache_of_symlinks_into_several_folders(checkpoint: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(checkpoint.iterdir())):
        blob = tmp_path / "hub" / f"blobs{number % 2}" / hashlib.sha256(path.name.encode()).hexdigest()
        blob.parent.mkdir(exist_ok=True)
        shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    model = export_checkpoint(snapshot, tmp_path / "model")
    assert logits_of(checkpoint, model) < 1e-5


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="needs a second file system at /dev/shm")
def test_a_checkpoint_on_another_file_system(checkpoint: Path, tmp_path: Path) -> None:
    other = Path("/dev/shm") / f"arriero-{os.getpid()}"
    shutil.copytree(checkpoint, other)
    try:
        assert other.stat().st_dev != tmp_path.stat().st_dev
        assert logits_of(checkpoint, export_checkpoint(other, tmp_path / "model")) < 1e-5
    finally:
        shutil.rmtree(other)


def test_weights_that_moved_are_found_where_they_are_now(checkpoint: Path, tmp_path: Path) -> None:
    model = export_checkpoint(checkpoint, tmp_path / "model")
    moved = checkpoint.rename(tmp_path / "moved")
    with pytest.raises(FolderError, match="give its folder with --weights"):
        arriero.load(model)
    assert arriero.load(model, weights=moved).logits(IDS).shape == (1, 20, 97)


def test_other_weights_than_those_exported_are_refused(
    checkpoint: Path, make_llama4: Callable[..., Any], tmp_path: Path
) -> None:
    model = export_checkpoint(checkpoint, tmp_path / "model")
    make_llama4(seed=1, num_hidden_layers=2).save_pretrained(checkpoint, max_shard_size="100KB")
    with pytest.raises(FolderError, match="is not the file that was exported"):
        arriero.load(model)


@pytest.mark.parametrize(("dtype", "close"), [("bfloat16", 0.1), ("float16", 0.01)])
def test_a_conversion_writes_weights_of_the_other_type(
    checkpoint: Path, tmp_path: Path, dtype: Any, close: float
) -> None:
    model = export_checkpoint(checkpoint, tmp_path / "model", dtype=dtype)
    converted = {name: tensor for path in model.glob("*.safetensors") for name, tensor in load_file(path).items()}
    for path in checkpoint.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            assert torch.equal(converted[name], tensor.to(getattr(torch, dtype)))
    assert logits_of(checkpoint, model) < close


def test_tied_embeddings_are_one_weight(make_llama4: Callable[..., Any], tmp_path: Path) -> None:
    make_llama4(num_hidden_layers=1, tie_word_embeddings=True).bfloat16().save_pretrained(tmp_path / "checkpoint")
    model = export_checkpoint(tmp_path / "checkpoint", tmp_path / "model")
    assert logits_of(tmp_path / "checkpoint", model) < 1e-5


def test_an_output_in_the_checkpoint_is_refused(checkpoint: Path) -> None:
    before = digest(checkpoint)
    for out in (checkpoint, checkpoint / "model", checkpoint.parent):
        with pytest.raises(FolderError, match="lie in one another: choose an output beside the input"):
            export_checkpoint(checkpoint, out, force=True)
    assert digest(checkpoint) == before


def test_a_value_too_large_for_a_conversion_is_named(checkpoint: Path, tmp_path: Path) -> None:
    path = sorted(checkpoint.glob("*.safetensors"))[0]
    tensors = load_file(path)
    name = next(iter(tensors))
    tensors[name].view(-1)[3] = 1e6
    save_file(tensors, path)
    with pytest.raises(ExportError, match=f"{re.escape(name)}.* does not fit float16"):
        export_checkpoint(checkpoint, tmp_path / "model", dtype="float16")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("options", [{"copy_weights": True}, {"dtype": "bfloat16"}], ids=str)
def test_a_full_disk_leaves_nothing(checkpoint: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    code = (
        "import resource, signal, sys\n"
        "from arriero.export import export_checkpoint\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        f"export_checkpoint(sys.argv[1], sys.argv[2], **{options})\n"
    )
    command = [sys.executable, "-c", code, str(checkpoint), str(tmp_path / "out" / "model")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert "writing failed (File too large)" in run.stderr
    assert not list((tmp_path / "out").iterdir())


def test_fields_that_are_not_heeded_are_noticed(checkpoint: Path, tmp_path: Path) -> None:
    said: list[str] = []
    (checkpoint / "generation_config.json").write_text('{"guidance_scale": 1.5, "eos_token_id": 1}')
    export_checkpoint(checkpoint, tmp_path / "model", notice=said.append)
    said = [line for line in said if "no tokenizer.json" not in line]
    assert said == ["generation_config.json: not heeded, though it may change results: guidance_scale=1.5"]


def test_end_tokens_come_from_the_config_where_there_is_no_generation_config(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "generation_config.json").unlink()
    model = export_checkpoint(checkpoint, tmp_path / "model")
    assert json.loads((model / "generation_config.json").read_text())["eos_token_id"] == 1


def test_a_kill_leaves_nothing_under_the_final_name(checkpoint: Path, tmp_path: Path) -> None:
    before = digest(checkpoint)
    command = [
        sys.executable,
        "-m",
        "arriero",
        "export",
        str(checkpoint),
        "-o",
        str(tmp_path / "out" / "model"),
    ]
    for sent in (signal.SIGKILL, signal.SIGTERM):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not list((tmp_path / "out").glob(".*")):
            assert process.poll() is None, "it ended before it was killed"
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.send_signal(sent)
        process.wait()
        assert not (tmp_path / "out" / "model").exists()
    assert digest(checkpoint) == before
    model = export_checkpoint(checkpoint, tmp_path / "out" / "model")
    assert [path.name for path in model.parent.iterdir()] == ["model"]
