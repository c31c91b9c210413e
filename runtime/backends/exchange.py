"""The buffers through which steps of one profile take their inputs and give their logits.

Enters: a piece's ids, lengths and positions. Leaves: addresses for the engine, and logits on the host. Invariant: all
that a step over single tokens needs is allocated at the start, so that its addresses stay; what pieces need grows by
doubling.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ...plugins.launch import ALIGNMENT, power_of_two, round_up
from ...spec.built_engine import Profile
from .device import Device, DeviceMemory, PinnedMemory

MOST_PINNED = 64 << 20
"""Bytes of logits that pass through pinned memory at most: more are a whole text's."""

SENT = ("past_lengths", "sharpness", "logit_positions", "input_ids")
DTYPES = {"past_lengths": np.int32, "sharpness": np.float32, "logit_positions": np.int64, "input_ids": np.int64}


class Exchange:
    """The buffers of one profile.

    Args:
        device: The GPU.
        profile: The profile.
        vocabulary: Number of tokens (V).
        feature_row: Bytes of an image feature; 0 where the model takes none.
    """

    def __init__(self, device: Device, profile: Profile, vocabulary: int, feature_row: int) -> None:
        self.device, self.vocabulary = device, vocabulary
        rows = profile.max_batch
        counts = (rows, rows, rows * profile.max_logits, rows * profile.max_length)
        self.offsets, end = {}, 0
        for name, count in zip(SENT, counts, strict=True):
            self.offsets[name] = end
            end += round_up(count * np.dtype(DTYPES[name]).itemsize, ALIGNMENT)
        self.host, self.memory = PinnedMemory(device, end), DeviceMemory(device, end)
        self.host.bytes[:] = 0
        self.memory.zero()
        self.views = {
            name: self.host.bytes[offset:].view(np.uint8)[: count * np.dtype(DTYPES[name]).itemsize].view(DTYPES[name])
            for (name, offset), count in zip(self.offsets.items(), counts, strict=True)
        }
        self.addresses = {name: self.memory.address + offset for name, offset in self.offsets.items()}
        self.features: DeviceMemory | None = None
        if feature_row:
            self._reserve_features(feature_row)
        self.logits = DeviceMemory(device, rows * vocabulary * 4)
        self.results = PinnedMemory(device, rows * vocabulary * 4)

    def send(self, ids_BS: NDArray[np.int64], past_B: NDArray[np.int32], positions_BR: NDArray[np.int64]) -> None:
        """Sends a piece to the GPU, in one copy."""
        self.views["past_lengths"][: len(past_B)] = past_B
        self.views["logit_positions"][: positions_BR.size] = positions_BR.reshape(-1)
        self.views["input_ids"][: ids_BS.size] = ids_BS.reshape(-1)
        self.device.send(self.memory.address, self.host.address, self.offsets["input_ids"] + ids_BS.nbytes)

    def send_features(self, features: NDArray[np.generic]) -> None:
        """Sends a piece's image features."""
        address = self._reserve_features(features.nbytes)
        self.device.upload(address, features)

    def _reserve_features(self, size: int) -> int:
        if self.features is None or self.features.size < size:
            self.features = DeviceMemory(self.device, power_of_two(size))
            self.features.zero()
            self.addresses["image_features"] = self.features.address
        return self.features.address

    def reserve_logits(self, rows: int) -> int:
        """Makes room for that many rows of logits. Returns their address."""
        size = rows * self.vocabulary * 4
        if self.logits.size < size:
            self.logits = DeviceMemory(self.device, power_of_two(size))
        return self.logits.address

    def fetch(self, shape: Sequence[int], first: int = 0) -> NDArray[np.float32]:
        """The logits of the last step as a new array, from a row on; waits for them."""
        found = np.empty(shape, np.float32)
        address = self.logits.address + first * self.vocabulary * 4
        if found.nbytes > MOST_PINNED:
            self.device.download(address, found)
            return found
        if self.results.size < found.nbytes:
            self.results = PinnedMemory(self.device, power_of_two(found.nbytes))
        self.device.receive(address, self.results.address, found.nbytes)
        self.device.synchronise()
        found.reshape(-1)[:] = self.results.bytes[: found.nbytes].view(np.float32)
        return found
