"""The device that a walk computes on, where it is asked for by name.

Enters: a name, as `--device` has it. Leaves: PyTorch's device. Weights and hidden states lie on the host whatever it
is: one weight at a time is on the device, some rows, and statistics, so that its memory bounds no model's depth.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import DeviceError, shortened

HOST = torch.device("cpu")


def find_device(name: str) -> torch.device:
    """The device of a name.

    Args:
        name: `cpu`, `cuda`, `cuda:1`, or `auto`: a GPU where PyTorch finds one.

    Raises:
        DeviceError: There is no such device here.
    """
    if name == "auto":
        return torch.device("cuda") if torch.cuda.is_available() else HOST
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise DeviceError(f"device is {shortened(name)}, expected cpu, cuda, cuda:1 or auto")
    if device.type == "cpu":
        return HOST
    if not torch.cuda.is_available():
        why = "is built without CUDA" if torch.version.cuda is None else "finds no GPU that its driver can use"
        raise DeviceError(f"device is {name!r}, PyTorch {torch.__version__} {why}: mend that, or take --device cpu")
    if (device.index or 0) >= (count := torch.cuda.device_count()):
        raise DeviceError(f"device is {name!r}, PyTorch finds {count}: the first is cuda:0")
    return device


@contextmanager
def memory_bounded(device: torch.device) -> Iterator[None]:
    """Turns the end of a device's memory into an error that says what to do.

    Raises:
        DeviceError: It has too little.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        said = str(error).partition(". ")[0]
        raise DeviceError(
            f"{device}: {said}: free its memory, or take --device cpu, which goes on from where this ended"
        ) from error


def to_host(x: Tensor) -> NDArray[np.float32]:
    """A tensor's values as an array."""
    array: NDArray[np.float32] = x.cpu().numpy()
    return array
