"""Wheels that pip resolves for `arriero[cpu]` on each platform, and how much it downloads; nothing is installed.

Enters: pyproject.toml's ranges and the package index. Leaves: a line a platform. `make wheels` prints them for
docs/install.md; the tests resolve the same.
"""

import json
import subprocess
import sys
import tomllib
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
LINUX = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux_2_17", "manylinux2014")
PLATFORMS = {
    "Linux, x86-64": tuple(f"{tag}_x86_64" for tag in LINUX),
    "Linux, ARM": tuple(f"{tag}_aarch64" for tag in LINUX),
    "macOS 14, Apple silicon": ("macosx_14_0_arm64",),
    "Windows, x86-64": ("win_amd64",),
}
"""Wheel tags of each platform; pip looks for no others."""


def requirements(extra: str) -> list[str]:
    """The package's own requirements and those of an extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return [*project["dependencies"], *project["optional-dependencies"][extra]]


def resolve(extra: str, tags: tuple[str, ...], *options: str) -> list[dict[str, Any]]:
    """The wheels that pip would install, as its report describes them; `options` are pip's.

    Raises:
        RuntimeError: pip finds no wheels that fit together.
    """
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--dry-run"]
    command += ["--ignore-installed", "--report", "-", "--only-binary", ":all:", "--target", "nowhere"]
    command += ["--implementation", "cp", "--python-version", "3.11", *(f"--platform={tag}" for tag in tags)]
    run = subprocess.run([*command, *options, *requirements(extra)], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(run.stderr.strip())
    return json.loads(run.stdout)["install"]


def size(wheel: dict[str, Any]) -> int:
    """Bytes of a wheel, as the place it comes from says."""
    with urllib.request.urlopen(urllib.request.Request(wheel["download_info"]["url"], method="HEAD")) as answer:
        return int(answer.headers["Content-Length"])


def main() -> None:
    """Prints a row a platform: packages, megabytes, and the wheel of ONNX Runtime."""
    for platform, tags in PLATFORMS.items():
        wheels = resolve("cpu", tags)
        total = sum(map(size, wheels))
        runtime = next(wheel for wheel in wheels if wheel["metadata"]["name"] == "onnxruntime")
        print(f"| {platform} | {len(wheels)} | {total / 1e6:.0f} | {size(runtime) / 1e6:.0f} |", flush=True)


if __name__ == "__main__":
    main()
