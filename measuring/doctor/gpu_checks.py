"""The GPU, its driver, CUDA and TensorRT beside the engine that is to run on them."""

import re
from collections.abc import Callable
from pathlib import Path

from ...errors import SessionError
from ...plugins.launch import Driver
from ...runtime.backends.device import Device
from ...runtime.backends.engine_file import check_machine, open_version
from ...runtime.ranks.nccl import Nccl
from ...runtime.room import size
from ...spec.built_engine import FP8_FROM, EngineSpec
from ...spec.folder import FolderSpec
from .finding import Finding, found, ok, seen, unchecked

JETSON_MODEL = Path("/proc/device-tree/model")
JETSON_RELEASE = Path("/etc/nv_tegra_release")
ORIN = 87
"""Compute capability of Jetson Orin."""

JETPACK_7 = 38
"""Jetson Linux of JetPack 7; that of JetPack 6, which stays on TensorRT 10, is 36."""


def check_gpu(folder: Path, spec: FolderSpec, open_driver: Callable[[], Driver], number: int = 0) -> list[Finding]:
    """Looks at all that an engine needs of the machine; what hangs on something missing is not checked.

    Args:
        folder: The bundle.
        spec: Its spec.
        open_driver: Opens CUDA's driver.
        number: The GPU's number.
    """
    engine = spec.engine
    assert engine is not None
    looks = [*_jetson(engine), seen("TensorRT", lambda: f"{engine.flavour} {open_version(engine).__version__}")]
    try:
        driver = open_driver()
    except SessionError as error:
        missing = [found("driver", str(error))]
        return [*looks, *missing, *(unchecked(each, "no driver") for each in ("GPU", "types", "GPU memory"))]
    if driver.devices() <= number:
        few = f"{driver.devices()} GPUs are here, this rank needs number {number}: run fewer ranks"
        return [*looks, found("GPU", few)]
    major, minor = driver.version()
    capability = driver.capability(number)
    return [
        *looks,
        ok("driver", f"serves CUDA {major}.{minor}"),
        seen("GPU", lambda: f"sm{check_machine(folder, engine, driver, number)}, which the engine was built for"),
        _types(spec, engine, capability),
        seen("GPU memory", lambda: _memory(spec, engine, driver, number)),
    ]


def check_bare_gpu(open_driver: Callable[[], Driver]) -> Finding:
    """Looks for a GPU where no bundle asks for one."""
    try:
        driver = open_driver()
    except SessionError:
        return unchecked("GPU", "no NVIDIA driver here; CPU bundles need none")

    def look() -> str:
        major, minor = driver.version()
        each = ", ".join(f"sm{driver.capability(number)}" for number in range(driver.devices()))
        return f"{each or 'none'}; the driver serves CUDA {major}.{minor}"

    return seen("GPU", look)


def check_nccl() -> Finding:
    """Looks for the library through which the ranks of engines meet."""

    def look() -> str:
        Nccl()
        return "its library loads"

    return seen("NCCL", look)


def _types(spec: FolderSpec, engine: EngineSpec, capability: int) -> Finding:
    """FP8 needs a GPU that computes in it."""
    uses_fp8 = "fp8" in types_of(spec, engine)
    if uses_fp8 and capability < FP8_FROM:
        name = "Jetson Orin (sm87)" if capability == ORIN else f"this GPU (sm{capability})"
        return found(
            "types",
            f"the bundle computes in FP8, which {name} does not have, but sm{FP8_FROM} and later: calibrate with "
            "--recipe int8 or int4, and build for it",
        )
    return ok("types", "FP8, which this GPU has" if uses_fp8 else "no FP8")


def types_of(spec: FolderSpec, engine: EngineSpec) -> set[str]:
    """The types of a bundle's weights, activations and caches."""
    found: set[str] = {weight.dtype for weight in spec.weights} | {cache.dtype for cache in engine.caches}
    if spec.recipe is not None:
        found |= {spec.recipe.format, spec.recipe.kv_cache}
        found |= {each.format for each in spec.recipe.overrides if each.format}
    return found


def gpu_bytes(spec: FolderSpec, engine: EngineSpec) -> int:
    """Bytes of the GPU's memory that a session takes with all of its rows; weights that stream are left out."""
    outside = sum(weight.given_size for weight in spec.weights)
    inside = 0 if engine.weight_streaming else engine.weights
    rows = max(profile.max_batch for profile in engine.profiles)
    caches = rows * sum(cache.row_size for cache in engine.caches)
    logits = max(each.max_batch * each.max_logits for each in engine.profiles) * spec.model.vocab_size * 4
    total = outside + inside + caches + logits + max(profile.activations for profile in engine.profiles)
    if spec.vision is not None and spec.vision.engine is not None:
        tower = spec.vision.engine
        total += tower.weights + tower.activations + sum(weight.given_size for weight in spec.vision.weights)
    return total


def _memory(spec: FolderSpec, engine: EngineSpec, driver: Driver, number: int) -> str:
    needed, free = gpu_bytes(spec, engine), Device(driver, number).free_memory()
    if needed > free:
        raise SessionError(
            f"weights, caches and activations take {size(needed)}, {size(free)} of the GPU's memory are free: end what "
            "else runs there, or build with a smaller --max-batch or --max-seq, or --weight-streaming"
        )
    return f"{size(needed)} of {size(free)} that are free"


def _jetson(engine: EngineSpec) -> list[Finding]:
    """Looks at a Jetson's own system; nothing on other machines."""
    try:
        model = JETSON_MODEL.read_text("utf-8").rstrip("\0\n")
        release = JETSON_RELEASE.read_text("utf-8")
    except (OSError, ValueError):
        return []
    match = re.match(r"# R(\d+)", release)
    linux = int(match[1]) if match else 0
    if engine.flavour == "tensorrt-rtx":
        said = f"{model}: there is no TensorRT-RTX for Jetsons: build there with --target tensorrt"
        return [found("Jetson", said)]
    if 0 < linux < JETPACK_7 and not engine.version.startswith(("8.", "10.")):
        return [
            found(
                "Jetson",
                f"{model} has Jetson Linux {linux}, whose JetPack stays on TensorRT 10, the engine is of "
                f"{engine.version}: install JetPack 7.2.2, which has TensorRT 11.4",
            )
        ]
    return [ok("Jetson", f"{model}, Jetson Linux {linux or 'unknown'}")]
