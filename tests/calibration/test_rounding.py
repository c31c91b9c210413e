"""Rounding against the ops' meaning, and GPTQ against the formulas of its paper in float64."""

import ml_dtypes
import numpy as np
import pytest
import torch

from arriero.calibration.rounding import (
    DAMPING,
    choose_scales,
    fake_quantise,
    inverse_factor,
    round_gptq,
    round_nearest,
)
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


def test_gptq_equals_optimal_brain_quantisation_column_by_column() -> None:
    """Frantar et al. 2022, eqs. 2 and 3: round a column, spread its error, take it out of the inverse Hessian."""
    w = weight(5, 160).double().numpy()
    x = np.random.default_rng(0).standard_normal((400, 160)) @ np.random.default_rng(1).standard_normal((160, 160))
    hessian = x.T @ x
    scales = choose_scales(torch.from_numpy(w).float(), "int4", 32, "absmax")
    wide_scales = np.repeat(scales.numpy(), 32, axis=1).astype(np.float64)

    damped = hessian + DAMPING * np.mean(np.diag(hessian)) * np.eye(160)
    left, values, inverse = w.copy(), np.zeros_like(w), np.linalg.inv(damped)
    for column in np.argsort(-np.diag(hessian), kind="stable"):
        values[:, column] = np.clip(np.rint(left[:, column] / wide_scales[:, column]), -8, 7)
        error = (left[:, column] - values[:, column] * wide_scales[:, column]) / inverse[column, column]
        left -= np.outer(error, inverse[column])
        inverse -= np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    found = round_gptq(torch.from_numpy(w).float(), scales, "int4", torch.from_numpy(hessian).float())
    assert np.mean(found.values_NK.numpy() != values) < 0.01

    def loss(wide: np.ndarray) -> float:
        return float(np.sum((x @ (wide - w).T) ** 2))

    nearest = round_nearest(torch.from_numpy(w).float(), scales, "int4")
    assert loss(found.wide().double().numpy()) < 0.5 * loss(nearest.wide().double().numpy())


def test_the_factor_is_that_of_the_damped_hessians_inverse() -> None:
    x = np.random.default_rng(0).standard_normal((300, 90)) @ np.random.default_rng(1).standard_normal((90, 90))
    hessian = x.T @ x
    found = inverse_factor(torch.from_numpy(hessian).float()).double().numpy()
    damped = hessian + DAMPING * np.mean(np.diag(hessian)) * np.eye(90)
    expected = np.linalg.cholesky(np.linalg.inv(damped)).T
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    assert np.array_equal(found, np.triu(found))


def test_inputs_that_were_never_seen_do_not_stop_gptq() -> None:
    w = weight(4, 32)
    found = round_gptq(w, choose_scales(w, "int4", 32, "absmax"), "int4", torch.zeros(32, 32))
    assert torch.equal(found.values_NK, round_nearest(w, choose_scales(w, "int4", 32, "absmax"), "int4").values_NK)


def test_int4_is_packed_as_onnx_packs_it() -> None:
    values = torch.randint(-8, 8, (3, 10), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    packed = pack_int4(values)
    flat = values.numpy().astype(ml_dtypes.int4).view(np.uint8).reshape(-1) & 15
    assert np.array_equal(packed.numpy().reshape(-1), flat[0::2] | (flat[1::2] << 4))
    assert np.array_equal(unpack_int4(packed.numpy()).reshape(values.shape), values.numpy())
