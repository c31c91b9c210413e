"""The ranks' portions of quantised weights: groups of inputs that a split cuts, and what cannot be cut."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arriero.errors import ExportError
from arriero.export.rank_weights import Source, place_ranks
from arriero.export.split import Split
from arriero.files.safetensors import Region, encode_header, identity, open_shard

NAME = "model.layers.0.self_attn.o_proj.weight"


def source_of(folder: Path, outputs: int, inputs: int, groups: int) -> tuple[Source, Any, Any]:
    """A file of one int4 matrix [N, K], two values a byte, and its scales [N, groups]."""
    rng = np.random.default_rng(inputs)
    packed = rng.integers(0, 256, (outputs, inputs // 2)).astype(np.uint8)
    scales = rng.random((outputs, groups)).astype(np.float32)
    path = folder / "weights.safetensors"
    header = encode_header({NAME: ("U8", packed.shape), f"{NAME}_scale": ("F32", scales.shape)})
    path.write_bytes(header + packed.tobytes() + scales.tobytes())
    source = Source(path=path, stays=True, fingerprint=identity(path), tensors=open_shard(path).tensors, is_int4={NAME})
    return source, packed, scales


def values(packed: Any, scales: Any) -> Any:
    """The matrix [N, K] that they stand for."""
    wide = np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1).astype(np.float32)
    return wide * scales.repeat(wide.shape[1] // scales.shape[1], axis=1)


def read(path: Path, region: Region, dtype: Any) -> Any:
    return np.fromfile(path, dtype, region.size // np.dtype(dtype).itemsize, offset=region.offset).reshape(region.shape)


@pytest.mark.parametrize(("inputs", "groups", "ranks"), [(48, 3, 2), (64, 2, 4), (64, 4, 2), (64, 1, 2)])
def test_groups_that_a_split_cuts_become_smaller_ones(tmp_path: Path, inputs: int, groups: int, ranks: int) -> None:
    source, packed, scales = source_of(tmp_path, 4, inputs, groups)
    folders = [tmp_path / f"rank-{rank}" for rank in range(ranks)]
    for each in folders:
        each.mkdir()
    split = Split(ranks=ranks)
    placed = place_ranks([source], folders, split, lambda name, rank: True, "float32", False, lambda *_: None)
    parts = []
    for folder, placement in zip(folders, placed, strict=True):
        paths = {file.name: Path(file.path or folder / file.name) for file in placement.files}
        found = {
            name: read(paths[file], region, np.uint8 if name == NAME else np.float32)
            for name, (file, region) in placement.regions.items()
        }
        parts.append(values(found[NAME], found[f"{NAME}_scale"]))
    assert np.array_equal(np.concatenate(parts, axis=1), values(packed, scales))


@pytest.mark.parametrize(
    ("inputs", "groups", "ranks", "said"),
    [
        (
            48,
            3,
            4,
            "has groups of 16 inputs, of which 4 ranks would leave 4, fewer than 8: split the model",
        ),
        (
            18,
            1,
            2,
            "has two int4 values in a byte, and 2 ranks would cut one of 9 bytes: split the model",
        ),
    ],
)
def test_what_cannot_be_cut_is_refused(tmp_path: Path, inputs: int, groups: int, ranks: int, said: str) -> None:
    source, _, _ = source_of(tmp_path, 4, inputs, groups)
    with pytest.raises(ExportError, match=said):
        place_ranks(
            [source], [tmp_path] * ranks, Split(ranks=ranks), lambda *_: True, "float32", False, lambda *_: None
        )
