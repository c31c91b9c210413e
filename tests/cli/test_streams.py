"""Standard streams as shells leave them: closed, full, without a reader, ASCII; the verdict's code stays."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from arriero.cli.streams import as_utf8, plain, read_option
from arriero.cli.terminal import one_line
from arriero.errors import SessionError

DRIVER = """
import io, json, os, sys, types

class Verdict:
    def __init__(self, outcome): self.outcome = outcome
    def as_fields(self):
        estimate = {"value": 1.0, "low": 0.5, "high": 2.0}
        limit = {"metric": "kl", "side": "max", "limit": 0.1, "outcome": self.outcome}
        return {"metrics": {"kl": estimate}, "limits": [limit], "notes": ["n" * 200] * 500, "location": None,
                "outcome": self.outcome, "candidate": "\\N{GRINNING FACE}", "reference": "b", "tokens": 1, "windows": 1}

room, report = types.ModuleType("arriero.accuracy"), types.ModuleType("arriero.accuracy.report")
room.check = lambda candidate, *_, **__: Verdict(candidate.name)
report.VERDICT, report.write_report = "verdict.json", None
sys.modules |= {"arriero.accuracy": room, "arriero.accuracy.report": report}
from arriero.cli.app import main
import arriero.cli.tables

def gone(number):
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, number)

def full(number):
    os.dup2(os.open("/dev/full", os.O_WRONLY), number)

def stream(number, encoding):
    try:
        os.fstat(number)
    except OSError:
        return None
    file = open(number, "wb" if number else "rb", closefd=False)
    errors = ("strict", "strict", "backslashreplace")[number]
    return io.TextIOWrapper(file, encoding=encoding, errors=errors, line_buffering=number == 2)

def case(arguments, setup, encoding, folder):
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{name}", os.O_CREAT | os.O_RDWR | os.O_TRUNC), number)
    exec(setup)
    sys.stdin, sys.stdout, sys.stderr = (stream(number, encoding) for number in range(3))
    sys.argv = ["arriero", *arguments]
    code = 0
    try:
        main()
    except SystemExit as end:
        code = end.code or 0
    for each in (sys.stdout, sys.stderr):
        each.flush()
    os._exit(code)

cases, folder = json.loads(sys.argv[1]), sys.argv[2]
found = []
for each in cases:
    if (child := os.fork()) == 0:
        case(*each, folder)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    found.append((code, *(open(f"{folder}/{name}", encoding="utf-8").read() for name in ("out", "err"))))
