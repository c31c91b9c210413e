"""Shortlists of a decode step's logits, made on the GPU: half a kilobyte a row comes back, not the row.

Enters: the logits that the step left on the GPU. Leaves: `Shortlist`s, which fetch their row where they are not enough.
"""

import threading
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ...plugins.launch import Kernels, Packed, placed, total_size
from ...plugins.shortlist.plan import COUNT, WORDS, Plan
from ..shortlist import Shortlist
from .device import Device, DeviceMemory, PinnedMemory
from .exchange import Exchange


class Shortener:
    """The kernels over one exchange's logits.

    Args:
        device: The GPU.
        kernels: The bundle's.
        exchange: Its logits, and one over each row's temperature.
        most: Rows at most.
        lock: Held by steps, and where a row is fetched.
    """

    def __init__(
        self, device: Device, kernels: Kernels, exchange: Exchange, most: int, lock: "threading.RLock"
    ) -> None:
        self.device, self.kernels, self.exchange, self.lock = device, kernels, exchange, lock
        self.plan = Plan(exchange.vocabulary)
        self.scratch = DeviceMemory(device, total_size(self.plan.workspace(most)))
        self.memory = DeviceMemory(device, most * WORDS * 4)
        self.host = PinnedMemory(device, most * WORDS * 4)
        self.words_BW: NDArray[np.int32] = self.host.bytes.view(np.int32).reshape(most, WORDS)
        self.packed = [self.pack(rows) for rows in range(1, most + 1)]

    def pack(self, rows: int) -> Packed:
        """The kernels for that many rows, ready to be put into a stream."""
        pointers = {"logits": self.exchange.logits.address, "sharpness": self.exchange.addresses["sharpness"]}
        pointers |= placed(self.plan.workspace(rows), self.scratch.address) | {"shortlist": self.memory.address}
        return Packed(self.kernels, self.plan.launches(pointers, rows))

    def enqueue(self, rows: int) -> None:
        """Puts the kernels for that many rows into the stream."""
        self.packed[rows - 1].enqueue([], self.device.stream)

    def read(self, sharpness_B: NDArray[np.float32]) -> list[Shortlist]:
        """Waits for the step. Returns each row's shortlist.

        Args:
            sharpness_B: One over each row's temperature, a view: a shortlist that was made at another writes there
                what it wants next time.
        """
        rows = len(sharpness_B)
        self.device.receive(self.memory.address, self.host.address, rows * WORDS * 4)
        self.device.synchronise()
        words_BW = self.words_BW[:rows].copy()
        floats_BW = words_BW.view(np.float32)
        vocabulary = self.exchange.vocabulary
        count = min(COUNT, vocabulary)
        return [
            Shortlist(
                tokens=words_BW[row, :count],
                logits=floats_BW[row, COUNT : COUNT + count],
                total=float(floats_BW[row, 2 * COUNT]),
                sharpness=float(sharpness_B[row]),
                odd=int(words_BW[row, 2 * COUNT + 1]),
                vocabulary=vocabulary,
                fetch=partial(self._fetch, row),
                expect=partial(sharpness_B.__setitem__, row),
                lock=self.lock,
            )
            for row in range(rows)
        ]

    def _fetch(self, row: int) -> NDArray[np.float32]:
        self.device.enter()  # perhaps of another thread than the step's
        return self.exchange.fetch((self.exchange.vocabulary,), row)
