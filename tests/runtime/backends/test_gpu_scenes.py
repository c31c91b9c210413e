"""Sessions on a GPU that is not there: everything but TensorRT is real, and kernels run in Triton's interpreter.

`benchmarks/gpu_scenes.py` plays every precision in every way; here is each precision in one, and each way.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from gpu_models import Judged, make_model
from gpu_process import Gpu
from sure_llama4 import sequences

ROWS = sequences(3, 2, 30)
LONG, SHORT = ROWS[0][:20], ROWS[1][:5]
"""The first is longer than a piece and than a chunk, which is what is kept of a beginning, and its tokens begin to come
again, so that there is something to guess."""

SCENES = [
    ("bf16", "alone", True),
    ("fp16", "flight", False),
    ("int8", "prefixes", True),
    ("fp8", "guesses", True),
    ("int4", "flight", True),
]


@pytest.fixture(scope="module")
def gpu() -> Iterator[Gpu]:
    made = Gpu()
    yield made
    made.close()


@pytest.fixture(scope="module")
def models(make_llama4: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Judged]:
    return functools.cache(lambda name: make_model(name, tmp_path_factory.mktemp(name), make_llama4))


@pytest.mark.parametrize(("precision", "way", "graphs"), SCENES, ids=["-".join(map(str, scene)) for scene in SCENES])
def test_tokens_are_the_cpus_wherever_rounding_cannot_change_them(
    gpu: Gpu, models: Callable[[str], Judged], precision: str, way: str, graphs: bool
) -> None:
    model, bound, _ = models(precision)
    given = {"model": model, "graphs": graphs}
    prompts = [LONG, LONG] if way == "prefixes" else [LONG, SHORT]
    found, reused, calls = gpu.run("texts", prompts=prompts, new=4, way=way, **given)
    apart, behind = np.array(gpu.run("judged", prompts=prompts, found=found, **given)).T
    clear = apart > 2 * bound
    assert np.mean(clear) >= 0.9
    assert not behind[clear].any()
    assert behind.max() <= 2 * bound  # the CPU's token, or one that rounding may put first
    assert all(len({*new}) > 1 for new in found)
    assert any(reused) == (way == "prefixes")
    assert ("cuGraphLaunch" in calls) == graphs or way == "flight"


@pytest.mark.parametrize(
    ("precision", "placement"),
    [
        ("bf16", "inside"),
        ("bf16", "outside"),
        ("fp16", "experts"),
        ("int8", "outside"),
        ("fp8", "experts"),
        ("int4", "inside"),
        ("int4", "outside"),
    ],
)
def test_logits_lie_within_the_bound(gpu: Gpu, models: Callable[[str], Judged], precision: str, placement: str) -> None:
    model, bound, deviation = models(precision)
    given = {"ids": ROWS, "lengths": [18, 9], "decoded": 2}
    found, expected = gpu.run("logits", model=model, placement=placement, **given)
    assert np.abs(found - expected).max() < bound
    assert np.sqrt(np.mean((found - expected) ** 2)) < deviation


def test_a_step_with_a_graph_is_a_few_calls_and_allocates_nothing(gpu: Gpu, models: Callable[[str], Judged]) -> None:
    calls, allocated, _ = gpu.run("step_cost", model=models("bf16").folder, batch=2, steps=5)
    assert sum(calls.values()) <= 10, calls
    assert calls["cuGraphLaunch"] == 1
    assert allocated == 0


def test_launches_that_begin_early_give_the_same_tokens(gpu: Gpu, models: Callable[[str], Judged]) -> None:
    given = {"model": models("int8").folder, "prompts": [SHORT], "new": 3, "way": "alone"}
    found, _, calls = gpu.run("texts", capability=90, **given)
    expected, _, plain = gpu.run("texts", capability=89, **given)
    assert found == expected
    assert calls["early"] > 0
    assert "early" not in plain


def test_a_change_of_shape_runs_once_and_is_captured_when_it_comes_again(
    gpu: Gpu, models: Callable[[str], Judged]
) -> None:
    cost = gpu.run("host_cost.shape_cost", model=models("bf16").folder, batch=5)
    calls = {name: count for name, (_, count) in cost.items()}
    launches = 2 * (1 + 2) + 2  # attention and experts of each layer, and the shortlist
    assert calls["known"] == calls["back"] == 5
    assert calls["new"] == calls["elsewhere"] == calls["known"] - 1 + launches
    assert calls["new, again"] == calls["elsewhere, again"] == calls["new"] + 5  # begun, ended, made, freed; launched
