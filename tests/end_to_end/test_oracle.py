"""The exported graph on ONNX Runtime against `transformers`, on checkpoints it was not written for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import arriero
from arriero.export import export_checkpoint
from arriero.runtime.backends.onnxruntime_decoder import OnnxRuntimeDecoder

LENGTHS = (50, 13, 27)
"""Tokens of the three rows; the chunk is 16, so the first crosses three boundaries."""


@pytest.fixture(scope="module", params=[(kind, seed) for kind in ("scout", "maverick") for seed in range(3)], ids=str)
def pair(
    request: pytest.FixtureRequest,
    make_llama4: Callable[..., Any],
    maverick_like: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Any, Path]:
    kind, seed = request.param
    shape = {"num_attention_heads": 2 * (seed + 1), "num_local_experts": 2 ** (seed + 1), "num_hidden_layers": 4 + seed}
    shape["num_experts_per_tok"] = 2 if seed == 1 else 1
    reference = make_llama4(seed, **shape, **(maverick_like if kind == "maverick" else {}))
    folder = tmp_path_factory.mktemp(kind)
    reference.save_pretrained(folder / "checkpoint", max_shard_size="100KB")
    return reference, export_checkpoint(folder / "checkpoint", folder / "model")


def rows_of(reference: Any) -> tuple[np.ndarray[Any, Any], list[np.ndarray[Any, Any]]]:
    """A ragged batch and what `transformers` says of each row by itself."""
    ids = torch.randint(0, 97, (3, max(LENGTHS)), generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        expected = [reference(ids[row : row + 1, :length]).logits[0].numpy() for row, length in enumerate(LENGTHS)]
    return ids.numpy(), expected


@pytest.mark.parametrize("longest_piece", [512, 7, 1], ids=["full prefill", "pieces of 7", "token by token"])
def test_logits_equal_those_of_transformers(
    pair: tuple[Any, Path], longest_piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, model = pair
    ids, expected = rows_of(reference)
    monkeypatch.setattr(OnnxRuntimeDecoder, "longest_with_logits", longest_piece)
    found = arriero.load(model).logits(ids, LENGTHS)
    for row, length in enumerate(LENGTHS):
        assert np.abs(found[row, :length] - expected[row]).max() <= 1e-5
        assert not found[row, length:].any()


def test_a_ragged_batch_decodes_as_transformers_does(pair: tuple[Any, Path]) -> None:
    reference, model = pair
    ids, expected = rows_of(reference)
    session = arriero.load(model)
    state = session.start(3)
    steps = 12
    logits = session.prefill(state, [ids[row, : length - steps].tolist() for row, length in enumerate(LENGTHS)])
    for step in range(steps + 1):
        at = [length - steps - 1 + step for length in LENGTHS]
        assert max(np.abs(logits[row] - expected[row][at[row]]).max() for row in range(3)) <= 1e-5
        if step < steps:
            logits = session.decode(state, [int(ids[row, at[row] + 1]) for row in range(3)])


def test_greedy_tokens_equal_those_of_transformers(pair: tuple[Any, Path]) -> None:
    reference, model = pair
    prompt = list(range(3, 23))  # without 2, the pad token, which `generate` would mask
    expected = reference.generate(torch.tensor([prompt]), max_new_tokens=60, do_sample=False, eos_token_id=None)
    found = arriero.load(model).generate(prompt, max_new_tokens=60, temperature=0, eos_token_id=[])
    assert found.ids == expected[0, len(prompt) :].tolist()
