import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import PathDistribution
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import arriero.plugins.cpu.library

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
LOCK = (ROOT / "requirements.lock").read_text("utf-8")


def packages_in_tree() -> set[str]:
    rooms = [path.parent for path in ROOT.glob("*/__init__.py") if path.parent.name != "tests"]
    folders = {path.parent for room in rooms for path in room.rglob("*.py")}
    return {"arriero"} | {"arriero." + ".".join(folder.relative_to(ROOT).parts) for folder in folders}


def locked(text: str) -> dict[str, list[str]]:
    """The versions of each package; several where they depend on the platform."""
    found: dict[str, list[str]] = {}
    for name, version in re.findall(r"(?m)^([\w.-]+)==(\S+) ", text):
        found.setdefault(name, []).append(version)
    return found


def part(name: str) -> dict[str, list[str]]:
    return locked(LOCK.partition(f"# [{name}]\n")[2].partition("\n# [")[0])


def test_the_package_list_is_the_tree() -> None:
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == packages_in_tree()


def test_the_kernels_are_compiled_anew_when_any_of_their_files_has_changed() -> None:
    (module,) = PROJECT["tool"]["setuptools"]["ext-modules"]
    assert module["depends"] == sorted(f"plugins/cpu/{path.name}" for path in (ROOT / "plugins" / "cpu").glob("*.h"))


def test_the_lock_is_within_the_project_s_ranges() -> None:
    versions = locked(LOCK)
    ranges = [PROJECT["build-system"]["requires"], PROJECT["project"]["dependencies"]]
    extras = PROJECT["project"]["optional-dependencies"]
    ranges += [
        requirements for extra, requirements in extras.items() if extra != "gpu"
    ]  # of cpu and gpu, one is locked
    for requirement in map(Requirement, chain(*ranges)):
        if requirement.name != "arriero":
            name = canonicalize_name(requirement.name)
            assert name in versions, f"{name} is not locked: make lock"
            assert all(requirement.specifier.contains(version) for version in versions[name]), requirement


def test_every_locked_version_has_hashes_and_no_place() -> None:
    requirements = re.findall(r"(?m)^[^#\s].*\n(?:    .*\n)*", LOCK)
    assert len(requirements) == sum(len(versions) for versions in locked(LOCK).values())
    assert all("    --hash=sha256:" in requirement for requirement in requirements)
    assert not re.search(r"//|^-|file:|[( ]/|/\w+/", LOCK, re.MULTILINE)


def test_pre_commit_runs_the_locked_ruff() -> None:
    hooks = (ROOT / ".pre-commit-config.yaml").read_text("utf-8")
    assert set(re.findall(r"ruff==([\w.]+)", hooks)) == set(locked(LOCK)["ruff"])


def test_the_demo_installs_no_tools_of_the_tests_and_no_cuda() -> None:
    demo, test, cuda = part("demo"), part("test"), part("cuda")
    assert {"torch", "onnx", "matplotlib", "triton"} <= set(demo)
    assert {"pytest", "ruff", "mypy", "transformers", "lm-eval"} <= set(test)
    assert all(name.startswith(("cuda-", "nvidia-")) for name in cuda)
    assert not set(demo) & set(test) | set(demo) & set(cuda) | set(test) & set(cuda)


def test_the_lock_brings_one_onnx_runtime() -> None:
    assert [name for name in locked(LOCK) if name.startswith(("onnxruntime", "ort-"))] == ["onnxruntime"]


WHEELS = runpy.run_path(str(ROOT / ".ci" / "wheels.py"))


@pytest.mark.parametrize("platform", ["Linux, x86-64", "Linux, ARM", "macOS 14, Apple silicon"])
def test_pip_finds_a_wheel_of_all_that_the_cpu_needs(platform: str) -> None:
    tags = WHEELS["PLATFORMS"][platform]
    try:  # without what these need in turn, which `make wheels` finds, and which is of Python alone but for one or two
        wheels = WHEELS["resolve"]("cpu", tags, "--no-deps", "--retries", "0", "--timeout", "20")
    except RuntimeError as error:
        if re.search(r"onnection|resolution|timed out|from versions: none", str(error)):
            pytest.skip(f"the package index is not reachable: {str(error)[:200]}")
        raise
    urls = {wheel["metadata"]["name"]: wheel["download_info"]["url"] for wheel in wheels}
    assert "onnxruntime-gpu" not in urls
    assert {canonicalize_name(Requirement(each).name) for each in WHEELS["requirements"]("cpu")} == set(
        map(canonicalize_name, urls)
    )
    assert all(url.endswith(".whl") for url in urls.values())
    assert urls["onnxruntime"].endswith(f"{tags[0]}.whl")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[str]]:
    """A clean environment with the wheel in it, over this one's libraries. Returns its Python and what it gained.

    The wheel is made as where there is no compiler, and gets the kernels that this environment's installation compiled.
    """
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    wheel = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(ROOT)]
    no_compiler = dict.fromkeys(("CC", "CXX"), "false")
    subprocess.run(wheel, check=True, capture_output=True, env={**os.environ, **no_compiler})
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    python = folder / "venv" / "bin" / "python"
    site = next((folder / "venv" / "lib").glob("python*/site-packages"))
    before = {path.name for path in site.iterdir()}
    wheel_file = next(folder.glob("*.whl"))
    subprocess.run(
        [*pip, "install", "--no-deps", "--target", str(site), str(wheel_file)], check=True, capture_output=True
    )
    gained = {path.name for path in site.iterdir()} - before
    shutil.copy(arriero.plugins.cpu.library.library(), site / "arriero" / "plugins" / "cpu")
    libraries = next(path for path in sys.path if path.endswith("site-packages"))
    (site / "libraries.pth").write_text(libraries + "\n")
    return python, gained


def test_site_packages_gain_only_arriero(installed: tuple[Path, set[str]]) -> None:
    _, gained = installed
    assert {name for name in gained if not name.endswith(".dist-info")} - {"bin"} == {"arriero"}


def test_the_wheel_tells_its_licence(installed: tuple[Path, set[str]]) -> None:
    python, gained = installed
    site = next((python.parent.parent / "lib").glob("python*/site-packages"))
    information = next(site / name for name in gained if name.endswith(".dist-info"))
    assert PathDistribution(information).metadata["License-Expression"] == "Apache-2.0"
    assert {path.name for path in (information / "licenses").iterdir()} == {"LICENSE", "NOTICE"}


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
