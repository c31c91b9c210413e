"""The fuzz of `tests/fuzz/files.py` in short: damaged files of every format, and it would notice trouble."""

from pathlib import Path

import pytest
from hostile_batches import run_cases
from hostile_files import KINDS, outcome, write_bases

from arriero.engine import build_bundle


@pytest.fixture(scope="module")
def base(tiny_model: Path, multimodal_model: Path, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    bundle = build_bundle(tiny_model, folder / "bundle")
    seeing = build_bundle(multimodal_model, folder / "seeing")
    (folder / "base").mkdir()
    write_bases(folder / "base", tiny_model, bundle, seeing, tiny, None)
    return folder / "base"


def test_damaged_files_are_taken_or_refused_in_a_line(base: Path) -> None:
    counts, troubles = run_cases(base, seed=7, first=0, last=2 * len(KINDS))
    assert troubles == []
    assert counts.total() == 2 * len(KINDS)
    assert sum(count for (_, found), count in counts.items() if found == "refused") > len(KINDS) / 2


def test_good_files_are_taken(base: Path) -> None:
    for name in (
        "safetensors",
        "config.json",
        "index",
        "layers.json",
        "spec.json of an engine",
        "image.png",
        "rows",
        "limits",
        "a draft's config.json",
        "prompts",
        "keys",
    ):
        assert outcome(KINDS[name], base / KINDS[name].base, None) == "taken", name
