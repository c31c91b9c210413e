"""GPTQ against the formulas of its paper in float64, through few rows and through the sum of their outer products."""

import numpy as np
import pytest
import torch

from arriero.calibration import gptq, outer_products
from arriero.calibration.gptq import DAMPING, find_corrections, inverse_factor, round_gptq
from arriero.calibration.moved_weight import MovedWeight
from arriero.calibration.outer_products import OuterProducts
from arriero.calibration.rounding import Rounded, choose_scales, round_nearest

CHANNELS = 160


def weight(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))


def inputs(rows: int, columns: int = CHANNELS) -> np.ndarray:
    mixed = np.random.default_rng(1).standard_normal((columns, columns))
    return np.asarray(np.random.default_rng(0).standard_normal((rows, columns)) @ mixed)


def products_of(x: np.ndarray) -> OuterProducts:
    """The outer products of some rows, given in two parts."""
    products, nothing = OuterProducts(x.shape[1]), torch.zeros(x.shape[1], dtype=torch.int32)
    for part in np.array_split(x, 2):
        products.update(torch.from_numpy(part).float())
    return products.divided(nothing)


def rounded(w: torch.Tensor, scales: torch.Tensor, kind: str, x: np.ndarray) -> Rounded:
    lies = MovedWeight(w, torch.zeros(w.shape[1], dtype=torch.int32))
    return round_gptq(lies, scales, kind, find_corrections(products_of(x)))


def brain_quantised(w: np.ndarray, scales: np.ndarray, kind: str, x: np.ndarray) -> np.ndarray:
    """Frantar et al. 2022, eqs. 2 and 3: round a column, spread its error, take it out of the inverse Hessian."""
    hessian = x.T @ x
    damped = hessian + DAMPING * np.mean(np.diag(hessian)) * np.eye(len(hessian))
    left, values, inverse = w.copy(), np.zeros_like(w), np.linalg.inv(damped)
    for column in np.argsort(-np.diag(hessian), kind="stable"):
        exact = torch.from_numpy(left[:, column] / scales[:, column])[:, None].float()
        values[:, column] = round_nearest(exact, torch.ones(len(w), 1), kind).values_NK.float()[:, 0].numpy()
        error = (left[:, column] - values[:, column] * scales[:, column]) / inverse[column, column]
        left -= np.outer(error, inverse[column])
        inverse -= np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return values


@pytest.mark.parametrize(("kind", "group"), [("int4", 32), ("int8", CHANNELS), ("fp8", CHANNELS)])
@pytest.mark.parametrize("rows", [30, 400], ids=["few rows", "many rows"])
def test_gptq_equals_optimal_brain_quantisation_column_by_column(rows: int, kind: str, group: int) -> None:
    w, x = weight(5, CHANNELS), inputs(rows)
    assert (products_of(x).sum_KK is None) == (rows == 30)
    scales = choose_scales(w, kind, group, "absmax")
    wide_scales = np.repeat(scales.numpy(), group, axis=1).astype(np.float64)
    found = rounded(w, scales, kind, x)
    values = brain_quantised(w.double().numpy(), wide_scales, kind, x)
    assert np.mean(found.values_NK.float().numpy() != values) < 0.01

    def loss(wide: np.ndarray) -> float:
        return float(np.sum((x @ (wide - w.double().numpy()).T) ** 2))

    exact = loss(values * wide_scales)
    assert loss(found.wide().double().numpy()) < 1.05 * exact
    assert exact < 0.5 * loss(round_nearest(w, scales, kind).wide().double().numpy())


def test_both_ways_of_one_input_round_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    w, x = weight(40, 700), inputs(170, 700)
    scales = choose_scales(w, "fp8", 700, "absmax")
    few = rounded(w, scales, "fp8", x)
    monkeypatch.setattr(outer_products, "FEW", 8)
    assert products_of(x).sum_KK is not None
    many = rounded(w, scales, "fp8", x)
    losses = [float((torch.from_numpy(x).float() @ (each.wide() - w).T).square().sum()) for each in (few, many)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert (few.values_NK.float() != many.values_NK.float()).float().mean() < 0.1  # values near a border fall otherwise


def test_a_layers_moved_weight_is_what_is_rounded() -> None:
    """The exponents of the input and of the output channels are taken in before anything is rounded."""
    w, x = weight(12, CHANNELS), inputs(400)
    generator = torch.Generator().manual_seed(3)
    to_k, to_n = (torch.randint(-2, 3, (size,), generator=generator, dtype=torch.int32) for size in (CHANNELS, 12))
    moved = w * torch.exp2(to_k.float()) / torch.exp2(to_n.float())[:, None]
    scales = choose_scales(moved, "int4", 32, "absmax")
    expected = rounded(moved, scales, "int4", x)
    for stored in (w, w.T.contiguous().T):
        found = round_gptq(MovedWeight(stored, to_k, to_n), scales, "int4", find_corrections(products_of(x)))
        assert torch.equal(found.values_NK, expected.values_NK)


@pytest.mark.parametrize("panel", [1024, 32])
def test_a_sum_is_of_all_rows_and_divided_by_its_exponents(panel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outer_products, "PANEL", panel)
    x, products = torch.from_numpy(inputs(400)).float(), OuterProducts(CHANNELS)
    for part in x.split(17):
        products.update(part)
    exponents = torch.arange(CHANNELS, dtype=torch.int32) % 5 - 2
    divided = (x / torch.exp2(exponents.float())).double()
    found = products.divided(exponents)
    assert found.sum_KK is not None
    assert torch.allclose(found.sum_KK.double(), divided.T @ divided, rtol=1e-4, atol=1e-2)
    assert torch.allclose(found.diagonal_K.double(), divided.square().sum(0), rtol=1e-4)
    few = OuterProducts(CHANNELS)
    few.update(x[:30])
    assert torch.allclose(few.divided(exponents).diagonal_K.double(), divided[:30].square().sum(0), rtol=1e-4)


@pytest.mark.parametrize("smallest", [512, 16], ids=["whole", "by quarters"])
def test_the_factor_is_that_of_the_damped_hessians_inverse(smallest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq, "SMALLEST", smallest)
    x = inputs(300, 90)
    hessian = x.T @ x
    damping = DAMPING * np.mean(np.diag(hessian))
    found = inverse_factor(torch.from_numpy(hessian).float(), torch.tensor(damping)).double().numpy()
    expected = np.linalg.cholesky(np.linalg.inv(hessian + damping * np.eye(90))).T
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    assert np.array_equal(found, np.triu(found))


@pytest.mark.parametrize("rows", [0, 3, 400])
def test_inputs_that_were_never_seen_do_not_stop_gptq(rows: int) -> None:
    w = weight(4, 32)
    scales = choose_scales(w, "int4", 32, "absmax")
    found = rounded(w, scales, "int4", np.zeros((rows, 32)))
    assert torch.equal(found.values_NK, round_nearest(w, scales, "int4").values_NK)
