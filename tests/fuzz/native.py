"""Builds the library of the CPU's own ops with sanitizers, and runs it.

    python tests/fuzz/native.py sanitize               tables, hostile graphs and sessions under the address sanitizer
                                                       and that of undefined behaviour; then calls from many threads
                                                       under the thread sanitizer
    python tests/fuzz/native.py coverage --seconds 1200    libFuzzer over the ops alone, guided by coverage (Clang)

Everything goes to `build/native`. The first thing that a sanitizer finds ends the run with its report and exit code 1.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILD, NATIVE, LIBRARY = ROOT / "build" / "native", ROOT / "tests" / "fuzz" / "native", "plugins/cpu/library.cpp"
SLAB = "-DARRIERO_WORKSPACE=4096"
"""Experts take their tokens in many pieces, as calls too large for a test do."""
LOOKS = "-DARRIERO_LOOK=1000000"
"""Who waits for a rank that never comes looks a thousand times a second, not ten times."""
FLAGS = ["-std=c++17", "-O1", "-g", "-fno-omit-frame-pointer", "-Wno-psabi", SLAB]
SETS = ["avx512_bf16", "avx512", "avx2", "any"]
"""Sets of instructions that tests and libFuzzer's time go to; the processor takes the next where it has not one."""
UNDEFINED = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
TABLES = [
    "tests/plugins/cpu/test_kernels.py",
    "tests/plugins/cpu/test_attention.py",
    "tests/plugins/test_gqa.py",
    "tests/plugins/test_moe.py",
    "tests/plugins/cpu/test_hostile_graphs.py",
]
SESSIONS = ["tests/runtime/test_alike.py"]
CHOSEN = "not other_processors and not by_torch and not by_function and not by_native and not torch and not race"


def main() -> int:
    """Runs what is asked for."""
    parser = argparse.ArgumentParser(description="The CPU's own ops under sanitizers")
    parser.add_argument("what", choices=["sanitize", "coverage"])
    parser.add_argument("--seconds", type=int, default=1200, help="of libFuzzer")
    parser.add_argument("--seed", type=int, default=1, help="of libFuzzer")
    arguments = parser.parse_args()
    BUILD.mkdir(parents=True, exist_ok=True)
    if arguments.what == "coverage":
        return cover(arguments.seconds, arguments.seed)
    return sanitized_tests() or threads()


