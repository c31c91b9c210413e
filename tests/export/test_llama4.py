"""Our PyTorch Llama 4 against the one of `transformers`."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import Llama4ForCausalLM

from arriero.export.config import model_spec
from arriero.export.llama4 import Cache, Llama4, inverse_frequencies

Make = Callable[..., Llama4ForCausalLM]
LENGTHS = (1, 3, 7, 16, 33, 50)


def ours_of(reference: Llama4ForCausalLM, dtype: str) -> Llama4:
    reference.config.dtype = dtype
    model = Llama4(model_spec(json.loads(reference.config.to_json_string()))).to(getattr(torch, dtype)).eval()
    model.load_state_dict(reference.state_dict(), strict=True)
    return model


@pytest.mark.parametrize("seed", range(24))
def test_it_equals_transformers_over_random_geometries(
    make_llama4: Make, draw_overrides: Callable[[int], dict[str, Any]], seed: int
) -> None:
    reference = make_llama4(seed, **draw_overrides(seed))
    generator = torch.Generator().manual_seed(seed)
    length = LENGTHS[seed % len(LENGTHS)]
    ids = torch.randint(0, 97, (1 + seed % 3, length), generator=generator)
    with torch.no_grad():
        expected, found = reference(ids).logits, ours_of(reference, "float32")(ids)
        assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()
        reference = reference.bfloat16()
        expected, found = reference(ids).logits, ours_of(reference, "bfloat16")(ids)
    if length == 1:  # transformers' batched product takes another kernel for a single token
        assert torch.allclose(found, expected, atol=2**-6 * float(expected.abs().max()))
    else:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["scout", "maverick"])
def test_cached_steps_equal_whole_sequences(make_llama4: Make, maverick_like: dict[str, Any], kind: str) -> None:
    model = ours_of(make_llama4(**(maverick_like if kind == "maverick" else {})), "float32")
    spec = model.spec
    ids = torch.arange(40)[None] % spec.vocab_size
    caches = []
    for layer in spec.layers:
        shape = (1, spec.kv_heads, layer.chunk or 40, spec.head_dim)
        caches.append((torch.zeros(shape), torch.zeros(shape)))
    with torch.no_grad():
        expected = model(ids)
        outputs = []
        for start, end in ((0, 10), (10, 16), (16, 32), (32, 33), (33, 40)):
            x = model.model.embed_tokens(ids[:, start:end])
            for index, layer in enumerate(model.model.layers):
                past = torch.tensor([start], dtype=torch.int32)
                x, cache = layer(x, Cache(*caches[index], past))
                caches[index] = (cache.key, cache.value)
            outputs.append(model.lm_head(model.model.norm(x)))
    assert torch.allclose(torch.cat(outputs, 1), expected, atol=1e-5)


def test_equal_scaling_factors_leave_nothing_between(make_llama4: Make) -> None:
    spec = ours_of(make_llama4(), "float32").spec
    assert spec.rope_scaling is not None
    assert spec.rope_scaling.low_freq_factor == spec.rope_scaling.high_freq_factor
    assert torch.isfinite(inverse_frequencies(spec)).all()
