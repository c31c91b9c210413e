"""A folder's weights as the numbers that they stand for, whatever form they are stored in.

Enters: a lowered graph's list of regions, and the files. Leaves: float32 tensors by the names that `export.walk` asks
for, one at a time, quantised ones times their scales.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..export.walk import TORCH_DTYPES, Weights
from ..plugins.layout import unpack_int4, widen
from ..shards import Region
from ..spec import Weight

FORMAT_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "I8", "fp8": "F8_E4M3", "int4": "U8"}


class FolderWeights(Weights):
    """The weights of a model or of a bundle for the CPU.

    Args:
        weights: Where the graph's initializers lie; of stacked experts each is one.
        files: The weight files by name.
    """

    def __init__(self, weights: Sequence[Weight], files: Mapping[str, Path]) -> None:
        super().__init__({})
        for weight in weights:
            full = weight.name.partition(":")[0]  # behind it stands how the graph wants it
            short = full.removeprefix("language_model.").removeprefix("model.")
            region = Region(FORMAT_NAMES[weight.dtype], weight.shape, weight.offset, weight.size)
            self.regions[short], self.full_names[short] = (files[weight.file], region), full

    def wide(self, name: str, index: int | None = None) -> Tensor:
        """A tensor in float32; of a stacked one the part `index`."""
        part = "" if index is None else f"[{index}]"
        path, region = self.region(name + part)
        if region.dtype in TORCH_DTYPES:
            return self.stored(name + part).float()
        data = np.fromfile(path, np.uint8, region.size, offset=region.offset)
        match region.dtype:
            case "I8":
                values = data.view(np.int8).astype(np.float32)
            case "F8_E4M3":
                values = widen(data, "fp8")
            case _:
                values = unpack_int4(data).astype(np.float32)
        scale = self.wide(f"{name}_scale{part}")
        if index is None:  # [N, K], a scale a row or a block of it
            values_NK = torch.from_numpy(values).view(region.shape[0], -1)
            scale_NG = scale.view(len(values_NK), -1)
            return values_NK * scale_NG.repeat_interleave(values_NK.shape[1] // scale_NG.shape[1], dim=1)
        values_KN = torch.from_numpy(values).view(-1, region.shape[-1])  # a scale a column or a block of it
        scale_GN = scale.view(-1, values_KN.shape[1])
        return values_KN * scale_GN.repeat_interleave(len(values_KN) // len(scale_GN), dim=0)
