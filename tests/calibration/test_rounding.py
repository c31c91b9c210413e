"""Rounding against the ops' meaning."""

import ml_dtypes
import numpy as np
import pytest
import torch

from arriero.calibration import moved_weight
from arriero.calibration.rounding import choose_and_round, choose_scales, fake_quantise, round_nearest, widen
from arriero.calibration.shard import pack_int4
from arriero.plugins import quantisation
from arriero.plugins.narrow_types import unpack_int4


def weight(rows: int = 6, columns: int = 64) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("kind", "group"), [("int8", 64), ("fp8", 64), ("int4", 32)])
def test_rounded_weights_are_those_of_the_ops_meaning(kind: str, group: int) -> None:
    w = weight()
    scales = choose_scales(w, kind, group, "absmax")
    blocks = w.numpy().reshape(6, -1, group)
    expected = np.abs(blocks).max(2) / quantisation.LARGEST[kind]
    assert np.allclose(scales.numpy(), expected, rtol=1e-6)
    stored = quantisation.quantise(blocks, scales.numpy()[:, :, None], kind).reshape(6, 64)
    rounded = round_nearest(w, scales, kind)
    assert np.array_equal(rounded.values_NK.float().numpy(), stored.astype(np.float32))
    assert np.allclose(rounded.wide().numpy(), quantisation.dequantise(stored, scales.numpy()), rtol=1e-6)


@pytest.mark.parametrize("scale", [0.02, None])
@pytest.mark.parametrize("kind", ["int8", "fp8", "int4"])
def test_activations_become_what_the_ops_meaning_makes_of_them(kind: str, scale: float | None) -> None:
    x = weight(20, 32)
    x[3] = 0
    expected = quantisation.fake_quantise(x.numpy(), scale, kind)
    found = fake_quantise(x, kind, scale).numpy()
    assert np.mean(np.abs(found - expected) > 1e-6) < 0.01  # values on a border fall to either side in float32


def test_a_clip_of_least_squares_is_no_worse_than_the_largest() -> None:
    w = weight(16, 128)
    errors = [
        (round_nearest(w, choose_scales(w, "int4", 64, clip), "int4").wide() - w).square().sum()
        for clip in ("absmax", "mse")
    ]
    assert errors[1] < 0.95 * errors[0]


def test_every_e4m3_value_is_widened_as_ml_dtypes_does() -> None:
    codes = np.array([code for code in range(256) if code & 0x7F != 0x7F], np.uint8)
    found = widen(torch.from_numpy(codes).view(torch.float8_e4m3fn))
    assert np.array_equal(found.numpy(), codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32))


@pytest.mark.parametrize("clip", ["absmax", "mse"])
@pytest.mark.parametrize(("kind", "group"), [("int8", 96), ("fp8", 96), ("int4", 32)])
def test_scales_and_values_in_one_pass_are_those_of_the_moved_weight(
    kind: str, group: int, clip: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moved_weight, "PIECE", 96 * 7)
    stored = weight(50, 96).bfloat16()
    exponents = torch.randint(-3, 4, (146,), generator=torch.Generator().manual_seed(2), dtype=torch.int32)
    moved = stored.float() * torch.exp2(exponents[:96].float()) / torch.exp2(exponents[96:].float())[:, None]
    scales = choose_scales(moved, kind, group, clip)
    expected = round_nearest(moved, scales, kind)
    for laid_out in (stored, stored.T.contiguous().T):
        lies = moved_weight.MovedWeight(laid_out, exponents[:96], exponents[96:])
        found = choose_and_round(lies, kind, group, clip, torch.float32)
        assert torch.equal(found.scale_NG, scales)
        assert torch.equal(found.values_NK.view(torch.int8), expected.values_NK.view(torch.int8))
        assert torch.equal(lies.largest_K(), moved.abs().amax(0))
        assert torch.equal(lies.kept(torch.bfloat16), moved.bfloat16())


def test_int4_is_packed_as_onnx_packs_it() -> None:
    values = torch.randint(-8, 8, (3, 10), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    packed = pack_int4(values)
    flat = values.numpy().astype(ml_dtypes.int4).view(np.uint8).reshape(-1) & 15
    assert np.array_equal(packed.numpy().reshape(-1), flat[0::2] | (flat[1::2] << 4))
    assert np.array_equal(unpack_int4(packed.numpy()).reshape(values.shape), values.numpy())