print(json.dumps(found))
"""
VERDICTS = {"pass": 0, "regressed": 1, "undecided": 3}


def drive(cases: list[tuple[list[str], str, str]], folder: Path) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each command, each in a fork of one process that has imported the application."""
    command = [sys.executable, "-c", DRIVER, json.dumps(cases), str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert run.returncode == 0, run.stderr
    found: list[Any] = json.loads(run.stdout)
    return [(code, out, err) for code, out, err in found]


def test_a_verdicts_code_does_not_depend_on_the_streams(tmp_path: Path) -> None:
    setups = ["gone(1)", "os.close(1)", "gone(2)", "os.close(2)", "full(2)", "gone(1); gone(2)", "os.close(0)"]
    ways: list[list[str]] = [[], ["--json"], ["--verbose"]]
    named = [(setup, name, way) for setup in setups for name in VERDICTS for way in ways]
    found = drive([(["check", name, "--against", "b", *way], setup, "utf-8") for setup, name, way in named], tmp_path)
    for each, (code, _, _) in zip(named, found, strict=True):
        assert code == VERDICTS[each[1]], each


def test_messages_never_come_among_the_results(tmp_path: Path) -> None:
    ((code, out, _),) = drive([(["run", "/nowhere", "--prompt", "x"], "os.close(2)", "utf-8")], tmp_path)
    assert (code, out) == (2, "")


def test_a_full_disk_under_stdout_is_one_line(tmp_path: Path) -> None:
    verbs = [["--help"], ["--version"], ["check", "--help"], ["check", "pass", "--against", "b", "--json"]]
    for code, _, err in drive([(verb, "full(1)", "utf-8") for verb in verbs], tmp_path):
        assert code == 2
        assert err.count("\n") == 1
        assert "stdout could not be written (No space left on device): make room" in err
    ((code, _, _),) = drive([(["check", "regressed", "--against", "b"], "full(1)", "utf-8")], tmp_path)
    assert code == 1


def test_help_without_a_reader_is_no_error(tmp_path: Path) -> None:
    for code, _, err in drive([([*verb, "--help"], "gone(1)", "utf-8") for verb in ([], ["check"])], tmp_path):
        assert (code, err) == (0, "")


def test_closed_stdin_is_one_line_with_a_remedy(tmp_path: Path) -> None:
    ways = [["--prompt", "-"], ["--chat"], ["--chat", "--prompt", "x"]]
    for code, out, err in drive([(["run", "/nowhere", *way], "os.close(0)", "utf-8") for way in ways], tmp_path):
        assert (code, out) == (2, "")
        assert err == ("arriero: stdin is closed: give --prompt TEXT, or let stdin be a file, a pipe or a terminal\n")


def test_an_ascii_terminal_shows_all(tmp_path: Path) -> None:
    verbs = [["--help"], ["run", "--help"], ["check", "pass", "--against", "b"]]
    verbs += [["check", "pass", "--against", "b", "--json"], ["run", "/\N{GRINNING FACE}", "--prompt", "x"]]
    found = drive([(verb, "", "ascii") for verb in verbs], tmp_path)
    assert [code for code, _, _ in found] == [0, 0, 0, 0, 2]
    assert all((out + err).isascii() for _, out, err in found)
    assert "<= 0.1" in found[2][1]
    assert "\\U0001f600 passes" in found[2][1]
    assert json.loads(found[3][1])["candidate"] == "\N{GRINNING FACE}"
    assert found[4][2].startswith("arriero: /\\U0001f600 is no folder")


def test_signs_have_plain_forms() -> None:
    assert plain(UnicodeEncodeError("ascii", "a≤…é", 1, 4, "")) == ("<=...\\xe9", 4)


def test_arguments_are_utf_8_whatever_the_locale() -> None:
    assert as_utf8("café") == as_utf8("caf\udcc3\udca9") == "café"
    with pytest.raises(UnicodeDecodeError):
        as_utf8("caf\udce9")


def test_text_comes_through_an_ascii_locale(tiny_model: Path) -> None:
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "arriero", "run", str(tiny_model), "--prompt", "-", "--max-new-tokens", "4"]
    environment = {**os.environ, **ascii_only}
    run = subprocess.run(command, input="naïve 😀 café".encode(), env=environment, capture_output=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.isascii()


def out_of_memory() -> list[Exception]:
    wrapped = SessionError("x: ONNX Runtime refuses the graph (bad allocation): export the model again")
    failed = SessionError("ONNX Runtime cannot be loaded here")
    failed.__cause__ = ImportError("libx.so: failed to map segment from shared object")
    return [
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("[ONNXRuntimeError] : 6 : Failed to allocate memory for requested buffer of size 99"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("can't start new thread"),
        wrapped,
        failed,
    ]


@pytest.mark.parametrize("error", out_of_memory(), ids=lambda error: str(error)[:20] or "MemoryError")
def test_too_little_memory_is_named_with_a_remedy(error: Exception) -> None:
    line = one_line(error, "")
    assert line.startswith("there is not enough memory")
    assert "--max-seq" in line
    assert "\n" not in line
    assert "internal error" not in line


@pytest.mark.parametrize("megabytes", [300, 450])
def test_a_limit_on_memory_is_one_line(tiny_model: Path, megabytes: int) -> None:
    code = (
        f"import resource; resource.setrlimit(resource.RLIMIT_AS, ({megabytes << 20},) * 2)\n"
        "from arriero.cli.app import main; import sys\n"
        f"sys.argv = ['arriero', 'run', {str(tiny_model)!r}, '--prompt', 'x', '--max-new-tokens', '2', '--quiet']\n"
        "main()"
    )
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}  # which ends the process itself without room for threads
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.returncode in (0, 2), run.stderr
    if run.returncode:
        assert run.stderr.splitlines()[-1].startswith("arriero: there is not enough memory")
        assert "internal error" not in run.stderr


def test_a_file_that_never_ends_is_not_read_to_its_end() -> None:
    with pytest.raises(SessionError, match=r"^--grammar /dev/zero cannot be read \(more than 33554432 bytes\)"):
        read_option(Path("/dev/zero"), "--grammar")
