"""Each GPU kernel finds what lies beyond 2^32 elements: caches of 10 M positions, Maverick's experts, many rows."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from gpu_process import Gpu


@pytest.fixture(scope="module")
def gpu() -> Iterator[Gpu]:
    made = Gpu()
    yield made
    made.close()


def play(gpu: Gpu, scene: str, **given: Any) -> None:
    near, far = gpu.run(f"far_offsets.{scene}", **given)
    assert near.any()
    np.testing.assert_array_equal(near, far)


@pytest.mark.parametrize("form", ["one", "few", "some", "many"])
def test_attention_finds_slots(gpu: Gpu, form: str) -> None:
    play(gpu, "slots", form=form)


@pytest.mark.parametrize("way", ["few", "some", "many"])
@pytest.mark.parametrize("kind", ["none", "int8", "fp8", "int4"])
def test_experts_find_weights_and_tokens(gpu: Gpu, kind: str, way: str) -> None:
    play(gpu, "experts", kind=kind, way=way, group=128 if kind == "int4" else 0)


@pytest.mark.parametrize("way", ["few", "many"])
def test_a_tokens_several_experts_are_added_up(gpu: Gpu, way: str) -> None:
    play(gpu, "experts", kind="int8", way=way, top_k=2)


def test_shortlists_find_rows(gpu: Gpu) -> None:
    play(gpu, "logits")
