"""The packages that bring the module `onnxruntime`: none, one, two, and half of one."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import arriero
from arriero.errors import SessionError
from arriero.runtime.backends.onnxruntime_package import check_installed, installed

PROJECT = tomllib.loads((Path(arriero.__file__).parent / "pyproject.toml").read_text("utf-8"))["project"]


def pretend(folder: Path, *packages: str) -> None:
    """Puts packages' metadata, without their files, into a folder."""
    for name in packages:
        information = folder / f"{name.replace('-', '_')}-1.31.1.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.31.1\n")


def loaded(before: str) -> str:
    """What the command line says to a bundle after some lines of Python."""
    code = (
        f"import sys\n{before}\n"
        "from arriero.cli.terminal import Terminal\n"
        "from typer import Exit\n"
        "try:\n"
        "    with Terminal().errors_shown():\n"
        "        from arriero.runtime.backends import onnxruntime_decoder\n"
        "except Exit as end:\n"
        "    sys.exit(end.exit_code)\n"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr


def test_this_environment_has_one() -> None:
    assert len(installed()) == 1
    check_installed()


@pytest.mark.parametrize("pair", [("onnxruntime", "onnxruntime-gpu"), ("onnxruntime-gpu", "ort-nightly")])
def test_two_are_refused_with_the_commands_that_mend_it(
    pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(tmp_path, *pair)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(SessionError) as caught:
        check_installed()
    said = str(caught.value)
    assert f"{pair[0]} 1.31.1 and {pair[1]} 1.31.1 are both installed" in said
    assert f"pip uninstall --yes {pair[0]} {pair[1]}, then pip install 'arriero[cpu]'" in said
    assert "\n" not in said
    for name in pair:  # as the first command does
        for file in (folder := tmp_path / f"{name.replace('-', '_')}-1.31.1.dist-info").iterdir():
            file.unlink()
        folder.rmdir()
    check_installed()


def test_none_is_one_line_with_both_commands() -> None:
    said = loaded("sys.modules['onnxruntime'] = None")
    assert said == (
        "arriero: ONNX Runtime is not installed: pip install 'arriero[cpu]', "
        "or pip install 'arriero[gpu]' for ONNX Runtime's build with CUDA\n"
    )


def test_the_half_that_an_uninstalled_package_leaves_is_found(tmp_path: Path) -> None:
    (tmp_path / "onnxruntime").mkdir()
    said = loaded(
        f"sys.path.insert(0, {str(tmp_path)!r})\nimport types\nsys.modules['onnxruntime'] = types.ModuleType('x')"
    )
    assert "is incomplete" in said
    assert said.count("\n") == 1


def test_one_that_cannot_be_loaded_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('libstdc++.so.6: version GLIBCXX_9 not found')")
    said = loaded(f"sys.path.insert(0, {str(tmp_path)!r})")
    assert "cannot be loaded here (libstdc++.so.6: version GLIBCXX_9 not found)" in said
    assert said.count("\n") == 1


def test_the_base_brings_neither_and_the_extras_one_each() -> None:
    extras = PROJECT["optional-dependencies"]
    assert not [each for each in PROJECT["dependencies"] if each.startswith("onnxruntime")]
    assert [each.partition("=")[0] for each in extras["cpu"]] == ["onnxruntime"]
    assert [each.partition("=")[0] for each in extras["gpu"]] == ["onnxruntime-gpu"]
    for name, requirements in extras.items():
        if name not in ("cpu", "gpu"):
            assert not [each for each in requirements if each.startswith("onnxruntime")], name


def test_engines_need_no_onnx_runtime() -> None:
    code = (
        "import json, sys\nsys.modules['onnxruntime'] = None\n"
        "import arriero.loading, arriero.runtime.backends.tensorrt_decoder, arriero.runtime.backends.tensorrt_tower\n"
        "print(json.dumps('arriero.runtime.backends.onnxruntime_package' in sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) is False


def test_nothing_is_kept_for_telemetry(tmp_path: Path) -> None:
    code = "import sys\nfrom arriero.runtime.backends.onnxruntime_package import ort\nort.get_available_providers()"
    kept = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    environment = {
        name: value for name, value in os.environ.items() if name not in ("ORT_DISABLE_TELEMETRY", "CI")
    } | kept
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert list(tmp_path.iterdir()) == []
    subprocess.run([sys.executable, "-c", code], env=environment | {"ORT_DISABLE_TELEMETRY": "0"}, check=True)
    assert list(tmp_path.rglob("*onnxruntime*")), "this build of ONNX Runtime keeps nothing, so the test proves nothing"
