import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def test_the_tree_in_the_readme_names_every_source_file() -> None:
    tree = README.partition("## The tree")[2].partition("## ")[0]
    named = set(re.findall(r"\b(\w+\.py)\b", tree))
    files = {
        path.name
        for room in ("plugins", "export", "calibration", "engine", "runtime", "accuracy")
        for path in (ROOT / room).rglob("*.py")
    }
    files |= {path.name for path in ROOT.glob("*.py")}
    assert files - {"__init__.py"} <= named
    assert named - {"demo.py"} <= files


def test_commands_and_scripts_that_the_readme_names_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+) ", README, re.MULTILINE):
        assert f"\n{target}:" in makefile
    for script in re.findall(r"`((?:benchmarks|examples)/[\w./-]+)`", README):
        assert (ROOT / script).exists()
