"""Calibration and checks on a device: what lies where, what is copied, and that the numbers are the processor's."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from labelled_device import DEVICE, LabelledDevice
from safetensors.torch import load_file

from arriero.accuracy import check, record_golden
from arriero.calibration import calibrate_model, fp8, int4, int8, writing
from arriero.errors import AccuracyError, DeviceError
from arriero.export import export_checkpoint
from arriero.files.folders import read_spec
from arriero.spec.recipe import Override, Recipe
from arriero.walk import accelerator
from arriero.walk.accelerator import HOST, find_device, memory_bounded
from arriero.walk.numbers import Weights
from arriero.walk.windows import Windows

IDS = np.random.default_rng(0).integers(3, 97, (4, 48))
EVERYTHING = (Override(pattern="*.router", format="int8"), Override(pattern="lm_head", format="int8"))
RECIPES = {
    "int8": int8(activations="static", clip="percentile", strength=0.5, kv_cache="int8", overrides=EVERYTHING),
    "fp8": fp8(clip="mse"),
    "int4": int4(group_size=32, strength=0.5),
}


@pytest.fixture(scope="module")
def checkpoint(make_llama4: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, one of them with experts, in bf16; chunks of 16."""
    folder = tmp_path_factory.mktemp("on-a-device")
    reference = make_llama4(
        num_hidden_layers=2, interleave_moe_layer_step=2, hidden_size=64, intermediate_size=32, dtype=torch.bfloat16
    )
    reference.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_checkpoint(checkpoint, tmp_path_factory.mktemp("on-a-device") / "model")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> LabelledDevice:
    """The device, where `cuda` is asked for."""
    for module in (writing, accelerator):
        monkeypatch.setattr(module, "find_device", {"cuda": DEVICE, "cpu": HOST}.__getitem__)
    return LabelledDevice()


def seen(model: Path) -> Windows:
    """Two windows, each with the tiles of an image."""
    spec = read_spec(model)
    assert spec.vision is not None
    vision = spec.vision.spec
    ids_WS = np.random.default_rng(0).integers(3, 97, (2, 3 * vision.features))
    ids_WS[:, : vision.features] = vision.image_token
    pixels = np.random.default_rng(1).uniform(-1, 1, (2, 3, vision.image_size, vision.image_size)).astype(np.float16)
    return Windows(
        ids_WS=ids_WS,
        is_image_WS=ids_WS == vision.image_token,
        tiles_W=np.array([1, 1]),
        pixels_N3PP=pixels,
        vision=vision,
    )


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: each for path in folder.glob("*.safetensors") for name, each in load_file(path).items()}


def check_alike(host: Path, device: Path) -> None:
    """Holds a model quantised on a device against that of the processor, but for the last bits of float32's sums."""
    here, there = stored(host), stored(device)
    assert here.keys() == there.keys()
    for name, exact in here.items():
        if name.endswith("_scale"):
            torch.testing.assert_close(there[name].float(), exact.float(), rtol=1e-5, atol=0)
        else:
            assert (there[name].float() == exact.float()).float().mean() > 0.99, name


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_model_is_quantised_on_a_gpu_as_on_the_processor(model: Path, recipe: Recipe, tmp_path: Path) -> None:
    for name in ("cpu", "cuda"):
        calibrate_model(model, tmp_path / name, recipe=recipe, data=IDS, floor=0, device=name)
    check_alike(tmp_path / "cpu", tmp_path / "cuda")


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_model_is_quantised_on_a_device_as_on_the_processor(
    model: Path, recipe: Recipe, device: LabelledDevice, tmp_path: Path
) -> None:
    calibrate_model(model, tmp_path / "host", recipe=recipe, data=IDS, floor=0)
    with device:
        calibrate_model(model, tmp_path / "device", recipe=recipe, data=IDS, floor=0, device="cuda")
    check_alike(tmp_path / "host", tmp_path / "device")
    assert device.held == 0


def test_memory_on_a_device_does_not_grow_with_depth(
    make_llama4: Callable[..., Any], device: LabelledDevice, tmp_path: Path
) -> None:
    most = []
    for layers in (1, 2):
        make_llama4(num_hidden_layers=layers, hidden_size=64).save_pretrained(tmp_path / f"{layers}")
        model = export_checkpoint(tmp_path / f"{layers}", tmp_path / f"model-{layers}")
        device.most = 0
        with device:
            calibrate_model(
                model, tmp_path / f"out-{layers}", recipe=int8(strength=0.5), data=IDS, floor=0, device="cuda"
            )
        most.append(device.most)
    assert most[0] == most[1] > 0


def test_the_next_layer_is_read_while_a_device_computes(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda file, offset, size, advice: asked.append(size))
    weights = Weights({path.name: path for path in checkpoint.glob("*.safetensors")})
    weights.read_ahead("layers.1.")
    assert asked == []  # the processor reads what it computes with
    weights.on(DEVICE).read_ahead("layers.1.")
    assert sorted(asked) == sorted(
        region.size for name, (_, region) in weights.regions.items() if name.startswith("layers.1.")
    )


def test_a_tower_is_quantised_on_a_device_as_on_the_processor(
    multimodal_model: Path, device: LabelledDevice, tmp_path: Path
) -> None:
    windows = seen(multimodal_model)
    recipe = int8(strength=0.5)
    calibrate_model(multimodal_model, tmp_path / "host", recipe=recipe, data=windows, floor=0)
    with device:
        calibrate_model(multimodal_model, tmp_path / "device", recipe=recipe, data=windows, floor=0, device="cuda")
    check_alike(tmp_path / "host", tmp_path / "device")


def test_a_checkpoint_is_recorded_on_a_device_as_on_the_processor(
    tiny: Path, device: LabelledDevice, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    options: Any = {"data": [texts[0]], "samples": 1, "window": 256}
    record_golden(tiny, tmp_path / "host", **options)
    with device:
        record_golden(tiny, tmp_path / "device", **options, device="cuda")
    verdict = check(tiny, tmp_path / "device")
    assert verdict.metrics["kl"].value < 1e-6
    assert len(device.uploads) > 20


def test_what_is_no_device_here_is_said_in_one_line(
    model: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refusal(name: str) -> str:
        with pytest.raises(DeviceError) as caught:
            find_device(name)
        return str(caught.value)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device("auto") == find_device("cpu") == HOST
    monkeypatch.setattr(torch.version, "cuda", None)
    assert refusal("cuda") == (
        f"device is 'cuda', PyTorch {torch.__version__} is built without CUDA: mend that, or take --device cpu"
    )
    assert refusal("gpu") == refusal("gpu") == "device is 'gpu', expected cpu, cuda, cuda:1 or auto"
    assert refusal("mps") == "device is 'mps', expected cpu, cuda, cuda:1 or auto"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert find_device("auto") == torch.device("cuda")
    assert refusal("cuda:2") == "device is 'cuda:2', PyTorch finds 2: the first is cuda:0"
    with pytest.raises(AccuracyError, match="no checkpoints, which alone --device 'cuda' is for: leave it out"):
        check(model, model, data=IDS, device="cuda")
    with pytest.raises(AccuracyError, match="is no checkpoint, which alone --device 'cuda' is for: leave it out"):
        record_golden(model, tmp_path / "golden", data=[], device="cuda")


def test_the_end_of_a_devices_memory_is_said_in_one_line() -> None:
    with pytest.raises(DeviceError) as caught, memory_bounded(torch.device("cuda")):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total …")
    assert str(caught.value) == (
        "cuda: CUDA out of memory: free its memory, or take --device cpu, which goes on from where this ended"
    )
