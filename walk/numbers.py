"""A folder's weights as the numbers that they stand for, whatever form they are stored in.

Enters: a lowered graph's list of regions, and the files. Leaves: float32 tensors by the names that `export.walk` asks
for, one at a time, quantised ones times their scales.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..files.safetensors import Region
from ..plugins.cpu.panels import stored_values
from ..plugins.narrow_types import unpack_int4, widen
from ..spec.stored_weights import Weight
from ..spec.types import CODES
from .decoder import TORCH_DTYPES, Weights


class FolderWeights(Weights):
    """The weights of a model or of a bundle for the CPU.

    Args:
        weights: Where the graph's initializers lie; of stacked experts each is one.
        files: The weight files by name.
    """

    def __init__(self, weights: Sequence[Weight], files: Mapping[str, Path]) -> None:
        super().__init__({})
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

    def wide(self, name: str, index: int | None = None) -> Tensor:
        """A tensor in float32; of a stacked one the part `index`."""
        part = "" if index is None else f"[{index}]"
        made = next((each for each in (f"{name}:panels", name, name + part) if each in self.made), None)
        if made is not None:
            path, weight = self.made[made]
            values = stored_values(_read(path, weight), weight, index if weight.stacked else None).astype(np.float32)
            shape = values.shape
            if weight.layout == "panels" and weight.convert in ("bfloat16", "float32"):
                return torch.from_numpy(values).view(shape)
        else:
            path, region = self.region(name + part)
            if region.dtype in TORCH_DTYPES:
                return self.stored(name + part).float()
            values, shape = _values(path, region), region.shape
        if name.endswith("_scale"):
            return torch.from_numpy(values).view(shape)
        scale = self.wide(f"{name}_scale", index)
        if index is None:  # [N, K], a scale a row or a block of it
            values_NK = torch.from_numpy(values).view(shape[0], -1)
            scale_NG = scale.view(len(values_NK), -1)
            return values_NK * scale_NG.repeat_interleave(values_NK.shape[1] // scale_NG.shape[1], dim=1)
        values_KN = torch.from_numpy(values).view(-1, shape[-1])  # a scale a column or a block of it
        scale_GN = scale.view(-1, values_KN.shape[1])
        return values_KN * scale_GN.repeat_interleave(len(values_KN) // len(scale_GN), dim=0)


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
