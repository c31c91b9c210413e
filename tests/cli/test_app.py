"""The application: its version, its help and its completion."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from json_keys import documented
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


@pytest.mark.parametrize(
    ("arguments", "kind", "said"),
    [
        (["inspect", "nowhere"], "FolderError", "nowhere is no folder"),
        (["inspect"], "UsageError", "Missing argument"),
        (["inspect", "x", "--lairs"], "UsageError", "No such option"),
        (["inspect", "x", "--quiet", "--verbose"], "UsageError", "contradict each other"),
        (["check", "x", "--against", "y", "--max-kl", "-5"], "AccuracyError", "the limit of kl is -5.0, expected nats"),
    ],
)
def test_errors_are_json_too_where_it_is_asked_for(arguments: list[str], kind: str, said: str) -> None:
    run = subprocess.run([*MODULE, *arguments, "--json"], capture_output=True, text=True)
    assert run.returncode == 2
    found = json.loads(run.stdout)
    assert set(found) == documented("error")
    assert (found["schema"], found["kind"], found["exit_code"]) == (1, kind, 2)
    assert said in found["error"]
    assert said.split()[0] in run.stderr


def test_help_and_version_come_through_with_json() -> None:
    for arguments, said in ((["inspect", "--help", "--json"], "Usage: arriero inspect"), (["--version"], "")):
        run = subprocess.run([*MODULE, *arguments], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        assert said in run.stdout


def test_no_color_is_heeded(tiny_model: Path) -> None:
    coloured = {**os.environ, "FORCE_COLOR": "1", "TERM": "xterm-256color"}
    coloured.pop("NO_COLOR", None)
    found = []
    for more in ({}, {"NO_COLOR": "1"}):
        run = subprocess.run([*MODULE, "inspect", tiny_model], env={**coloured, **more}, capture_output=True, text=True)
        found.append(re.findall(r"\x1b\[[\d;]*3\d", run.stdout + run.stderr))
        assert "Model" in run.stdout
    assert not found[1]


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
