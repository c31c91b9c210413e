"""A checkpoint as a side, walked by PyTorch layer by layer over all sequences.

Enters: a Hugging Face checkpoint. Leaves: logits and chosen experts, block by block. Memory holds one layer; the hidden
states lie in mapped files.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ...errors import AccuracyError
from ...export.checkpoint import open_checkpoint
from ...files.disks import take_room
from ...spec.recipe import Recipe
from ...spec.types import Progress
from ...walk.accelerator import HOST, memory_bounded, to_host
from ...walk.decoder import Hidden, LayerWalk, embed, open_head
from ...walk.numbers import Weights
from ...walk.tower import encode_tiles
from ...walk.windows import Windows
from .side import Block, in_order

TILES = 8
"""Tiles that PyTorch computes at once."""

BLOCK_BYTES = 1 << 28
"""Bytes of the logits that are computed at once from hidden states."""


class CheckpointSide:
    """A Hugging Face checkpoint, computed by PyTorch in float32 from the weights in the configuration's type."""

    recipe: Recipe | None = None
    blind: str | None = None

    def __init__(self, path: Path, device: torch.device = HOST) -> None:
        self.path = path
        opened = open_checkpoint(path.absolute())
        if opened.quantised is not None:
            method = opened.quantised.scheme.method
            raise AccuracyError(f"{path} is quantised ({method}): export it, and give the model folder")
        self.spec, self.vision = opened.spec, opened.vision
        files = {shard.path.name: shard.path for shard in opened.shards}
        places = {name: (each.shard.path.name, each.region.offset) for name, each in opened.tensors.items()}
        self.weights = Weights(files, places, opened.spec.dtype, device)

    def score(self, windows: Windows, decoded: int, progress: Progress) -> Iterator[Block]:
        """Scores rows; whole sequences, there is no cache."""
        spec, count, ids_WS = self.spec, len(self.spec.layers), windows.ids_WS
        features_MH = windows.features_in_order(self.encode(windows, progress))
        with (
            hidden_states((*ids_WS.shape, spec.hidden_size)) as (x, attended, out),
            memory_bounded(self.weights.device),
        ):
            embed(self.weights, ids_WS, x, windows.image_token, features_MH)
            chosen = []
            for index, layer in enumerate(spec.layers):
                progress(f"PyTorch, layer {index}", index * ids_WS.size // count, ids_WS.size)
                walk = LayerWalk(spec, index, self.weights, attended, out)
                self.weights.read_ahead(f"layers.{index + 1}.")
                walk.run(x)
                if layer.experts:
                    chosen.append(in_order(walk.chosen().numpy()))
                self.weights.release()
                x, out = out, x
            experts_LTK = np.stack(chosen) if chosen else None
            for row, start, logits_NV in self._head(x):
                at = row * ids_WS.shape[1] + start
                experts = None if experts_LTK is None else experts_LTK[:, at : at + len(logits_NV)]
                yield Block(row, start, logits_NV, experts)

    def _head(self, x: Hidden) -> Iterator[tuple[int, int, NDArray[np.float32]]]:
        """The logits of the last hidden states, some tokens at a time."""
        head = open_head(self.spec, self.weights)
        at_once = max(1, BLOCK_BYTES // (4 * self.spec.vocab_size))
        for row, hidden_SH in enumerate(x):
            for start in range(0, len(hidden_SH), at_once):
                part = self.weights.place(hidden_SH[start : start + at_once])
                yield row, start, to_host(head(part))

    def encode(self, windows: Windows, progress: Progress) -> NDArray[np.float32] | None:
        """The image features [M, H] of all tiles; None where there are none."""
        if windows.vision is None or not len(windows.pixels_N3PP):
            return None
        found, tiles = [], len(windows.pixels_N3PP)
        for start in range(0, tiles, TILES):
            progress("PyTorch, tiles", start, tiles)
            part = windows.pixels_N3PP[start : start + TILES].astype(np.float32)
            found.append(encode_tiles(windows.vision, self.weights, part))
        self.weights.release()
        return np.concatenate(found)

    def generate(self, windows: Windows, window: int, prompt: int, count: int) -> list[int] | None:
        """None: without a cache each token would cost a walk over all weights."""
        return None

    def close(self) -> None:
        """Releases the mapped pages."""
        self.weights.release()


@contextmanager
def hidden_states(shape: tuple[int, ...]) -> Iterator[tuple[Hidden, Hidden, Hidden]]:
    """Three arrays of hidden states in mapped files, which go when the block ends."""
    with tempfile.TemporaryDirectory(prefix="arriero-") as folder:
        paths = [Path(folder) / name for name in "abc"]
        for path in paths:
            take_room(path, int(np.prod(shape)) * 4)
        first, second, third = (np.memmap(path, np.float32, "r+", shape=shape) for path in paths)
        yield first, second, third
