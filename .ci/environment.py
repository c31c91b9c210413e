"""The locked environment: `lock` renews `requirements.lock`, `install PART…` installs parts of it beside this Python.

Enters: pyproject.toml's ranges, or the lock. Leaves: the lock, every version with the hashes of its files, or installed
packages. Needs nothing but Python and pip to install; uv must be importable to lock.

The lock is one file in parts, so that less than everything can be installed. It is complete, so pip installs it
without looking for dependencies, and refuses a file whose hash is not listed. Two things need care:

- A build of torch for CPUs may lie where pip's configuration points. It is preferred, as pip without hashes would do by
  its version (2.13.0+cpu). With hashes pip would prefer the index's build, whose hash it knows before it looks, so
  torch's file is fetched first, and then installed by hash from where it was put.
- The index's build for Linux asks for gigabytes of NVIDIA's libraries, the CPU's for none. They are a part of their
  own (`cuda`), which is installed where the torch that was installed asks for them.
"""

import hashlib
import re
import subprocess
import sys
import tempfile
import tomllib
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parent.parent
LOCK = ROOT / "requirements.lock"
PARTS = {"demo": ("cpu", "accuracy", "calibration", "serve", "tensorrt"), "test": ("test", "docs")}
"""The extras of each part. A package stands in the first part that needs it: the parts are installed in this order."""

RUNTIMES = ("onnxruntime", "onnxruntime-gpu")
"""Packages that own the same module, so that one must go before the other comes."""

PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
ABOUT = """\
# Every version that the project is tested with, and the hashes of its files. `make lock` renews it: do not edit.
# In parts: what builds the package, what `make demo` needs, what `make test` needs besides, and what torch needs where
# it is a build for CUDA. torch's hashes are those of the index's files and of the build for CPUs (2.13.0+cpu).
"""


def blocks(text: str) -> dict[str, str]:
    """The requirements of a lock or of a part, by name; a name has several where versions depend on the platform."""
    found: dict[str, str] = {}
    for block in re.findall(r"(?m)^[a-z0-9].*\n(?:[ \t].*\n)*", text):
        name = re.split(r"[^\w.-]", block)[0]
        found[name] = found.get(name, "") + block
    return found


def parts() -> dict[str, dict[str, str]]:
    """The lock's parts: the requirements of each, by name."""
    pieces = re.split(r"(?m)^# \[(\w+)\]\n", LOCK.read_text("utf-8"))
    return {name: blocks(text) for name, text in zip(pieces[1::2], pieces[2::2], strict=True)}


def pip(*arguments: str | Path, requirements: str | None = None) -> None:
    """Runs pip, which ends this process with its own message where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        if requirements is not None:
            file = Path(folder) / "requirements.txt"
            file.write_text(requirements, "utf-8")
            arguments = (*arguments, "--require-hashes", "--requirement", file)
        if code := subprocess.run([*PIP, *map(str, arguments)]).returncode:
            sys.exit(code)


def fetch_torch(pin: str, folder: Path) -> Path:
    """The wheel of torch that pip's configuration prefers, not installed yet."""
    pip("download", "--no-deps", "--only-binary", ":all:", "--dest", folder, pin)
    return next(folder.glob("torch-*.whl"))


def pin_of(block: str) -> str:
    """A requirement's name and version, without hashes and markers."""
    return block.split()[0]


def install_torch(block: str) -> None:
    """Installs torch where this version of it is not installed yet, of whichever build."""
    pin = pin_of(block)
    try:
        if metadata.version("torch").partition("+")[0] == pin.partition("==")[2]:
            return
    except metadata.PackageNotFoundError:
        pass
    with tempfile.TemporaryDirectory() as folder:
        fetch_torch(pin, Path(folder))
        here = ("--no-index", "--find-links", folder)
        pip("install", "--no-deps", "--no-compile", *here, requirements=block)


def remove_other_runtime(chosen: dict[str, str]) -> None:
    """Removes ONNX Runtime where another package of it than the lock's is installed, by an earlier lock perhaps."""
    wanted = {name for name in RUNTIMES if name in chosen}
    here = {each.metadata["Name"] for each in metadata.distributions()} & set(RUNTIMES)
    if wanted and here - wanted:
        pip("uninstall", "--yes", *sorted(here))


