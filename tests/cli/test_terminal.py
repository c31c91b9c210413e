"""Messages, details and errors on stderr, as many as the user asks for."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from json_keys import documented
from typer.testing import CliRunner

import arriero
from arriero.cli.app import VERBS, app
from arriero.cli.terminal import Terminal, one_line
from arriero.errors import FolderError


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        (("export", "x", "-o", "y"), "arriero[export]"),
        (("calibrate", "x", "-o", "y", "--recipe", "int8", "--data", "z"), "arriero[calibration]"),
        (("build", "x", "-o", "y"), "arriero[export]"),
        (("build", "x", "-o", "y", "--target", "tensorrt-rtx:sm89"), "arriero[tensorrt]"),
        (("bench", "x", "-o", "y"), "arriero[check]"),
        (("check", "x", "--against", "y"), "arriero[accuracy]"),
        (("golden", "x", "-o", "y", "--data", "z"), "arriero[accuracy]"),
        (("run", "x", "--prompt", "y"), "arriero[export]"),
        (("inspect", "x"), "arriero[export]"),
    ],
)
def test_a_missing_module_is_answered_with_the_extra_of_the_verb(command: tuple[str, ...], extra: str) -> None:
    rooms = ("export", "calibration", "engine", "measuring.bench", "measuring.summary", "accuracy", "loading")
    code = (
        "import sys\n"
        f"for room in {rooms}: sys.modules['arriero.' + room] = None\n"
        "from arriero.cli.app import main\n"
        f"sys.argv = ['arriero', *{command}]\n"
        "main()"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.endswith(f"this verb needs it, pip install '{extra}'\n")
    assert run.stderr.count("\n") == 1


def test_the_extras_exist() -> None:
    text = (Path(arriero.__file__).parent / "pyproject.toml").read_text("utf-8")
    extras = text.partition("[project.optional-dependencies]")[2].partition("[project.scripts]")[0]
    assert all(f"\n{extra} = [" in extras for extra in ("export", "calibration", "tensorrt", "accuracy"))
    assert "matplotlib" in extras.partition("\ncheck = [")[2].partition("]\n")[0]  # which `bench -o` needs


def test_errors_are_one_line_with_a_remedy() -> None:
    assert one_line(FolderError("a\n  b: do c"), "") == "a b: do c"
    assert "convert it first" in one_line(UnicodeDecodeError("utf-8", b"\xff", 0, 1, "x"), "")
    assert one_line(KeyError("k"), "") == "internal error, KeyError: 'k' (--debug shows where)"


def test_quiet_leaves_errors_and_verbose_adds_details(capsys: pytest.CaptureFixture[str]) -> None:
    for terminal in (Terminal(quiet=True), Terminal(), Terminal(verbose=True)):
        with terminal.errors_shown(), terminal.progress_shown("Working") as progress:
            terminal.say("said")
            terminal.detail("detailed")
            progress("cutting", 0, 2)
            progress("cutting", 1, 2)
            progress("sewing", 2, 2)
        with pytest.raises(typer.Exit), terminal.errors_shown():
            raise FolderError("torn: sew it")
    lines = [line.partition(": ")[0] for line in capsys.readouterr().err.splitlines()]
    quiet, usual = ["arriero"], ["said", "arriero"]
    assert lines == [*quiet, *usual, "said", "detailed", "Working cutting", "Working sewing", "arriero"]


def test_off_a_terminal_there_is_a_line_every_30_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr("arriero.cli.terminal.time.monotonic", lambda: clock[0])
    for quiet in (False, True):
        with Terminal(quiet=quiet).progress_shown("Calibrating") as progress:
            for second in range(0, 100, 10):
                clock[0] += 10
                progress("layer 3", second, 100)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "Calibrating layer 3: 20%, about 120 s left".replace("120 s", "2 min"),
        "Calibrating layer 3: 50%, about 60 s left",
        "Calibrating layer 3: 80%, about 22 s left",
    ]


@pytest.mark.parametrize(
    ("module", "verb", "extra"),
    [
        ("matplotlib", "accuracy", "check"),
        ("matplotlib", "calibration", "calibration"),
        ("torch", "accuracy", "accuracy"),
        ("onnx.checker", "export", "export"),
        ("pyarrow", "calibration", "parquet"),
        ("lm_eval", "accuracy", "evaluation"),
    ],
)
def test_the_smallest_extra_that_brings_a_module_is_named(module: str, verb: str, extra: str) -> None:
    assert f"pip install 'arriero[{extra}]'" in one_line(ModuleNotFoundError("x", name=module), verb)


def test_warnings_are_messages(recwarn: pytest.WarningsRecorder) -> None:
    import warnings

    for quiet in (True, False):
        with Terminal(quiet=quiet).errors_shown():
            warnings.warn("old", UserWarning, stacklevel=1)
            assert len(recwarn) == (not quiet)


@pytest.mark.parametrize("verb", [verb.__name__ for verb in VERBS])
def test_every_verb_is_quiet_or_verbose_and_not_both(verb: str) -> None:
    shown = CliRunner().invoke(app, [verb, "--help"]).stdout
    assert "--quiet" in shown
    assert "--verbose" in shown


def test_both_are_refused() -> None:
    run = CliRunner().invoke(app, ["inspect", "x", "--quiet", "--verbose"])
    assert run.exit_code == 2
    assert "contradict" in run.stderr


def test_quiet_says_nothing_where_all_is_well_and_results_stay(tiny_model: Path) -> None:
    prompt = ["run", str(tiny_model), "--prompt", "The for statement", "--max-new-tokens", "5", "--temperature", "0"]
    quiet, usual, verbose = (CliRunner().invoke(app, [*prompt, *more]) for more in (["--quiet"], [], ["--verbose"]))
    assert quiet.stderr == ""
    assert quiet.stdout == usual.stdout == verbose.stdout != ""
    assert "tokens/s" in usual.stderr
    assert "loaded in" in verbose.stderr
    found = json.loads(CliRunner().invoke(app, [*prompt, "--json"]).stdout)
    assert set(found) | {"logprobs"} == documented("run")


def test_a_written_folder_is_listed_where_asked_for(tiny_model: Path, tmp_path: Path) -> None:
    build = ["build", str(tiny_model), "-o"]
    quiet = CliRunner().invoke(app, [*build, str(tmp_path / "quiet"), "--quiet", "--json"])
    assert quiet.stderr == ""
    assert set(json.loads(quiet.stdout)) == documented("written")
    verbose = CliRunner().invoke(app, [*build, str(tmp_path / "verbose"), "--verbose"]).stderr
    assert str(tmp_path / "verbose" / "spec.json") in verbose
    assert verbose.splitlines()[-1].startswith("Wrote ")
