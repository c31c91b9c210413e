"""The documentation: generated pages are those of the code, and a newcomer finds the way."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"

sys.path.insert(0, str(DOCS))

from generate import PAGES, pages  # noqa: E402
from generators import spec_json  # noqa: E402


def links(page: str) -> set[str]:
    return set(re.findall(r"\]\(([\w.-]+\.md(?:#[\w-]+)?)\)", (DOCS / page).read_text("utf-8")))


@pytest.mark.parametrize("name", PAGES)
def test_a_generated_page_is_what_the_code_says_now(name: str) -> None:
    assert (DOCS / name).read_text("utf-8") == pages()[name], f"{name} is stale: run `make docs`"


def test_an_option_within_code_is_not_marked_again() -> None:
    page = (DOCS / "command-line.md").read_text("utf-8")
    assert "`arriero check --history`" in page
    assert "``" not in re.sub("^```.*", "", page, flags=re.MULTILINE)


def test_every_field_of_spec_json_is_described() -> None:
    assert not spec_json.undescribed()


def test_a_newcomer_finds_targets_and_fields_in_two_clicks() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    assert "docs/ops.md#a-new-target" in readme
    assert "docs/spec-json.md" in readme
    assert {"ops.md#a-new-target", "ops.md#a-new-op", "spec-json.md"} <= links("index.md")
    assert "\n## A new target\n" in (DOCS / "ops.md").read_text("utf-8")


def test_every_page_is_reached_from_the_index() -> None:
    reached = {link.partition("#")[0] for link in links("index.md")}
    assert {path.name for path in DOCS.glob("*.md")} - {"index.md"} <= reached


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    pytest.importorskip("sphinx", reason="needs the docs extra")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", "-b", "html", str(DOCS), str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
