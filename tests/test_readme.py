"""The README: short, its Python runs, and what it names exists and is measured."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from arriero.cli.app import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
PAGES = {str(path.relative_to(ROOT)): path.read_text("utf-8") for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]}
LONGEST = 200


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= LONGEST


def test_every_room_and_every_verb_is_named() -> None:
    rooms = README.partition("## The rooms")[2].partition("\n## ")[0]
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} <= set(re.findall(r"(\w+)/  ", rooms))
    verbs = README.partition("## The verbs")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `arriero (\w+)", verbs, re.MULTILINE)) == {
        each.callback.__name__ for each in app.registered_commands if each.callback
    }


@pytest.mark.parametrize("page", ["README.md", "docs/run.md"])
def test_python_runs_as_it_stands(page: str, tmp_path: Path) -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```", PAGES[page], re.MULTILINE | re.DOTALL)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    run = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert len(run.stdout) > 100


def test_the_folder_that_the_readme_inspects_is_shown_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    said = CliRunner().invoke(app, ["export", "examples/tiny-llama4", "-o", "tiny"]).stderr
    assert said.startswith("Wrote tiny (")
    CliRunner().invoke(app, ["build", "tiny", "-o", "tiny-cpu", "--target", "cpu"])
    shown = CliRunner().invoke(app, ["inspect", "tiny-cpu"], env={"COLUMNS": "80"}).stdout
    (block,) = re.findall(r"^\$ arriero inspect tiny-cpu\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert [line.rstrip() for line in shown.splitlines()] == block.splitlines()


@pytest.mark.parametrize("page", PAGES)
def test_commands_scripts_and_sources_that_a_page_names_exist(page: str) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^|`)make ([\w-]+)", PAGES[page], re.MULTILINE):
        assert f"\n{target}:" in makefile, target
    rooms = "|".join(path.parent.name for path in ROOT.glob("*/__init__.py"))
    named = re.findall(rf"`((?:benchmarks|examples|tests|docs|{rooms})/[\w./-]*)[^`]*`", PAGES[page])
    for name in named:
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_links_to_exist(page: str) -> None:
    folder = (ROOT / page).parent
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", PAGES[page]):
        assert (folder / target).exists(), target


def test_headline_numbers_are_those_of_the_page_of_measurements() -> None:
    table = README.partition("## Measured")[2].partition("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| [")]
    assert len(rows) == 8
    for row in rows:
        for number in re.findall(r"(?<![\w.,])\d[\d,]*(?:\.\d+)?", row.split("|")[2]):
            assert re.search(rf"(?<![\d.,]){re.escape(number)}(?![\d])", PAGES["docs/measured.md"]), number
