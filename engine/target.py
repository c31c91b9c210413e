"""The targets that a bundle can be built for: ONNX Runtime's CPU, TensorRT-RTX, or TensorRT, and their GPUs.

Invariant: what the target cannot do is found before any work, and named with a remedy.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from ..errors import BuildError
from ..spec.built_engine import FP8_FROM

Flavour = Literal["cpu", "tensorrt-rtx", "tensorrt"]

CAPABILITIES: dict[str, tuple[int, ...]] = {
    "tensorrt-rtx": (80, 86, 89, 120, 121),
    "tensorrt": (80, 86, 89, 90, 100, 103, 120, 121),
}
"""Compute capabilities that each flavour builds for. Before 80 our kernels spill, and want more shared memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A parsed target.

    Attributes:
        flavour: The engine.
        capabilities: Compute capabilities, as in 89; none for the CPU, and none for `tensorrt` where the GPU at hand
            decides.
    """

    flavour: Flavour
    capabilities: tuple[int, ...] = ()

    def __str__(self) -> str:
        names = ",".join(f"sm{capability}" for capability in self.capabilities)
        return f"{self.flavour}:{names}" if names else self.flavour


def parse_target(text: str) -> Target:
    """Reads a target such as `cpu`, `tensorrt-rtx:sm89,sm120` or `tensorrt`.

    Raises:
        BuildError: It is none of these.
    """
    flavour, _, listed = text.partition(":")
    match flavour:
        case "cpu" if not listed:
            return Target(flavour="cpu")
        case "tensorrt-rtx" if not listed:
            raise BuildError(
                "tensorrt-rtx builds for named GPUs: give their compute capabilities, as in tensorrt-rtx:sm89,sm120"
            )
        case "tensorrt-rtx" | "tensorrt":
            capabilities = tuple(_capability(name, flavour) for name in listed.split(",")) if listed else ()
            return Target(flavour=flavour, capabilities=tuple(sorted(set(capabilities))))
    raise BuildError(f"target {text!r} is unknown: choose cpu, tensorrt-rtx:smNN[,smNN…] or tensorrt[:smNN]")


def _capability(name: str, flavour: str) -> int:
    match = re.fullmatch(r"sm_?(\d+)a?", name.strip())
    known = CAPABILITIES[flavour]
    if match is None or int(match[1]) not in known:
        others = ", ".join(f"sm{capability}" for capability in known)
        raise BuildError(f"{flavour} builds for {others}, not for {name.strip()!r}: choose among these")
    return int(match[1])


def check_dtypes(target: Target, dtypes: Iterable[str]) -> None:
    """Checks that each GPU of the target computes in each type of the model.

    Raises:
        BuildError: One does not.
    """
    too_old = [capability for capability in target.capabilities if capability < FP8_FROM]
    if "fp8" in set(dtypes) and too_old:
        raise BuildError(
            f"FP8 needs sm{FP8_FROM} or later; this model's recipe is fp8 and the target sm{too_old[0]}: "
            f"calibrate with --recipe int8 or target sm{FP8_FROM}"
        )
