"""Kernels beside an earlier commit's, without a card: which tree runs, and what stands beside what."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import old_kernels
import pytest

ROW = {"op": "experts", "shape": "8 tokens", "kind": "int8", "is_right": True, "ours": 4.0, "peer_us": 6.0}


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of two commits, whose benchmark says what it imports and takes 8 µs at the first and 4 then."""
    root = tmp_path / "arriero"
    (root / "benchmarks").mkdir(parents=True)
    for took in (8.0, 4.0):
        rows = [{**ROW, "ours": took}, {**ROW, "kind": "bf16" if took == 4 else "int4"}]
        (root / "__init__.py").write_text(f"TOOK = {took}")
        (root / "benchmarks" / "kernel_speed.py").write_text(
            f"import json, sys, arriero\nassert arriero.TOOK == {took}, arriero.__file__\n"
            f"assert '--quick' in sys.argv\n"
            f"open(sys.argv[-1], 'w').write({json.dumps(json.dumps({'device': 'a card', 'rows': rows}))})\n"
        )
        author = ["-c", "user.name=a", "-c", "user.email=a@b"]
        for command in (["init", "-q"], ["add", "-A"], [*author, "commit", "-qm", "a state"]):
            subprocess.run(["git", *command], cwd=root, check=True)
    monkeypatch.setattr(old_kernels, "ROOT", root)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return root


def test_rows_stand_beside_those_of_the_earlier_commit(tree: Path, tmp_path: Path) -> None:
    report = tmp_path / "found.json"
    assert old_kernels.main(["--commit", "HEAD~1", "--quick", "--json", str(report)]) == 0
    found: dict[str, Any] = json.loads(report.read_text())
    assert found["device"] == "a card"
    assert [(row["kind"], row["ours"], row["before_us"], row["before_peer_us"]) for row in found["rows"]] == [
        ("int8", 4.0, 8.0, 6.0),
        ("bf16", 4.0, None, None),
    ]


def test_without_the_commit_the_kernels_of_now_run_alone(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert old_kernels.main(["--commit", "dcb44b8", "--quick"]) == 0
    assert "no commit dcb44b8 here" in capsys.readouterr().out


def test_a_benchmark_that_ends_early_is_a_failure(tree: Path) -> None:
    (tree / "benchmarks" / "kernel_speed.py").write_text("raise SystemExit('an illegal access')")
    assert old_kernels.main(["--commit", "HEAD", "--quick"]) == 1


@pytest.mark.skipif(not (old_kernels.ROOT / ".git").exists(), reason="needs the repository's history")
def test_the_old_commit_has_the_benchmark(tmp_path: Path) -> None:
    root = old_kernels.take_out(old_kernels.BEFORE, tmp_path)
    if root is None:
        pytest.skip("this clone has no such commit")
    command = [sys.executable, "benchmarks/kernel_speed.py", "--help"]
    said = subprocess.run(command, cwd=root, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True).stdout
    assert all(option in said for option in ("--quick", "--seconds", "--json"))
