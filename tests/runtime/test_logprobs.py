import numpy as np
import pytest
import torch

from arriero.runtime.logprobs import read_logprobs


@pytest.mark.parametrize("scale", [0.01, 3.0, 40.0])
def test_logprobs_are_those_of_a_log_softmax(scale: float) -> None:
    logits_V = (np.random.default_rng(6).normal(size=3000) * scale).astype(np.float32)
    expected_V = torch.from_numpy(logits_V).double().log_softmax(-1)
    values, tokens = expected_V.topk(20)
    found = read_logprobs(logits_V, 1234, 20)
    assert found.logprob == pytest.approx(float(expected_V[1234]), abs=1e-5)
    assert [token for token, _ in found.top] == tokens.tolist()
    assert [value for _, value in found.top] == pytest.approx(values.tolist(), abs=1e-5)
    assert read_logprobs(logits_V, 5, 0).top == ()


def test_of_equals_the_lower_id_comes_first() -> None:
    found = read_logprobs(np.zeros(6, np.float32), 3, 4)
    assert [token for token, _ in found.top] == [0, 1, 2, 3]
    assert found.logprob == pytest.approx(-np.log(6))
    assert len(read_logprobs(np.zeros(6, np.float32), 3, 20).top) == 6
