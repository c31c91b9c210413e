"""The soak of `benchmarks/soak.py` in short: it finds nothing wrong, and would."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import arriero
from arriero.runtime import Session
from arriero.runtime.backends.onnxruntime_decoder import HostCaches


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).parent.parent.parent / "benchmarks" / "soak.py"
    spec = importlib.util.spec_from_file_location("soak", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(script: ModuleType, model: Path, sequences: int) -> Any:
    plain = arriero.load(model, max_seq=512)
    keeping = Session(plain.decoder, plain.text, plain.defaults, plain.limits, prefix_bytes=script.PREFIX_BYTES)
    return script.soak(keeping, plain, sequences, seconds=0, slots=4, size=12, failing=0.01)


def test_sequences_join_and_leave_at_random_and_all_is_right(script: ModuleType, tiny_model: Path) -> None:
    found = run(script, tiny_model, 70)
    assert found.wrong == []
    assert found.ties <= 1
    assert found.sequences >= 70
    assert found.lost == 0
    assert found.failed > 0
    assert found.refused > 0
    assert found.called_off > 0
    assert found.reused > 0
    assert found.growth < 20e6


def test_a_soak_notices_rows_that_are_moved_wrongly(
    script: ModuleType, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HostCaches, "copy", lambda self, source, target, past: None)
    assert run(script, tiny_model, 25).wrong
