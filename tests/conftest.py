"""Checkpoints for the tests: random ones of any geometry from `transformers`, and the trained tiny Llama 4."""

import copy
import functools
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from multimodal import VOCABULARY, write_multimodal
from shared_folders import MakeOnce, make_once
from torch.onnx._internal.exporter._registration import ONNXRegistry
from transformers import (
    Llama4Config,
    Llama4ForCausalLM,
    Llama4ForConditionalGeneration,
    Llama4TextConfig,
    Llama4VisionConfig,
)
from transformers.utils import logging
from triton_interpreter import Interpreter

from arriero.spec.recipe import Recipe

logging.set_verbosity_error()
logging.disable_progress_bar()

os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="arriero-state-")  # engines that tests build are trusted there
if worker := os.environ.get("PYTEST_XDIST_WORKER"):  # a processor each: the threads of several would wait for another's
    processors = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {processors[int(worker.removeprefix("gw")) % len(processors)]})
torch.set_num_threads(min(2, len(os.sched_getaffinity(0))))


@functools.cache
def _functions(opset_version: int) -> ONNXRegistry:
    return _from_torchlib(opset_version=opset_version)


def _from_torchlib_once(opset_version: int) -> ONNXRegistry:
    """PyTorch's table of ONNX functions, whose 1,500 sources take a second to read, for each traced layer anew."""
    registry = copy.copy(_functions(opset_version))
    registry.functions = {target: list(found) for target, found in registry.functions.items()}
    return registry


_from_torchlib = ONNXRegistry.from_torchlib
ONNXRegistry.from_torchlib = staticmethod(_from_torchlib_once)

# A busy machine is slow, which says nothing about the code; the same examples are tried in every run.
settings.register_profile("arriero", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("arriero")

LONGEST = int(os.environ.get("ARRIERO_TEST_SECONDS", "240"))
"""Seconds that a test may run, and its fixtures; more where sanitizers slow them."""

TINY = Path(__file__).parent.parent / "examples" / "tiny-llama4"

SCOUT_LIKE = {
    "interleave_moe_layer_step": 1,
    "use_qk_norm": True,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 16.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 1.0,
        "original_max_position_embeddings": 32,
    },
}
MAVERICK_LIKE = {
    "interleave_moe_layer_step": 2,
    "use_qk_norm": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}


@contextmanager
def bounded(item: pytest.Item) -> Iterator[None]:
    """A test or its fixtures that hang fail, where they stand, and the others run."""

    def end(*_: object) -> None:
        raise TimeoutError(f"{item.nodeid} has run for {LONGEST} s")

    previous = signal.signal(signal.SIGALRM, end)
    signal.alarm(LONGEST)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    with bounded(item):
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    with bounded(item):
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


def llama4(seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> Llama4ForCausalLM:
    """A random small Llama 4 of `transformers`, its weights large enough that every part matters."""
    torch.manual_seed(seed)
    return Llama4ForCausalLM(text_config(**overrides)).eval().to(dtype)


def multimodal(
    seed: int = 0, dtype: torch.dtype = torch.float32, vision: dict[str, Any] | None = None, **overrides: Any
) -> Llama4ForConditionalGeneration:
    """A random small multimodal Llama 4 of `transformers`; its last token is that of image features."""
    geometry: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "image_size": 28,
        "patch_size": 7,
        "pixel_shuffle_ratio": 0.5,
        "projector_input_dim": 40,
        "projector_output_dim": 40,
        "vision_output_dim": 40,
        "initializer_range": 0.1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        **(vision or {}),
    }
    text = text_config(**overrides)
    torch.manual_seed(seed)
    config = Llama4Config(
        vision_config=Llama4VisionConfig(**geometry),
        text_config=text,
        image_token_index=text.vocab_size - 1,
        boi_token_index=text.vocab_size - 2,
        eoi_token_index=text.vocab_size - 3,
    )
    model = Llama4ForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():  # biases begin at 0 and norms at 1: give them something to say
        if name.startswith("vision_model.") and parameter.ndim == 1:
            torch.nn.init.normal_(parameter, float("norm.weight" in name), 0.1)
    return model.bfloat16() if dtype == torch.bfloat16 else model  # `to` would drop a complex buffer's other half


def text_config(**overrides: Any) -> Llama4TextConfig:
    """The geometry of a small text decoder."""
    geometry: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "intermediate_size_mlp": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "max_position_embeddings": 512,
        "attention_chunk_size": 16,
        "floor_scale": 4,
        "initializer_range": 0.1,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        **SCOUT_LIKE,
        **overrides,
    }
    return Llama4TextConfig(**geometry)


def random_vision(seed: int) -> dict[str, Any]:
    """The geometry of a vision tower drawn at random."""
    rng = random.Random(seed)
    heads, head_dim, shuffle = rng.choice([1, 2, 4]), rng.choice([8, 12, 16]), rng.choice([1, 2, 3])
    patch_size, width = rng.choice([4, 7, 8]), rng.choice([24, 40])
    return {
        "hidden_size": heads * head_dim,
        "num_attention_heads": heads,
        "num_hidden_layers": rng.choice([1, 2, 3]),
        "intermediate_size": heads * head_dim * shuffle**2,
        "image_size": patch_size * shuffle * rng.choice([1, 2]) + rng.choice([0, 3]),
        "patch_size": patch_size,
        "pixel_shuffle_ratio": 1 / shuffle,
        "projector_input_dim": width,
        "projector_output_dim": width,
        "vision_output_dim": width,
        "rope_parameters": {"rope_type": "default", "rope_theta": rng.choice([1000.0, 10000.0])},
    }


