"""A model's weights as the numbers that they stand for, whatever form they are stored in.

Enters: safetensors files; of a lowered graph its list of regions in them. Leaves: float32 tensors by the names that
they have in a text-only checkpoint, one at a time, quantised ones times their scales.
"""

import copy
import mmap
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import CheckpointError
from ..files.agreement import check_weights
from ..files.mapping import map_file
from ..files.processors import processors
from ..files.safetensors import Region, open_shard
from ..plugins.cpu.panels import stored_values
from ..plugins.finite import all_finite
from ..plugins.narrow_types import unpack_int4, widen
from ..spec.geometry import VISION
from ..spec.stored_weights import Weight
from ..spec.types import CODES, FLOATS, TYPES, DType
from .accelerator import HOST

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Torch's integers by their bytes."""

TORCH_DTYPES = {CODES[name]: getattr(torch, TYPES[name].torch) for name in FLOATS}
"""Torch's float types by their safetensors codes."""


def fit_threads() -> None:
    """Gives PyTorch no more threads than the processors that this process may use; it sees no container's quota."""
    if torch.get_num_threads() > (count := processors()):
        torch.set_num_threads(count)


class Weights:
    """A model's stored tensors, by the names that they have in a text-only checkpoint.

    Every tensor is checked when it is first read: NaN or infinity is refused by its name.

    Args:
        files: The safetensors files.
        places: File name and first byte of each tensor that counts; what else the files hold is passed over. None takes
            all.
        dtype: Type that tensors are rounded to, where a checkpoint's are of several; None takes each as it is stored.
        device: Where the numbers are computed with.

    Raises:
        CheckpointError: A file is damaged, or a tensor is of a type that is no float.
    """

    def __init__(
        self,
        files: Mapping[str, Path],
        places: Mapping[str, tuple[str, int]] | None = None,
        dtype: DType | None = None,
        device: torch.device = HOST,
    ) -> None:
        self.device = device
        self.regions: dict[str, tuple[Path, Region]] = {}
        self.full_names: dict[str, str] = {}
        self.maps: dict[Path, mmap.mmap] = {}
        self.finite: set[tuple[str, int | None]] = set()
        self.dtype = None if dtype is None else TORCH_DTYPES[CODES[dtype]]
        fit_threads()
        for file, path in files.items():
            for name, region in open_shard(path).tensors.items():
                if places is not None and places.get(name) != (file, region.offset):
                    continue
                short = name.removeprefix("language_model.").removeprefix("model.")
                self.regions[short], self.full_names[short] = (path, region), name

    def region(self, name: str) -> tuple[Path, Region]:
        """The file of a tensor and where it lies in it."""
        if name not in self.regions:
            raise CheckpointError(f"tensor {name!r} is in none of the weight files: export the model again")
        return self.regions[name]

    def has(self, name: str) -> bool:
        """Whether a tensor is there."""
        return name in self.regions

    def full_name(self, name: str) -> str:
        """A tensor's name under the checkpoint's prefix, whether it is stored or new beside stored ones."""
        if name.startswith(VISION):
            return name
        beside = "lm_head.weight" if name.startswith("lm_head.") else "norm.weight"
        return self.full_names[beside].removesuffix(beside) + name

    def stored(self, name: str, index: int | None = None) -> Tensor:
        """A tensor as it is stored, a view of the mapped file; of a stacked one the part `index`.

        Raises:
            CheckpointError: It is missing, no float, or holds NaN or infinity.
        """
        if index is not None and name not in self.regions and f"{_single(name, index)[0]}.weight" in self.regions:
            linears = [self.stored(f"{each}.weight") for each in _single(name, index)]
            return torch.cat([linear.T for linear in linears], dim=1)
        tensor = self._view(name, index)
        if (name, index) not in self.finite:
            if not all_finite(tensor.view(INTEGERS[tensor.element_size()]).numpy(), self.region(name)[1].dtype):
                raise CheckpointError(not_finite(self.full_names.get(name, name), self.region(name)[0], index))
            self.finite.add((name, index))
        return tensor if self.dtype is None else tensor.to(self.dtype)

    def _view(self, name: str, index: int | None) -> Tensor:
        """A view of the mapped file; a copy where elements are misaligned."""
        path, region = self.region(name)
        if region.dtype not in TORCH_DTYPES:
            raise CheckpointError(f"tensor {name!r} is {region.dtype}, expected {', '.join(sorted(TORCH_DTYPES))}")
        if path not in self.maps:
            self.maps[path] = map_file(path, mmap.ACCESS_COPY)
        dtype, shape = TORCH_DTYPES[region.dtype], region.shape
        size, offset = region.size, region.offset
        if index is not None:
            size, shape = size // shape[0], shape[1:]
            offset += index * size
        if offset % dtype.itemsize:  # a view of misaligned elements is not one that kernels may read
            data = bytearray(self.maps[path][offset : offset + size])
            return torch.frombuffer(data, dtype=dtype).view(shape)
        return torch.frombuffer(self.maps[path], dtype=dtype, count=size // dtype.itemsize, offset=offset).view(shape)

    def wide(self, name: str, index: int | None = None) -> Tensor:
        """A tensor in float32, exactly as stored, on the device."""
        return self.stored(name, index).to(self.device).float()

    def factor(self, name: str, index: int | None = None) -> Tensor:
        """A product's weight on the device, of any float type: as it is stored, which takes no second memory."""
        return self.stored(name, index).to(self.device)

    def place(self, array: NDArray[np.float32]) -> Tensor:
        """An array as a tensor on the device."""
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def read_ahead(self, prefix: str) -> None:
        """Has the system read the tensors whose names begin so, while a device computes with others."""
        if self.device == HOST or not hasattr(os, "posix_fadvise"):
            return
        for name, (path, region) in self.regions.items():
            if name.startswith(prefix):
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), region.offset, region.size, os.POSIX_FADV_WILLNEED)

    def on(self, device: torch.device) -> "Weights":
        """Gives these weights to a walk on another device."""
        other = copy.copy(self)
        other.device = device
        return other

    def release(self) -> None:
        """Releases the pages read so far; they come back from the files where they are used again."""
        self.maps.clear()


