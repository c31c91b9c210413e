"""The ranges of shapes that engines are built for: an engine takes no other.

Enters: what a person asked for and what a network holds. Leaves: profiles, as a bundle records them, and the smallest,
usual and largest shape of each input, as TensorRT takes them.
"""

from collections.abc import Mapping, Sequence

from ..spec.built_engine import CacheInput, Profile
from ..spec.folder import FolderSpec
from ..spec.geometry import VisionSpec

Shapes = Mapping[str, tuple[Sequence[int], Sequence[int], Sequence[int]]]
"""Smallest, usual and largest shape of each input, by its name."""

LOGITS = 128
"""Positions of one prefill piece that get logits at most: a vocabulary of 202,048 takes 0.8 MB each in float32."""

USUAL_TILES = 5
"""Tiles that the vision tower is tuned for: a photo's grid of four, and the whole of it once more."""


def decoder_profiles(caches: Sequence[CacheInput], max_batch: int, max_prefill: int) -> tuple[Profile, ...]:
    """One profile for single tokens of many rows, one for pieces; no piece is longer than the smallest cache."""
    longest = min(max_prefill, *(cache.shape[1] for cache in caches))
    decode = Profile(name="decode", max_batch=max_batch, usual_batch=1, max_length=1, usual_length=1, max_logits=1)
    prefill = Profile(
        name="prefill",
        max_batch=max_batch,
        usual_batch=1,
        max_length=longest,
        usual_length=max(longest // 2, 1),
        max_logits=min(LOGITS, longest),
    )
    return decode, prefill


def decoder_shapes(spec: FolderSpec, profile: Profile, caches: Sequence[CacheInput]) -> Shapes:
    """The decoder's inputs in a profile; weights have one shape. Image features enter with pieces only."""
    batches = (1, profile.usual_batch, profile.max_batch)
    lengths = (1, profile.usual_length, profile.max_length)
    found = {
        "input_ids": _each(batches, lengths),
        "past_lengths": _each(batches),
        "logit_positions": _each(batches, (1, 1, profile.max_logits)),
        **{f"past.{cache.name}": _each(batches, *((size,) * 3 for size in cache.shape)) for cache in caches},
    }
    if spec.vision is not None:
        usual, most = (batch * length for batch, length in zip(batches[1:], lengths[1:], strict=True))
        rows = (1, usual, most) if profile.max_length > 1 else (1, 1, 1)
        found["image_features"] = _each(rows, (spec.model.hidden_size,) * 3)
    return found


def tower_shapes(vision: VisionSpec, max_tiles: int) -> Shapes:
    """The vision tower's input."""
    tiles, side = (1, min(USUAL_TILES, max_tiles), max_tiles), (vision.image_size,) * 3
    return {"pixels": _each(tiles, (3, 3, 3), side, side)}


def _each(*sizes: tuple[int, int, int]) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
    """The smallest, usual and largest of each dimension as three shapes."""
    smallest, usual, largest = zip(*sizes, strict=True)
    return smallest, usual, largest
