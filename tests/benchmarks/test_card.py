"""The day a card is there, without one: what `make gpu` runs, keeps, and says in the end."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import card
import pytest
from executing_cuda import ExecutingCuda

from arriero.plugins.launch import Driver

SUITE = """<testsuites><testsuite>
<testcase classname="tests.one" name="holds"/>
<testcase classname="tests.one" name="breaks"><failure message="it broke"/></testcase>
<testcase classname="tests.one" name="waits"><skipped message="needs TensorRT"/></testcase>
</testsuite></testsuites>"""
ROW = {"op": "attention", "shape": "decode", "kind": "int8", "ours": 3.5}


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands of the steps, each of which writes a report; the last step takes too long."""
    found: list[list[str]] = []

    def run(command: list[str], **how: Any) -> Any:
        found.append(command)
        if len(found) == len(card.STEPS):
            raise subprocess.TimeoutExpired(command, how["timeout"])
        reports = [each.partition("=")[2] for each in command if each.startswith("--junitxml")]
        if reports:
            Path(reports[0]).write_text(SUITE)
        else:
            rows = [{**ROW, "is_right": True}, {**ROW, "kind": "FP8", "is_right": False}]
            Path(command[command.index("--json") + 1]).write_text(json.dumps({"device": "a card", "rows": rows}))
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(card.subprocess, "run", run)
    monkeypatch.setattr(card, "Driver", lambda: Driver(ExecutingCuda(90)))
    return found


def test_what_failed_is_said_last_and_all_is_kept(
    commands: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert card.main(["-o", str(tmp_path)]) == 1
    kept = json.loads((tmp_path / "gpu.json").read_text())
    assert kept["capability"] == 90
    assert [each["step"] for each in kept["steps"]] == [step.name for step in card.STEPS]
    assert kept["steps"][2]["figures"]["rows"][0]["ours"] == 3.5
    said = capsys.readouterr().out.partition("failed:")[2]
    assert said.count("tests.one.breaks") == sum(bool(step.tests) for step in card.STEPS)
    assert "attention, decode, FP8" in said
    assert "speed: took more than 30 minutes" in said
    assert "holds" not in said


def test_it_begins_with_what_pays_most(commands: list[list[str]], tmp_path: Path) -> None:
    card.main(["-o", str(tmp_path)])
    mended, plugins, kernels = commands[:3]
    assert [each for each in mended if "::" in each] == list(card.MENDED)
    assert "tests/plugins/test_captured_plugins.py" in plugins
    assert "benchmarks/old_kernels.py" in kernels


def test_the_mended_tests_are_five_that_there_are() -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-n", "0", "-m", "gpu", *card.MENDED]
    found = subprocess.run(command, cwd=card.ROOT, capture_output=True, text=True, check=True).stdout
    assert [line for line in found.splitlines() if "::" in line] == list(card.MENDED)
    assert len(card.MENDED) == 5


def test_no_test_runs_twice(commands: list[list[str]], tmp_path: Path) -> None:
    card.main(["-o", str(tmp_path)])
    names = [step.name for step in card.STEPS]
    others = commands[names.index("other tests")]
    left_out = {each.partition("=")[2] for each in others if each.startswith(("--ignore", "--deselect"))}
    assert left_out == {path for step in card.STEPS[: names.index("other tests")] for path in step.tests}
    experts = commands[names.index("expert kernels")]
    assert {each for each in experts if each.startswith("--deselect")} == {f"--deselect={each}" for each in card.MENDED}


def test_without_a_card_a_line_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr("ctypes.CDLL", missing)
    assert card.main([]) == 2
    assert "no NVIDIA driver here" in capsys.readouterr().err
