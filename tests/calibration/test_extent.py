"""The default number of windows, and the time said before the work begins."""

import dataclasses
import time

import numpy as np
import pytest
from support.dense import peer, scout_like
from support.sparse import MAVERICK, SCOUT

from arriero.calibration import duration, fp8, int8
from arriero.calibration.duration import expected, expected_seconds, product_speed
from arriero.calibration.extent import default_windows, walk_operations
from arriero.export.config import model_spec
from arriero.walk.windows import window_length


@pytest.mark.parametrize(("config", "windows"), [(SCOUT, 2), (MAVERICK, 4), (peer("scout"), 73), (scout_like(2), 128)])
def test_a_default_text_suits_the_models_size(config: dict[str, object], windows: int) -> None:
    spec = model_spec(config)
    assert default_windows(spec, window_length(spec)) == windows


def test_experts_that_would_see_little_ask_for_more_text() -> None:
    spec = model_spec(MAVERICK)
    more = dataclasses.replace(spec, experts=256)
    assert default_windows(more, 1024) * 1024 == 256 * 256
    assert default_windows(more, 256) == 128


def test_a_tokens_operations_are_those_of_its_active_weights() -> None:
    spec = model_spec(SCOUT)
    layer = 5120 * 5120 * 2 + 5120 * 1024 * 2 + 5120 * 16 + 2 * 3 * 5120 * 8192
    assert walk_operations(spec) == pytest.approx(2 * 48 * layer, rel=1e-3)
    assert walk_operations(spec, all_experts=True) == pytest.approx(2 * 48 * (layer + 15 * 3 * 5120 * 8192), rel=1e-3)


def test_a_long_run_is_foretold_by_tokens_and_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duration, "product_speed", lambda threads=2: 40e9 * threads)
    spec, ids = model_spec(SCOUT), np.zeros((2, 10240), np.int64)
    said = expected(spec, int8(), ids)
    assert said is not None
    assert said.startswith("20,480 tokens in 2 windows: about 2.7 hours")
    assert expected_seconds(spec, int8(), 0) == pytest.approx(48 * 2.2e9 * 800 / 40e9, rel=0.05)  # on one core
    assert expected_seconds(spec, fp8(), ids.size) > 1.5 * expected_seconds(spec, int8(), ids.size)
    assert expected_seconds(spec, int8(), 2 * ids.size) > 1.5 * expected_seconds(spec, int8(), ids.size)
    assert expected(model_spec(scout_like(1, 256)), int8(), ids) is None


def test_the_speed_of_a_product_is_measured_in_a_moment() -> None:
    started = time.thread_time()
    assert 1e8 < product_speed() < 1e14
    assert time.thread_time() - started < 2
