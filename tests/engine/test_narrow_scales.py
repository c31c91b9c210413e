"""Scales of int4 experts' groups in 16 bits: where the model's type holds them, and on their way to a GPU."""

import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_gpu import FakeDriver

from arriero.calibration import calibrate_model
from arriero.engine import tensorrt_lowering
from arriero.engine.tensorrt_lowering import Choices, Placement, lower_for_tensorrt
from arriero.export import export_checkpoint
from arriero.files.folders import find_files, read_spec
from arriero.plugins.narrow_types import NUMPY_DTYPES, widen
from arriero.runtime.backends.device import Device
from arriero.runtime.backends.execution import upload_weights
from arriero.spec.recipe import Recipe
from arriero.spec.stored_weights import Weight


@pytest.fixture(scope="module", params=["bfloat16", "float16"])
def model(
    request: pytest.FixtureRequest, make_llama4: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("one-layer")
    made = make_llama4(num_hidden_layers=1, hidden_size=64, intermediate_size=32, dtype=torch.bfloat16)
    made.save_pretrained(folder / "checkpoint")
    plain = export_checkpoint(folder / "checkpoint", folder / "model", dtype=request.param)
    ids = np.random.default_rng(0).integers(3, 97, (4, 20))
    recipe = Recipe(format="int4", group_size=32, smoothing="none")
    return calibrate_model(plain, folder / "quantised", recipe=recipe, data=ids, floor=0)


def scales_of(
    model: Path, files: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch, placement: Placement = "experts"
) -> list[Weight]:
    """The scales of experts that the network is given, with even small weights outside where any are."""
    monkeypatch.setattr(tensorrt_lowering, "SMALL", 0)
    choices = Choices(gqa=None, placement=placement, max_seq=64)
    network = lower_for_tensorrt(model, read_spec(model), choices, files)
    return [each for each in network.weights if each.name.endswith("_scale")]


def test_calibrated_scales_reach_the_gpu_in_the_models_type(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = read_spec(model)
    files = find_files(model, spec.weight_files)
    scales = scales_of(model, files, monkeypatch)
    assert len(scales) == 2
    device = Device(FakeDriver())
    found = upload_weights(device, scales, files)
    for each in scales:
        assert (each.dtype, each.convert) == ("float32", spec.model.dtype)
        assert found[each.name].size == each.given_size == each.size // 2
        wide = np.fromfile(files[each.file], np.float32, math.prod(each.shape), offset=each.offset)
        given = np.zeros(each.given_shape, np.uint16)
        device.download(found[each.name].address, given)
        given = widen(given.view(NUMPY_DTYPES[each.convert]), each.convert)
        np.testing.assert_array_equal(given.swapaxes(1, 2), wide.reshape(each.shape))


@pytest.mark.parametrize("scale", [0.1, 1e30, 1e-30])
def test_a_scale_that_16_bits_do_not_hold_leaves_the_layers_in_float32(
    scale: float, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = find_files(model, read_spec(model).weight_files)
    one = next(each for each in scales_of(model, files, monkeypatch) if each.name.endswith("down_proj_scale"))
    changed = files | {one.file: tmp_path / one.file}
    content = bytearray(files[one.file].read_bytes())
    struct.pack_into("<f", content, one.offset + one.size - 4, scale)
    changed[one.file].write_bytes(content)
    assert [each.convert for each in scales_of(model, changed, monkeypatch)] == ["float32"] * 2


def test_scales_inside_an_engine_stay_as_they_are_stored(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = find_files(model, read_spec(model).weight_files)
    assert scales_of(model, files, monkeypatch, "inside") == []
