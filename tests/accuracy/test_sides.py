"""A check of a bundle against a golden file needs the runtime alone: neither PyTorch nor onnx."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from arriero.accuracy import check, record_golden
from arriero.accuracy.sides.side import chosen_by
from arriero.engine import build_bundle
from arriero.errors import DataError

HEAVY = {"ml_dtypes", "onnx", "onnx_ir", "onnxscript", "torch", "transformers"}


def output_of(code: str, *arguments: str | Path) -> str:
    run = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(run, check=True, capture_output=True, text=True).stdout


def test_a_check_imports_no_torch_onnx_or_transformers() -> None:
    code = "import sys, arriero.accuracy, arriero.accuracy.report, arriero.accuracy.sides.folder_side"
    assert not output_of(f"{code}\nprint(*({HEAVY} & set(sys.modules)))").split()


def test_a_bundle_is_checked_where_neither_torch_nor_onnx_is(
    tiny_model: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    golden = record_golden(tiny_model, tmp_path / "golden.safetensors", data=[texts[0]], samples=2)
    bundle = build_bundle(tiny_model, tmp_path / "bundle", target="cpu")
    code = f"import sys\nsys.modules.update(dict.fromkeys({HEAVY}))\n"  # as if they were not installed
    code += "import json\nfrom arriero.accuracy import check\nprint(json.dumps(check(*sys.argv[1:]).as_fields()))"
    alone, here = json.loads(output_of(code, bundle, golden)), check(bundle, golden).as_fields()
    assert here["metrics"].pop("router_flips")["value"] == 0
    assert alone["metrics"] == here["metrics"]
    assert alone["notes"] == ["The choice of experts cannot be seen without onnx: router flips are not told."]
    assert not here["notes"]
    command = "import sys\nfrom arriero.cli.app import main\nsys.argv = ['arriero', 'check', *sys.argv[1:]]\nmain()"
    code = f"import sys\nsys.modules.update(dict.fromkeys({HEAVY}))\n{command}"
    options = ["--against", golden, "--history", tmp_path / "h.jsonl", "-o", tmp_path / "report", "--quiet"]
    run = subprocess.run([sys.executable, "-c", code, bundle, *options], capture_output=True, text=True)
    assert run.returncode == 3, run.stderr  # two windows are not enough data to tell
    assert "record the golden file over more than its 2 windows" in run.stdout
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"verdict.json", "junit.xml", "report.html"}
    assert len((tmp_path / "h.jsonl").read_text().splitlines()) == 1


def test_a_fine_tune_in_the_hubs_cache_without_a_tokenizer_is_read_with_the_candidates(
    tiny: Path, tiny_model: Path, texts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "hub" / "models--me--tune" / "snapshots" / "a1"
    snapshot.mkdir(parents=True)
    (refs := snapshot.parent.parent / "refs").mkdir()
    (refs / "main").write_text("a1")
    for file in [tiny / "config.json", *tiny.glob("*.safetensors*")]:
        shutil.copy(file, snapshot)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    verdict = check(tiny_model, "me/tune", data=[texts[0]], samples=1, window=300)
    assert verdict.metrics["kl"].value < 1e-6
    with pytest.raises(DataError, match=r"no tokenizer.json: copy the tokenizer's files into it, or give the model"):
        record_golden("me/tune", tmp_path / "golden", data=[texts[0]], samples=1)


def test_routers_choose_the_largest_logits_and_of_equal_ones_the_first() -> None:
    logits_LNE = np.array([[[0.0, 2.0, 2.0, 2.0], [1.0, 0.0, 3.0, 2.0]]], np.float32)
    assert chosen_by(logits_LNE, 2).tolist() == [[[1, 2], [2, 3]]]
