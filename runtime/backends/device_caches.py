"""KV caches on a GPU: the rows of a state in one piece of device memory, which the next state takes over.

Enters: numbers of rows. Leaves: the address of each cache's rows. Invariants: every row of every cache begins at a
multiple of 256, as TensorRT wants it; memory that a state gives back is kept for the next, so that starting one
allocates nothing where one like it has been.
"""

import weakref
from collections.abc import Callable, Sequence

import numpy as np

from ...errors import SessionError
from ...plugins.launch import ALIGNMENT, power_of_two
from ...spec.built_engine import CacheInput
from ...spec.geometry import ModelSpec
from .device import Device, DeviceMemory
from .interface import Slots, cache_chunk, is_standing, slots_of


class CachePool:
    """Memory for caches that is in nobody's use.

    Args:
        device: The GPU.
        caches: The engine's.
        most: Rows of a state at most.
        clears: Whether memory is zeros each time: TensorRT's own attention weighs what it masks with 0, which a NaN
            that an earlier sequence left would survive. Our kernels do not read it.
        dropped: Called when memory is freed: its address means nothing any more.
    """

    def __init__(
        self, device: Device, caches: Sequence[CacheInput], most: int, *, clears: bool, dropped: Callable[[], None]
    ) -> None:
        self.device, self.most, self.clears, self.dropped = device, most, clears, dropped
        if odd := [each.name for each in caches if each.row_size % ALIGNMENT]:
            raise SessionError(f"the rows of cache {odd[0]} do not begin at multiples of {ALIGNMENT}: build again")
        self.row_size = sum(each.row_size for each in caches)
        self.free: dict[int, list[DeviceMemory]] = {}

    def take(self, batch: int) -> DeviceMemory:
        """Memory for that many rows, or for more: numbers of rows are doubled. It is zeros, or holds earlier rows."""
        rows = max(batch, min(power_of_two(batch), self.most))
        if found := self.free.get(rows):
            memory = found.pop()
            if self.clears:
                memory.zero()
            return memory
        try:
            memory = DeviceMemory(self.device, rows * self.row_size)
        except SessionError:
            if not any(self.free.values()):
                raise
            self.free.clear()  # room for this one
            self.dropped()
            memory = DeviceMemory(self.device, rows * self.row_size)
        memory.zero()
        return memory

    def give(self, memory: DeviceMemory) -> None:
        """Takes memory back for the next state."""
        self.free.setdefault(memory.size // self.row_size, []).append(memory)


class DeviceCaches:
    """KV buffers of a batch of sequences on the GPU. What earlier sequences left in them is attended by nobody."""

    def __init__(self, pool: CachePool, spec: ModelSpec, caches: Sequence[CacheInput], batch: int, positions: int):
        self.device, self.pool, self.spec, self.about = pool.device, pool, spec, tuple(caches)
        self.batch, self.positions = batch, positions
        self.row_sizes = {each.name: each.row_size for each in caches}
        self.memory = pool.take(batch)
        weakref.finalize(self, pool.give, self.memory).atexit = False
        self.sharpness = np.ones(self.memory.size // pool.row_size, np.float32)  # one over the rows' temperatures
        self.addresses, at = {}, self.memory.address
        rows = self.memory.size // pool.row_size
        for each in caches:
            self.addresses[each.name] = at
            at += rows * each.row_size

    @property
    def address(self) -> int:
        """The address of all of them, which says which memory they are."""
        return self.memory.address

    def copy(self, source: int, target: int, past: int) -> None:
        """Copies a whole row over another, whatever it holds: the GPU is quick at that."""
        self.device.enter()
        self.sharpness[target] = self.sharpness[source]
        for name, address in self.addresses.items():
            size = self.row_sizes[name]
            self.device.copy(address + source * size, address + target * size, size)

    def read(self, row: int, start: int, stop: int) -> Slots:
        """Copies some positions of one chunk in a row to the host's memory: bytes, a line a head."""
        self.device.enter()
        found = {}
        for each in self.about:
            lines = np.empty((each.shape[0], (stop - start) * self._slot_size(each)), dtype=np.uint8)
            for address, line in zip(self._lines(each, row, start), lines, strict=True):
                self.device.fetch(address, line)
            found[each.name] = lines
        self.device.synchronise()
        return found

    def write(self, row: int, start: int, slots: Slots, past: int) -> None:
        """Puts back what `read` gave from `start` on, where tokens after the first `past` attend to it."""
        self.device.enter()
        for each in self.about:
            if is_standing(cache_chunk(self.spec, each.name), start, past):
                for address, line in zip(self._lines(each, row, start), slots[each.name], strict=True):
                    self.device.upload(address, line)

    def row_bytes(self, tokens: int) -> int:
        """Bytes of a row, however few tokens it holds: an engine's rows are whole."""
        return sum(self.row_sizes.values())

    def release(self, row: int) -> None:
        """Does nothing: a row's memory is there as long as the others'."""

    def _lines(self, cache: CacheInput, row: int, start: int) -> list[int]:
        """The address of a position in a row, for each head."""
        slot = slots_of(cache_chunk(self.spec, cache.name), start, start).start
        heads, capacity, _ = cache.shape
        first = self.addresses[cache.name] + row * cache.row_size
        return [first + (head * capacity + slot) * self._slot_size(cache) for head in range(heads)]

    @staticmethod
    def _slot_size(cache: CacheInput) -> int:
        return cache.row_size // (cache.shape[0] * cache.shape[1])
