import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("accuracy", "calibration", "engine", "export", "plugins", "runtime")


def packages_in_tree() -> set[str]:
    folders = {path.parent for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    return {"arriero"} | {"arriero." + ".".join(folder.relative_to(ROOT).parts) for folder in folders}


def test_the_package_list_is_the_tree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert set(project["tool"]["setuptools"]["packages"]) == packages_in_tree()


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[str]]:
    """A clean environment with the wheel in it, over this one's libraries. Returns its Python and what it gained."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    wheel = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(ROOT)]
    subprocess.run(wheel, check=True, capture_output=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    python = folder / "venv" / "bin" / "python"
    site = next((folder / "venv" / "lib").glob("python*/site-packages"))
    before = {path.name for path in site.iterdir()}
    wheel_file = next(folder.glob("*.whl"))
    subprocess.run(
        [*pip, "install", "--no-deps", "--target", str(site), str(wheel_file)], check=True, capture_output=True
    )
    gained = {path.name for path in site.iterdir()} - before
    libraries = next(path for path in sys.path if path.endswith("site-packages"))
    (site / "libraries.pth").write_text(libraries + "\n")
    return python, gained


def test_site_packages_gain_only_arriero(installed: tuple[Path, set[str]]) -> None:
    _, gained = installed
    assert {name for name in gained if not name.endswith(".dist-info")} - {"bin"} == {"arriero"}


def test_every_module_of_the_wheel_imports(installed: tuple[Path, set[str]], tmp_path: Path) -> None:
    python, _ = installed
    code = (
        "import arriero, pkgutil, importlib\n"
        "assert 'venv' in arriero.__file__, arriero.__file__\n"
        "from arriero.plugins.cpu.library import library\n"
        "assert 'venv' in str(library())\n"
        "found = pkgutil.walk_packages(arriero.__path__, 'arriero.')\n"
        "names = [m.name for m in found if m.name != 'arriero.plugins.cpu.kernels']\n"  # a library of another kind
        "for name in names: importlib.import_module(name)\n"
        "print(len(names))"
    )
    run = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) >= 30
