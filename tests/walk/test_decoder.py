"""The walk layer by layer against the whole model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from arriero.errors import CheckpointError
from arriero.export.checkpoint import open_checkpoint
from arriero.spec.geometry import ModelSpec
from arriero.walk.decoder import LayerWalk, embed, walk_layer
from arriero.walk.numbers import Weights


def opened(folder: Path) -> tuple[ModelSpec, Weights]:
    checkpoint = open_checkpoint(folder)
    return checkpoint.spec, Weights({shard.path.name: shard.path for shard in checkpoint.shards})


@pytest.mark.parametrize("seed", range(3))
def test_the_walk_equals_transformers_over_whole_sequences(
    make_llama4: Callable[..., Any], draw_overrides: Callable[[int], dict[str, Any]], tmp_path: Path, seed: int
) -> None:
    reference = make_llama4(seed, **draw_overrides(seed))
    reference.save_pretrained(tmp_path / "checkpoint", max_shard_size="100KB")
    spec, weights = opened(tmp_path / "checkpoint")
    ids = np.random.default_rng(seed).integers(0, 97, (3, 41))
    x = np.empty((3, 41, spec.hidden_size), dtype=np.float32)
    embed(weights, ids, x)
    with torch.no_grad():
        expected = reference.model(torch.from_numpy(ids), output_hidden_states=True).hidden_states
    for index in range(len(spec.layers)):
        assert np.abs(x - expected[index].numpy()).max() < 2e-5
        x = walk_layer(spec, index, weights, x)


def test_what_products_take_in_is_observed(checkpoint: Path) -> None:
    spec, weights = opened(checkpoint)
    x = np.random.default_rng(0).standard_normal((2, 33, spec.hidden_size)).astype(np.float32)
    seen: dict[str, int] = {}

    def observe(name: str, x_NK: torch.Tensor) -> None:
        seen[name] = seen.get(name, 0) + len(x_NK)

    walk_layer(spec, 0, weights, x, observe)
    assert set(seen.values()) == {66}
    assert set(seen) == {
        "attention_input", "attention_output", "keys", "values", "feed_input", "down_input",
        "expert_input", "expert_activated",
    }  # fmt: skip


def test_an_expert_that_sees_all_tokens_adds_only_those_that_chose_it(checkpoint: Path) -> None:
    spec, weights = opened(checkpoint)
    x = np.random.default_rng(0).standard_normal((2, 33, spec.hidden_size)).astype(np.float32)
    outputs = []
    for all_tokens in (False, True):
        walk = LayerWalk(spec, 0, weights, np.empty_like(x), np.empty_like(x))
        walk.attend(x)
        walk.feed()
        names = [f"feed_forward.experts.{name}_proj" for name in ("gate_up", "down")]
        for expert in range(spec.experts):
            walk.feed_expert(expert, *(walk.weight(name, expert) for name in names), all_tokens=all_tokens)
        outputs.append(walk.out)
    assert np.abs(outputs[0] - outputs[1]).max() < 1e-5


def test_a_missing_tensor_is_named(checkpoint: Path) -> None:
    _, weights = opened(checkpoint)
    with pytest.raises(CheckpointError, match=r"tensor 'layers\.9\.x' is in none of the weight files"):
        weights.wide("layers.9.x")