class FolderWeights(Weights):
    """The weights of a model or of a bundle for the CPU.

    Args:
        weights: Where the graph's initializers lie; of stacked experts each is one.
        files: The weight files by name.
    """

    def __init__(self, weights: Sequence[Weight], files: Mapping[str, Path]) -> None:
        super().__init__({})
        check_weights(weights, files)
        self.made: dict[str, tuple[Path, Weight]] = {}
        for weight in weights:
            full, _, form = weight.name.partition(":")  # behind it stands how the graph wants it
            short = full.removeprefix("language_model.").removeprefix("model.")
            path, self.full_names[short] = files[weight.file], full
            if weight.is_made:
                self.made[f"{short}:{form}" if form else short] = path, weight
                continue
            parts = weight.shape[0] if weight.stacked else 1
            shape, size = weight.shape[1:] if weight.stacked else weight.shape, weight.size // parts
            for index in range(parts):
                region = Region(CODES[weight.dtype], shape, weight.offset + index * size, size)
                self.regions[f"{short}[{index}]" if weight.stacked else short] = path, region

    def has(self, name: str) -> bool:
        """Whether a tensor is there, as it was stored or as it was made for the graph."""
        return name in self.regions or name in self.made or f"{name}:panels" in self.made

    def wide(self, name: str, index: int | None = None) -> Tensor:
        """A tensor in float32; of a stacked one the part `index`."""
        part = "" if index is None else f"[{index}]"
        made = next((each for each in (f"{name}:panels", name, name + part) if each in self.made), None)
        if made is not None:
            path, weight = self.made[made]
            values = stored_values(_read(path, weight), weight, index if weight.stacked else None).astype(np.float32)
            shape = values.shape
            if weight.layout == "panels" and weight.convert in ("bfloat16", "float32"):
                return self._numbers(name, path, values).view(shape)
        else:
            path, region = self.region(name + part)
            if region.dtype in TORCH_DTYPES:
                return self.stored(name + part).float()
            values, shape = _values(path, region), region.shape
        numbers = self._numbers(name, path, values)
        if name.endswith("_scale"):
            return numbers.view(shape)
        scale = self.wide(f"{name}_scale", index)
        values_NK = numbers.view(shape[0], -1)  # a scale a row or a block of it
        scale_NG = scale.view(len(values_NK), -1)
        wide_NK = values_NK * scale_NG.repeat_interleave(values_NK.shape[1] // scale_NG.shape[1], dim=1)
        return wide_NK if index is None else wide_NK.T

    def factor(self, name: str, index: int | None = None) -> Tensor:
        """A product's weight in float32: quantised ones must be multiplied by their scales."""
        return self.wide(name, index)

    def _numbers(self, name: str, path: Path, values: np.ndarray) -> Tensor:
        """Widened values as a tensor.

        Raises:
            CheckpointError: One is NaN or infinite.
        """
        if not all_finite(values, "F32"):
            raise CheckpointError(not_finite(name, path))
        return torch.from_numpy(values)


def not_finite(name: str, path: Path, index: int | None = None) -> str:
    """The message about a tensor that holds NaN or infinity."""
    where = "" if index is None else f", expert {index},"
    return f"tensor {name!r}{where} holds NaN or infinity: {path} is damaged, restore it or download it again"


def _single(name: str, index: int) -> list[str]:
    """The linears of one expert that stand side by side in its part of a stack, where experts are stored one by one."""
    unit, _, part = name.rpartition(".")
    return [f"{unit}.{index}.{each}_proj" for each in (("gate", "up") if part == "gate_up_proj" else ("down",))]


def _read(path: Path, weight: Weight) -> np.ndarray:
    return np.fromfile(path, np.uint8, weight.size, offset=weight.offset)


def _values(path: Path, region: Region) -> np.ndarray:
    """Quantised values in float32."""
    data = np.fromfile(path, np.uint8, region.size, offset=region.offset)
    match region.dtype:
        case "I8":
            return data.view(np.int8).astype(np.float32)
        case "F8_E4M3":
            return widen(data, "fp8")
        case _:
            return unpack_int4(data).astype(np.float32)
