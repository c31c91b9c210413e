"""A built engine's file, and whether this machine is the one it was built for.

Enters: a bundle's record of an engine. Leaves: TensorRT's module and its engine object. Invariant: the driver, the GPU,
TensorRT's version and the file are compared in this order, so that the first that does not fit is the one named.
"""

import hashlib
import importlib
from pathlib import Path
from typing import Any

from ...errors import FolderError, SessionError
from ...files.reading import read_bytes
from ...plugins.launch import Driver
from ...plugins.tensorrt_plugin import MODULES, REMEDIES
from ...spec.built_engine import EngineSpec

LARGEST = 1 << 40
"""Bytes of an engine at most."""

REASONS = {
    "VERSION_MISMATCH": "another version of TensorRT-RTX built it: build it again here",
    "UNSUPPORTED_CC": "it was not built for this GPU: build it for this one",
    "OLD_CUDA_DRIVER": "NVIDIA's driver is too old for it: install a newer driver",
    "OLD_CUDA_RUNTIME": "the CUDA runtime is too old for it: install the TensorRT-RTX that built it",
    "INSUFFICIENT_GPU_MEMORY": "the GPU has too little memory: build with a smaller --max-batch or --max-seq",
    "MALFORMED_ENGINE": "the file is damaged: build it again",
    "CUDA_ERROR": "CUDA's driver or runtime is not installed as it must be: install NVIDIA's driver again",
}
"""TensorRT-RTX's diagnostics of an engine, in the order in which they are reported."""


def check_machine(folder: Path, about: EngineSpec, driver: Driver, number: int = 0) -> int:
    """Compares driver and GPU, by its number, with those an engine is for. Returns the GPU's compute capability.

    Raises:
        SessionError: The driver is too old, or the GPU another.
    """
    major, minor = driver.version()
    if major < about.cuda:
        raise SessionError(
            f"this machine's NVIDIA driver serves CUDA {major}.{minor}, {about.flavour} {about.version} needs "
            f"CUDA {about.cuda}: install a newer driver"
        )
    capability = driver.capability(number)
    if capability not in about.capabilities:
        built_for = ", ".join(f"sm{each}" for each in about.capabilities)
        raise SessionError(f"{folder} was built for {built_for}, this GPU is sm{capability}: build for sm{capability}")
    return capability


def open_version(about: EngineSpec) -> Any:
    """Imports the TensorRT that built an engine.

    Raises:
        SessionError: It is not installed, or of another version.
    """
    try:
        trt = importlib.import_module(MODULES[about.flavour])
    except (ImportError, OSError) as error:
        needed = f"this bundle needs {about.flavour} {about.version}, which does not load ({error})"
        raise SessionError(f"{needed}: {REMEDIES[about.flavour]}") from error
    if trt.__version__ != about.version:
        raise SessionError(
            f"this bundle was built by {about.flavour} {about.version}, here is {trt.__version__}: "
            f"install that version, or build again"
        )
    return trt


def read_built(path: Path, sha256: str) -> bytes:
    """Reads a file of a bundle.

    Raises:
        FolderError: It is missing, or not the one that was built.
    """
    remedy = "build the bundle again"
    try:
        found = read_bytes(path, remedy=remedy, folder=path.parent, most=LARGEST)
    except FileNotFoundError as error:
        raise FolderError(f"{path}: {error.strerror}: {remedy}") from error
    if hashlib.sha256(found).hexdigest() != sha256:
        raise FolderError(f"{path} is not what was built (truncated or changed): build the bundle again")
    return found


def deserialise(trt: Any, data: bytes, path: Path) -> Any:
    """Makes TensorRT's engine object of a serialized engine.

    Args:
        trt: The module `tensorrt_rtx` or `tensorrt`.
        data: The serialized engine.
        path: The file that it was read from.

    Raises:
        SessionError: TensorRT does not take it.
    """
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    if hasattr(runtime, "get_engine_validity"):
        validity, found = runtime.get_engine_validity(data)
        if validity == trt.EngineValidity.INVALID:
            known = trt.EngineInvalidityDiagnostics
            reasons = [text for name, text in REASONS.items() if int(getattr(known, name).value) & int(found)]
            raise SessionError(f"TensorRT-RTX does not take {path}: {(reasons or ['it does not say why'])[0]}")
    engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        raise SessionError(f"TensorRT does not take {path} (its message is above): build it again on this machine")
    return engine
