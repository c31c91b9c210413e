"""A short form of tests/fuzz/configs.py."""

import pytest
from config_mutations import mutated
from config_oracle import outcome


@pytest.mark.parametrize("seed", range(60))
def test_random_configurations_are_equal_or_refused_by_name(seed: int) -> None:
    config, changed = mutated(seed)
    found = outcome(config, changed, logits=seed % 6 == 0)
    assert found.kind in ("equal", "refused", "refused here"), f"{found}\n{config}"
