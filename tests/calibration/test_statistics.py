import numpy as np
import pytest
import torch

from arriero.calibration.statistics import Statistics, edges
from arriero.errors import CalibrationError


def test_pieces_add_up_to_the_whole() -> None:
    x = torch.randn(1000, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([1, 2, 4, 1e-3, 100, 0.0])
    statistics = Statistics("x", 6)
    for part in x.split(37):
        statistics.update(part)
    nothing = torch.zeros(6, dtype=torch.int32)
    assert torch.equal(statistics.absmax_K, x.abs().amax(0))
    assert torch.allclose(statistics.mean_K, x.abs().mean(0))
    expected, _ = np.histogram(x.abs().numpy().astype(np.float64), edges())
    found = statistics.histogram(nothing)
    assert np.array_equal(found[1:], expected[1:])
    assert found.sum() == x.numel()
    assert statistics.tokens == 1000


def test_dividing_channels_by_powers_of_two_equals_measuring_them_divided() -> None:
    x = torch.randn(500, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 8, 0.1, 50])
    exponents = torch.tensor([0, 3, -4, 6], dtype=torch.int32)
    before, after = Statistics("x", 4), Statistics("x", 4)
    before.update(x)
    after.update(x / torch.exp2(exponents.float()))
    nothing = torch.zeros(4, dtype=torch.int32)
    assert np.array_equal(before.histogram(exponents), after.histogram(nothing))
    assert before.absmax(exponents) == after.absmax(nothing)
    assert torch.equal(before.sample(exponents), after.sample(nothing))


def test_samples_are_spread_over_all_rows_and_bounded() -> None:
    statistics = Statistics("x", 1)
    for start in range(0, 100_000, 999):
        statistics.update(torch.arange(start, min(start + 999, 100_000), dtype=torch.float32)[:, None])
    rows = statistics.sample(torch.zeros(1, dtype=torch.int32))[:, 0]
    assert 128 <= len(rows) <= 256
    assert len(rows.diff().unique()) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_named(value: float) -> None:
    statistics = Statistics("layer 3: feed_input", 2)
    with pytest.raises(CalibrationError, match="layer 3: feed_input is NaN or infinite"):
        statistics.update(torch.tensor([[1.0, value]]))