def run(command: list[str], **environment: str) -> int:
    print("$", *command, flush=True)
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}).returncode


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def sanitized_tests() -> int:
    """The op tables and hostile graphs with each set of instructions, and sessions."""
    package = shadow_package()
    library = package / "plugins" / "cpu" / f"kernels{EXTENSION_SUFFIXES[0]}"
    flags = [*FLAGS, "-fPIC", "-shared", "-fvisibility=hidden", *UNDEFINED]
    if failed := run([compiler(), *flags, LIBRARY, "-o", str(library)]):
        return failed
    environment = {
        "LD_PRELOAD": ":".join(runtime_library(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so")),
        "ASAN_OPTIONS": "detect_leaks=0:alloc_dealloc_mismatch=0:allocator_may_return_null=1:abort_on_error=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": f"{package.parent}",
        "PYTHONMALLOC": "malloc",
        "ARRIERO_TEST_SECONDS": "2400",
    }
    tests = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "-x", "-k", CHOSEN]
    for instructions in SETS:
        if failed := run([*tests, *TABLES], **environment, ARRIERO_INSTRUCTION_SET=instructions):
            return failed
    return run([*tests, *SESSIONS], **environment)


def shadow_package() -> Path:
    """The package as links, but for a folder `plugins/cpu` of its own, whose library is to be another."""
    package = BUILD / "sanitized" / "arriero"
    shutil.rmtree(package.parent, ignore_errors=True)
    cpu = package / "plugins" / "cpu"
    cpu.mkdir(parents=True)
    for inside in (Path(), Path("plugins"), Path("plugins/cpu")):
        for path in (ROOT / inside).iterdir():
            is_left = path.name in ("plugins", "build", "__pycache__", "tests") or path.name.startswith(".")
            if not (is_left if inside == Path() else path.name in ("cpu", "__pycache__") or path.suffix == ".so"):
                (package / inside / path.name).symlink_to(path)
    return package


def runtime_library(name: str) -> str:
    found = subprocess.run([compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return found.stdout.strip()


def threads() -> int:
    """Kernels shared by threads that ONNX Runtime knows nothing of, under the thread sanitizer."""
    program = BUILD / "ops_threads"
    sources = [LIBRARY, str(NATIVE / "ops_threads.cpp")]
    if failed := run([compiler(), *FLAGS, "-fsanitize=thread", *sources, "-pthread", "-o", str(program)]):
        return failed
    fixed = ["setarch", platform.machine(), "-R"]  # the sanitizer's own memory has a fixed place
    command = [str(program), "300"]
    return run([*fixed, *command] if shutil.which("setarch") else command, TSAN_OPTIONS="halt_on_error=1")


def cover(seconds: int, seed: int) -> int:
    """Calls made of bytes, which libFuzzer changes as new code is reached, from calls of each op that fit.

    Each of `SETS` has its share of the time, and begins where the one before ended.
    """
    program, corpus = BUILD / "ops_fuzz", BUILD / "corpus"
    clang = next((name for name in ("clang++", *(f"clang++-{v}" for v in range(22, 13, -1))) if shutil.which(name)), "")
    if not clang:
        sys.exit("native.py: coverage needs Clang; install it, on Debian and Ubuntu with: apt-get install clang")
    flags = [*FLAGS, "-O2", "-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=undefined", LOOKS]
    if failed := run([clang, *flags, LIBRARY, str(NATIVE / "ops_fuzz.cpp"), "-o", str(program)]):
        return failed
    corpus.mkdir(exist_ok=True)
    limits = ["-max_len=256", "-len_control=0", "-timeout=10", "-rss_limit_mb=2048", f"-artifact_prefix={BUILD}/"]
    ending = [f"-max_total_time={seconds // len(SETS)}", f"-seed={seed}", "-print_final_stats=1", f"--seeds={corpus}"]
    for instructions in SETS:
        if failed := run([str(program), *limits, *ending, str(corpus)], ARRIERO_INSTRUCTION_SET=instructions):
            return failed
    return report_coverage(clang, corpus)


def report_coverage(clang: str, corpus: Path) -> int:
    """Prints how much of each of the library's files the calls in the corpus reach, as Clang's own tools count it."""
    program, profile = BUILD / "ops_covered", BUILD / "ops.profdata"
    counting = ["-fprofile-instr-generate", "-fcoverage-mapping", "-fsanitize=fuzzer"]
    if failed := run([clang, *FLAGS, LOOKS, *counting, LIBRARY, str(NATIVE / "ops_fuzz.cpp"), "-o", str(program)]):
        return failed
    raw = [BUILD / f"{instructions}.profraw" for instructions in SETS]
    for instructions, path in zip(SETS, raw, strict=True):
        environment = {"ARRIERO_INSTRUCTION_SET": instructions, "LLVM_PROFILE_FILE": str(path)}
        if failed := run([str(program), "-runs=0", str(corpus)], **environment):
            return failed

    def tool(name: str) -> str:
        return subprocess.run([clang, f"-print-prog-name={name}"], capture_output=True, text=True).stdout.strip()

    files = sorted(str(path) for path in (ROOT / "plugins" / "cpu").glob("*.h"))
    merging = [tool("llvm-profdata"), "merge", "-sparse", *map(str, raw), "-o", str(profile)]
    reporting = [tool("llvm-cov"), "report", str(program), f"-instr-profile={profile}", *files]
    return run(merging) or run(reporting)


if __name__ == "__main__":
    sys.exit(main())
