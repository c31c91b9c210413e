"""A packed bundle moved to a machine with the runtime alone: its tokens, its size, and its time to the first token.

    python benchmarks/moved_bundle.py BUNDLE [--environment DIR]

The environment is made anew of `arriero[cpu]` where it is not there. In it are neither torch nor onnx, and the commands
run without a compiler on the path. The tokens are those of the bundle where it was built, asked by this Python. Printed
besides: packing, unpacking (which proves every hash), and hashing alone, which is what a start from the archive in
place would have to add each time, in place of unpacking once.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable
from pathlib import Path

import arriero
from arriero.files.contents_hash import file_hash
from arriero.files.packing import pack_bundle, unpack_bundle

ROOT = Path(__file__).parent.parent
PROMPT = "The list type"


def made(folder: Path) -> Path:
    """The environment's folder of programs."""
    programs = folder / "bin"
    if not (programs / "arriero").exists():
        venv.create(folder, with_pip=True)
        wheels = tempfile.mkdtemp(prefix="arriero-wheel-")
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", wheels, str(ROOT)], check=True)
        wheel = next(Path(wheels).glob("*.whl"))
        install = [programs / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, f"{wheel}[cpu]"], check=True)
        shutil.rmtree(wheels)
    return programs


def timed(work: Callable[..., object], *arguments: object) -> float:
    started = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--environment", type=Path, default=ROOT / "build" / "moved-venv")
    asked = parser.parse_args()
    expected = arriero.load(asked.bundle).generate(PROMPT, max_new_tokens=32, do_sample=False).ids
    programs = made(asked.environment)
    with tempfile.TemporaryDirectory() as place:
        file, there = Path(place) / "bundle.arriero", Path(place) / "there"
        figures = {"pack_seconds": timed(pack_bundle, asked.bundle, file)}
        size = file.stat().st_size
        figures["hash_seconds"] = timed(file_hash, file)
        figures["unpack_seconds"] = timed(unpack_bundle, file, there)
        shutil.rmtree(there)
        bare = {
            "PATH": str(programs),
            "HOME": place,
            **{name: os.environ[name] for name in ("OMP_NUM_THREADS",) if name in os.environ},
        }

        def there_run(*arguments: object) -> str:
            command = [programs / "arriero", *map(str, arguments)]
            run = subprocess.run(command, cwd=place, env=bare, capture_output=True, text=True)
            assert run.returncode == 0, run.stdout + run.stderr
            return run.stdout

        for module in ("torch", "onnx", "onnx_ir", "triton"):
            found = subprocess.run([programs / "python", "-c", f"import {module}"], env=bare, capture_output=True)
            assert found.returncode, f"{module} is in the environment, which was to be bare"
        assert shutil.which("cc", path=bare["PATH"]) is None
        there_run("pack", file, "--unpack", "-o", there)
        there_run("doctor", there, "--port", 0)
        greedy = ("--prompt", PROMPT, "--max-new-tokens", 32, "--temperature", 0)
        answer = json.loads(there_run("run", there, *greedy, "--json"))
    packages = sum(path.stat().st_size for path in asked.environment.rglob("*") if path.is_file())
    print(
        json.dumps(
            {
                "same_tokens": answer["ids"] == expected,
                "tokens": len(expected),
                "packed_bytes": size,
                "environment_bytes": packages,
                "load_seconds": answer["load_seconds"],
                "first_token_seconds": answer["first_token_seconds"],
                **{name: round(seconds, 3) for name, seconds in figures.items()},
            }
        )
    )
    if answer["ids"] != expected:
        sys.exit(f"the moved bundle answers {answer['ids']}, where it was built {expected}")


if __name__ == "__main__":
    main()
