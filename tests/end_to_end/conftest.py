"""The folders that the tests of remedies provoke refusals with."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from remedies import Place
from shared_folders import MakeOnce
from transformers import Llama4ForCausalLM

from arriero.calibration import calibrate_model


@pytest.fixture(scope="session")
def small(make_llama4: Callable[..., Llama4ForCausalLM], tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint of two layers that reads text; not to be written to."""
    folder = tmp_path_factory.mktemp("remedies") / "small"
    make_llama4(num_hidden_layers=2, vocab_size=2048).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / name, folder)
    return folder


@pytest.fixture(scope="session")
def small_int8(tiny_model: Path, texts: tuple[Path, Path], once: MakeOnce) -> Path:
    """The tiny Llama 4 in int8, calibrated on little; not to be written to."""
    return once(
        "small-int8",
        lambda out: calibrate_model(tiny_model, out, recipe="int8", data=[texts[1]], samples=2, floor=0),
    )


@pytest.fixture
def place(
    tiny: Path,
    tiny_model: Path,
    small_int8: Path,
    small: Path,
    multimodal_model: Path,
    texts: tuple[Path, Path],
    tmp_path: Path,
) -> Place:
    return Place(
        tiny=tiny,
        model=tiny_model,
        int8=small_int8,
        small=small,
        seeing=multimodal_model,
        text=texts[1],
        room=tmp_path,
    )