def install(names: list[str]) -> None:
    """Installs parts of the lock; modules are compiled when they are first imported, since most never are."""
    lock = parts()
    chosen = {name: block for part in names for name, block in lock[part].items()}
    print(f"Installing {len(chosen)} locked packages ({', '.join(names)})", flush=True)
    if "torch" in chosen:
        install_torch(chosen.pop("torch"))
        asked_for = {re.split(r"[^\w.-]", text)[0] for text in metadata.requires("torch") or []}
        if asked_for & set(lock["cuda"]):
            chosen |= lock["cuda"]
    remove_other_runtime(chosen)
    from_source = ("--use-pep517", "--no-build-isolation")  # the few that bring no wheel, by the locked setuptools
    pip("install", "--no-deps", "--no-compile", *from_source, requirements="".join(chosen.values()))


def resolve(*arguments: str | Path, requirements: str = "") -> dict[str, str]:
    """Newest versions within ranges, for every platform, with hashes; ranges come from stdin."""
    command = (sys.executable, "-m", "uv", "pip", "compile", "-", "--quiet", "--no-config", "--universal", "--upgrade")
    options = ("--generate-hashes", "--no-header", "--annotation-style", "line", "--python-version", "3.11")
    run = subprocess.run(
        [*command, *options, *map(str, arguments)], input=requirements, text=True, stdout=subprocess.PIPE, cwd=ROOT
    )
    if run.returncode:
        sys.exit(run.returncode)
    return blocks(run.stdout)


def with_other_builds(block: str) -> str:
    """The requirement of torch with the hashes of the wheel that pip prefers here, and of those that the lock knew."""
    known = parts()["demo"].get("torch", "") if LOCK.exists() else ""
    hashes = set(re.findall(r"sha256:\w+", block + (known if known.startswith(pin_of(block) + " ") else "")))
    with tempfile.TemporaryDirectory() as folder, fetch_torch(pin_of(block), Path(folder)).open("rb") as wheel:
        hashes.add(f"sha256:{hashlib.file_digest(wheel, 'sha256').hexdigest()}")
    lines = " \\\n".join(f"    --hash={digest}" for digest in sorted(hashes))
    head, *_, via = block.splitlines()
    return f"{head}\n{lines}\n{via}\n"


def lock() -> None:
    """Writes the lock anew, with the newest versions within pyproject.toml's ranges."""
    builders = "\n".join(tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["build-system"]["requires"])
    flags = {part: [f"--extra={extra}" for extra in extras] for part, extras in PARTS.items()}
    everything = resolve("pyproject.toml", *(flag for extra in flags.values() for flag in extra), requirements=builders)
    everything["torch"] = with_other_builds(everything["torch"])
    with tempfile.TemporaryDirectory() as folder:
        same = Path(folder) / "everything.txt"
        same.write_text("".join(everything.values()), "utf-8")
        wanted = {"build": resolve("--constraint", same, requirements=builders)}
        for part, extra in flags.items():
            wanted[part] = resolve("pyproject.toml", "--constraint", same, *extra)
    wanted = {"cuda": {name: "" for name in everything if serves_torch_alone(name, everything)}} | wanted
    text, rest = ABOUT, dict(everything)
    for part, names in wanted.items():
        text += f"\n# [{part}]\n" + "".join(rest.pop(name) for name in everything if name in names and name in rest)
    LOCK.write_text(text, "utf-8")


def serves_torch_alone(name: str, everything: dict[str, str]) -> bool:
    """Whether a package of NVIDIA's is there only since torch asks for it, itself or through others of that kind."""
    if not name.startswith(("cuda-", "nvidia-")):
        return False
    parents = re.findall(r"[\w.-]+", " ".join(re.findall(r"# via (.*)", everything[name])))
    return all(parent == "torch" or serves_torch_alone(parent, everything) for parent in parents)


if __name__ == "__main__":
    verb, *names = sys.argv[1:]
    install(names) if verb == "install" else lock()