def random_overrides(seed: int) -> dict[str, Any]:
    """A geometry drawn at random: heads, experts, top-k, chunk, scaling, norm, temperature, MoE step."""
    rng = random.Random(seed)
    kv_heads = rng.choice([1, 2, 4])
    llama3 = {**SCOUT_LIKE["rope_parameters"], "high_freq_factor": rng.choice([1.0, 4.0])}  # type: ignore[dict-item]
    return {
        "hidden_size": rng.choice([32, 64, 80]),
        "intermediate_size": rng.choice([16, 48, 64]),
        "intermediate_size_mlp": rng.choice([32, 96]),
        "num_hidden_layers": rng.choice([1, 2, 4, 5]),
        "num_attention_heads": kv_heads * rng.choice([1, 2, 3]),
        "num_key_value_heads": kv_heads,
        "head_dim": rng.choice([8, 16, 32]),
        "num_local_experts": rng.choice([2, 4, 8]),
        "num_experts_per_tok": rng.choice([1, 2]),
        "interleave_moe_layer_step": rng.choice([1, 2]),
        "attention_chunk_size": rng.choice([4, 8, 16]),
        "attn_temperature_tuning": rng.choice([True, False]),
        "floor_scale": rng.choice([2, 4, 64]),
        "use_qk_norm": rng.choice([True, False]),
        "rope_parameters": rng.choice([MAVERICK_LIKE["rope_parameters"], llama3]),
    }


@pytest.fixture(scope="session")
def make_llama4() -> Callable[..., Llama4ForCausalLM]:
    return llama4


@pytest.fixture(scope="session")
def make_multimodal() -> Callable[..., Llama4ForConditionalGeneration]:
    return multimodal


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> MakeOnce:
    return make_once(tmp_path_factory)


@pytest.fixture(scope="session")
def multimodal_checkpoint(once: MakeOnce) -> Path:
    """A random multimodal checkpoint with all its files; not to be written to."""
    reference = multimodal(vocab_size=VOCABULARY, hidden_size=64)
    return once("multimodal-checkpoint", lambda folder: write_multimodal(reference, folder))


@pytest.fixture(scope="session")
def multimodal_model(multimodal_checkpoint: Path, once: MakeOnce) -> Path:
    """The same, exported once."""
    from arriero.export import export_checkpoint

    return once("multimodal-model", lambda out: export_checkpoint(multimodal_checkpoint, out))


@pytest.fixture(scope="session")
def draw_vision() -> Callable[[int], dict[str, Any]]:
    return random_vision


@pytest.fixture(scope="session")
def draw_overrides() -> Callable[[int], dict[str, Any]]:
    return random_overrides


@pytest.fixture(scope="session")
def maverick_like() -> dict[str, Any]:
    return MAVERICK_LIKE


@pytest.fixture(scope="session")
def tiny() -> Path:
    return TINY


@pytest.fixture(scope="session")
def tiny_model(once: MakeOnce) -> Path:
    """The tiny Llama 4, exported once."""
    from arriero.export import export_checkpoint

    return once("tiny", lambda out: export_checkpoint(TINY, out))


@pytest.fixture(scope="session")
def tiny_engine(tiny_model: Path, once: MakeOnce) -> Path:
    """A TensorRT bundle of the tiny Llama 4, built once; for what is told or refused without a GPU."""
    from arriero.engine import build_bundle
    from arriero.files.folders import read_spec
    from arriero.files.trust import remember

    folder = once("tiny-engine", lambda out: build_bundle(tiny_model, out, target="tensorrt-rtx:sm89"))
    remember(folder, read_spec(folder))  # another process of the tests may have built it, which trusts it alone
    return folder


@pytest.fixture(scope="session")
def texts(once: MakeOnce) -> tuple[Path, Path]:
    """The held-out text of the tiny Llama 4, and a part of the text that it was trained on, for calibration."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from corpus import documents\n"
        "read = documents()\n"
        "held_out = [each.text for each in read if each.is_held_out]\n"
        "training = [each.text for each in read if not each.is_held_out][::12]\n"
        "for path, chosen in zip(sys.argv[2:], (held_out, training)):\n"
        "    open(path, 'w').write('\\n\\n\\n'.join(chosen))\n"
    )

    def write(folder: Path) -> None:
        folder.mkdir()
        paths = [str(folder / f"{name}.txt") for name in ("held_out", "training")]
        subprocess.run([sys.executable, "-c", code, str(TINY), *paths], check=True)

    folder = once("texts", write)
    return folder / "held_out.txt", folder / "training.txt"


@pytest.fixture(scope="session")
def quantised_tiny(tiny_model: Path, texts: tuple[Path, Path], once: MakeOnce) -> Callable[[Recipe], Path]:
    """The tiny Llama 4 quantised on twelve windows of its training text, once a recipe."""
    from arriero.calibration import calibrate_model

    def make(recipe: Recipe) -> Path:
        name = f"{recipe.format}-{hashlib.sha256(repr(recipe).encode()).hexdigest()[:16]}"
        return once(name, lambda out: calibrate_model(tiny_model, out, recipe=recipe, data=[texts[1]], samples=12))

    return make


@pytest.fixture
def unheld_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs that compute something else than their specs say are loaded, which they are not elsewhere."""
    for name in ("check_decoder", "check_tower"):
        monkeypatch.setattr(f"arriero.loading.{name}", lambda *_: None)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A small random checkpoint in two shards with an index, free to be damaged."""
    folder = tmp_path / "checkpoint"
    llama4(num_hidden_layers=2).save_pretrained(folder, max_shard_size="100KB")
    return folder


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Interpreter]:
    process = Interpreter()
    yield process
    process.close()
