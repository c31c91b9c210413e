"""Smoothing against the papers' formulas."""

import numpy as np
import torch

from arriero.calibration.presets import int4, int8
from arriero.calibration.product import ProductInput
from arriero.calibration.smoothing import SEARCHED_OUTPUTS, awq_exponents, output_error, search, smoothquant_exponents
from arriero.calibration.statistics import Statistics
from arriero.spec.choice import choose


def outliers() -> tuple[torch.Tensor, torch.Tensor]:
    """Activations with three channels a hundred times the others, and a weight."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 48, generator=generator)
    x[:, [3, 17, 40]] *= 100
    return x, torch.randn(24, 48, generator=generator)


def measured(x: torch.Tensor, recipe: object) -> ProductInput:
    source = ProductInput(Statistics("x", x.shape[1]), recipe)  # type: ignore[arg-type]
    source.statistics.update(x)
    return source


def test_smoothquants_factors_are_the_papers_to_a_power_of_two() -> None:
    x, w = outliers()
    largest_x, largest_w = x.abs().amax(0), w.abs().amax(0)
    for strength in (0.0, 0.3, 0.5, 1.0):
        factors = largest_x.double().numpy() ** strength / largest_w.double().numpy() ** (1 - strength)
        relative = np.log2(factors) - (np.log2(factors).max() + np.log2(factors).min()) / 2
        found = smoothquant_exponents(largest_x, largest_w, strength).numpy()
        assert np.abs(found - np.clip(relative, -10, 10)).max() <= 0.5 + 1e-5


def test_awqs_factors_are_the_papers_to_a_power_of_two() -> None:
    mean = outliers()[0].abs().mean(0)
    factors = mean.double().numpy() ** 0.6
    factors /= np.sqrt(factors.max() * factors.min())
    assert np.abs(awq_exponents(mean, 0.6).numpy() - np.log2(factors)).max() <= 0.5 + 1e-5


def test_a_channel_without_activations_is_left_alone() -> None:
    activation, weight = torch.tensor([0.0, 1.0, 64.0]), torch.ones(3)
    assert smoothquant_exponents(activation, weight, 0.5).tolist()[0] == 0
    assert awq_exponents(torch.zeros(3), 0.5).tolist() == [0, 0, 0]


def test_the_search_takes_the_strength_of_least_output_error() -> None:
    x, w = outliers()
    source = measured(x, int8())
    readers = [source.reader(w, choose(int8(activations="static"), "layers.0.self_attn.q_proj"))]

    def exponents_of(strength: float) -> torch.Tensor:
        return smoothquant_exponents(source.statistics.absmax_K, w.abs().amax(0), strength)

    exponents, strength = search(readers, exponents_of, None)
    assert strength is not None
    nothing = torch.zeros_like(exponents)
    assert output_error(readers, exponents) < 0.1 * output_error(readers, nothing)
    for other in (0.25, 0.5, 0.75):
        assert output_error(readers, exponents) <= output_error(readers, exponents_of(other))
    assert search(readers, exponents_of, 0.5)[1] == 0.5


def test_a_wide_linear_is_searched_over_outputs_from_its_first_to_its_last() -> None:
    x = outliers()[0]
    w = torch.randn(5 * SEARCHED_OUTPUTS, 48, generator=torch.Generator().manual_seed(1))
    w[1, 7] = 50.0  # of an output that is not searched
    source, choice = measured(x, int8()), choose(int8(activations="static"), "layers.0.self_attn.q_proj")
    reader = source.reader(w, choice)
    assert torch.equal(reader.weight_NK[[0, -1]], w[[0, -1]])
    assert len(reader.weight_NK) == SEARCHED_OUTPUTS
    assert torch.equal(reader.largest_K, w.abs().amax(0))

    def exponents_of(strength: float) -> torch.Tensor:
        return smoothquant_exponents(source.statistics.absmax_K, reader.largest_K, strength)

    chosen, _ = search([reader], exponents_of, None)
    every = [source.reader(part, choice) for part in w.split(SEARCHED_OUTPUTS)]
    errors = [output_error(every, exponents_of(strength)) for strength in (0.25, 0.4, 0.5, 0.6, 0.75, 0.9)]
    assert output_error(every, chosen) <= 1.02 * min(errors)


def test_weights_without_quantised_activations_gain_from_awq() -> None:
    x, w = outliers()
    x, w = torch.cat([x, x], 1)[:, :64], torch.cat([w, w], 1)[:, :64]
    source = measured(x, int4())
    readers = [source.reader(w, choose(int4(), "layers.0.self_attn.q_proj"))]
    exponents, _ = search(readers, lambda strength: awq_exponents(source.statistics.mean_K, strength), None)
    assert output_error(readers, exponents) < 0.7 * output_error(readers, torch.zeros_like(exponents))
