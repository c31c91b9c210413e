"""Environments that engines of others get beside this one."""

import os
import subprocess
from pathlib import Path

from support.apart import environment


def test_an_environment_of_its_own_sees_this_ones_packages(tmp_path: Path) -> None:
    python = environment(tmp_path / "own")
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [python, "-c", "import sys, arriero, onnx; print(sys.prefix)"],
        cwd=tmp_path, env=bare, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert Path(done.stdout.strip()) == tmp_path / "own"
