import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from arriero.engine import build_bundle
from arriero.export import export_checkpoint
from arriero.files.folders import read_spec
from arriero.measuring.summary import summarise
from arriero.runtime.memory import step_reads
from arriero.spec.folder import FolderSpec

RUN = """
import sys
import numpy as np
import arriero
session = arriero.load(sys.argv[1], max_seq=int(sys.argv[2]), threads=2)
for _ in range(3):  # ONNX Runtime plans its memory once it has seen a shape
    state = session.start(int(sys.argv[3]))
    shape = state.caches.batch, state.caches.positions - 1
    ids = np.random.default_rng(0).integers(0, session.spec.vocab_size, shape)
    session.prefill(state, ids.tolist())
    session.decode(state, [1] * len(ids))
    del state
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""

ENCODE = """
import sys
import numpy as np
import arriero
session = arriero.load(sys.argv[1], threads=2)
for _ in range(3):
    session.encode(np.zeros((8, 3, 336, 336), np.float32))
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.fixture(scope="module")
def bundle(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_bundle(tiny_model, tmp_path_factory.mktemp("memory") / "bundle")


@pytest.fixture(scope="module")
def spec(bundle: Path) -> FolderSpec:
    return read_spec(bundle)


@pytest.mark.parametrize(("max_seq", "batch"), [(64, 1), (512, 8)])
def test_the_memory_that_inspect_tells_is_what_a_session_takes(bundle: Path, max_seq: int, batch: int) -> None:
    found = summarise(bundle, max_seq=max_seq, batch=batch)["memory"]
    command = [sys.executable, "-c", RUN, str(bundle), str(max_seq), str(batch)]
    taken = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) * 1024
    assert found["total"] == pytest.approx(taken, rel=0.1)


def test_a_vision_tower_takes_what_inspect_tells(make_multimodal: Callable[..., Any], tmp_path: Path) -> None:
    tower = {"hidden_size": 704, "num_attention_heads": 8, "intermediate_size": 2816, "num_hidden_layers": 1}
    tower |= {"image_size": 336, "patch_size": 14}
    make_multimodal(vision=tower, num_hidden_layers=1).save_pretrained(tmp_path / "checkpoint")
    bundle = build_bundle(export_checkpoint(tmp_path / "checkpoint", tmp_path / "model"), tmp_path / "bundle")
    found = summarise(bundle)["memory"]
    weights = read_spec(bundle).vision
    assert weights is not None
    assert found["tower"] > sum(weight.size for weight in weights.weights)
    command = [sys.executable, "-c", ENCODE, str(bundle)]
    taken = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) * 1024
    decoded = found["kv_cache"] + found["activations"] + found["kept"]  # which encoding alone does not take
    assert found["total"] - decoded == pytest.approx(taken, rel=0.15), found


def test_weights_and_caches_are_counted_exactly(bundle: Path) -> None:
    found = summarise(bundle, max_seq=1000, batch=3)["memory"]
    widened = 17 * 192  # norms
    assert found["mapped"] == 2 * (tiny_weights() - widened)
    assert found["converted"] == 4 * widened
    assert found["kv_cache"] == 3 * 2 * 2 * 32 * 4 * (6 * 128 + 2 * 1000)


def test_a_step_reads_the_weights_of_the_active_path_and_the_filled_slots(spec: FolderSpec) -> None:
    sizes = {weight.name: weight.given_size for weight in spec.weights}
    expert, routed = 3 * 192 * 128, 4 * 8
    alone = step_reads(spec, sizes, 1, 200)
    assert alone.experts == pytest.approx(2 * 4 * expert)  # one of eight in each of four layers
    norms = 17 * 192  # these alone are widened
    assert alone.shared == pytest.approx(2 * (tiny_weights() - routed * expert - 2048 * 192 + norms) + 2 * 192)
    assert alone.kv_cache == 2 * 2 * 32 * 4 * (2 * 201 + 6 * (200 - 128 + 1))
    batch = step_reads(spec, sizes, 4, 200)
    assert batch.experts == pytest.approx(2 * 4 * expert * 8 * (1 - (7 / 8) ** 4))
    assert batch.kv_cache == 4 * alone.kv_cache


def test_a_tied_embedding_is_read_whole_by_the_head_that_shares_it(spec: FolderSpec) -> None:
    sizes = {"model.embed_tokens.weight": 4 * 2048 * 192}
    tied = replace(spec, model=replace(spec.model, tied_embeddings=True))
    assert step_reads(spec, sizes, 1, 0).shared == 4 * 192
    assert step_reads(tied, sizes, 1, 0).shared == 4 * 2048 * 192
    panels = {"model.embed_tokens.weight:panels": 2 * 2048 * 192}
    rows = {"model.embed_tokens.weight:bfloat16": 2 * 2048 * 192}
    assert step_reads(tied, rows, 1, 0).shared == 2 * 2048 * 192
    assert step_reads(tied, panels | rows, 1, 0).shared == 2 * 2048 * 192 + 2 * 192


def tiny_weights() -> int:
    """Parameters of the tiny Llama 4, from its geometry."""
    attention = 2 * 192 * 192 + 2 * 192 * 64
    dense, shared, experts, router = 3 * 192 * 512, 3 * 192 * 128, 8 * 3 * 192 * 128, 8 * 192
    layers = 8 * (attention + 2 * 192) + 4 * dense + 4 * (shared + experts + router)
    return layers + 2 * 2048 * 192 + 192
