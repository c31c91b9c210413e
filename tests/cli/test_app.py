"""The application: its version, its help and its completion."""

import os
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import arriero
from arriero.cli.app import VERBS, app

MODULE = [sys.executable, "-m", "arriero"]
WORN = re.compile(r"\b(reckon\w*|told|so many|but for rounding|the same of)\b", re.IGNORECASE)


def test_the_package_runs_as_a_module() -> None:
    run = subprocess.run([*MODULE, "--version"], capture_output=True, text=True)
    assert run.stdout == f"arriero {arriero.__version__}\n"
    assert run.returncode == 0


def test_the_module_has_the_commands_name() -> None:
    run = subprocess.run([*MODULE, "--help"], capture_output=True, text=True)
    assert "Usage: arriero " in run.stdout


def test_the_help_names_every_verb_in_order() -> None:
    shown = CliRunner().invoke(app, ["--help"]).stdout
    names = [verb.__name__ for verb in VERBS]
    assert re.findall(rf"^│ ({'|'.join(names)}) ", shown, re.MULTILINE) == names


@pytest.mark.parametrize("verb", [verb.__name__ for verb in VERBS])
def test_the_help_of_a_verb_is_whole_and_in_plain_words(verb: str) -> None:
    shown = CliRunner().invoke(app, [verb, "--help"], terminal_width=80).stdout
    plain = " ".join(re.sub(r"[│╭╮╰╯─]", " ", shown).split())
    assert "…" not in plain.replace("}, …], ", "")  # nothing is cut off but where the text itself leaves out
    assert not WORN.search(plain)
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize(
    ("typed", "offered"),
    [("arriero cal", "calibrate"), ("arriero run --prompt-l", "--prompt-lookup"), ("arriero inspect --q", "--quiet")],
)
def test_the_shell_completes_verbs_and_options(typed: str, offered: str) -> None:
    completing = {"_ARRIERO_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    run = subprocess.run(MODULE, env={**os.environ, **completing}, capture_output=True, text=True)
    assert run.stdout.split() == [offered]


def test_the_completion_script_is_shown() -> None:
    named = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    run = subprocess.run([*MODULE, "--show-completion", "bash"], env=named, capture_output=True, text=True)
    assert "complete -o default -F _arriero_completion arriero" in run.stdout
