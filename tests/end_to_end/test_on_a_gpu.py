"""The whole GPU path but for TensorRT: real plugins, real kernels in the interpreter, over a driver that executes.

The tests take a pairwise sample; `make gpu-scenes` plays all.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from gpu_models import BOUNDS, VOCABULARY, make_model
from gpu_process import Gpu

IDS = np.random.default_rng(0).integers(3, VOCABULARY - 3, (3, 22)).tolist()


SHARES = {"bf16": 0.5, "fp16": 0.8, "int8": 0.0, "fp8": 0.0, "int4": 0.5}
"""Of the tokens, those whose two likeliest are more than twice the bound apart, at least: weights are random here."""


@pytest.fixture(scope="module")
def gpu() -> Iterator[Gpu]:
    process = Gpu()
    yield process
    process.close()


@pytest.fixture(scope="module")
def models(make_llama4: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {name: str(make_model(name, tmp_path_factory.mktemp("gpu") / name, make_llama4)) for name in BOUNDS}


@pytest.mark.parametrize("name", BOUNDS)
def test_logits_are_the_cpus_within_each_types_rounding(name: str, gpu: Gpu, models: dict[str, str]) -> None:
    found, expected = gpu.run("logits", model=models[name], ids=IDS[:2], lengths=[9, 20], decoded=2)
    apart = np.abs(found - expected).max(axis=1)
    # Where two experts are as good as equal, rounding chooses between them, and a row is another.
    assert np.mean(apart < BOUNDS[name]) >= 0.9
    assert np.median(apart) < BOUNDS[name] / 2


@pytest.mark.parametrize(
    ("name", "way", "graphs"),
    [
        ("bf16", "flight", True),
        ("fp16", "guesses", False),
        ("int8", "alone", True),
        ("fp8", "prefixes", True),
        ("int4", "alone", False),
    ],
)
def test_tokens_are_the_cpus_wherever_rounding_leaves_no_doubt(
    name: str, way: str, graphs: bool, gpu: Gpu, models: dict[str, str]
) -> None:
    prompts: list[list[int]] = [IDS[0], IDS[1][:5], IDS[2][:9]] if way == "flight" else [[*IDS[0][:6] * 3, 5]]
    if way == "prefixes":
        prompts *= 2
    given: dict[str, Any] = {"model": models[name], "graphs": graphs}
    found, reused, calls = gpu.run("texts", prompts=prompts, new=4, way=way, **given)
    rows = gpu.run("judged", prompts=prompts, found=found, bound=BOUNDS[name], **given)
    clear = [cpu == token for apart, cpu, token in rows if apart]
    assert len(clear) >= len(rows) * SHARES[name]
    assert all(clear)
    assert (calls.get("cuGraphLaunch", 0) > 0) == (graphs and way != "guesses")
    assert (max(reused) > 0) == (way == "prefixes")


def test_a_decode_step_makes_few_calls_and_allocates_nothing(gpu: Gpu, models: dict[str, str]) -> None:
    calls, allocated, seconds = gpu.run("step_cost", model=models["bf16"], batch=4, steps=200)
    assert calls == {
        "cuCtxSetCurrent": 1, "cuMemcpyHtoDAsync_v2": 1, "cuGraphLaunch": 1, "cuMemcpyDtoHAsync_v2": 1,
        "cuStreamSynchronize": 1,
    }  # fmt: skip
    assert allocated == 0
    assert seconds < 3e-4  # what the stand-in itself does is in it


def test_drawn_tokens_are_those_of_whole_rows(gpu: Gpu, models: dict[str, str]) -> None:
    found, expected = gpu.run("drawn", model=models["bf16"], ids=IDS[0][:6], seeds=3)
    assert found == expected


def test_offsets_beyond_32_bits_reach_their_slots(gpu: Gpu) -> None:
    near, far = gpu.run("far_slots")
    assert np.array_equal(near, far)
