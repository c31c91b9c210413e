"""The launches that shorten rows of logits on a GPU. Standard library only.

Enters: the vocabulary's size; for a call, the number of rows. Leaves: kernels to compile, scratch memory, launches.
"""

from collections.abc import Mapping
from typing import Any

from ..launch import Buffer, Kernel, Launch, ceil_divide, power_of_two

MODULE = "arriero.plugins.shortlist.kernel"
"""Module of the kernels' Triton functions."""

COUNT = 64
"""Tokens of a shortlist."""

WORDS = 132
"""Words of 32 bits a row: tokens, logits, the weights' sum, the number of odd logits; 528 bytes are aligned."""

BLOCK = 4096
"""Logits that a program shortens."""


class Plan:
    """The kernels of one vocabulary, and what a call launches of them.

    Args:
        vocabulary: Number of tokens (V).
    """

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self.block = max(2 * COUNT, min(BLOCK, power_of_two(vocabulary)))
        self.blocks = ceil_divide(vocabulary, self.block)
        scratch = {"keys": "*i64", "peaks": "*fp32", "sums": "*fp32", "odds": "*i32"}
        self.shorten = Kernel(
            name=f"shortlist_{vocabulary}_shorten",
            function="shorten",
            signature={"logits": "*fp32", "sharpness": "*fp32", **scratch, "vocabulary": "i32", "blocks": "i32"},
            constants={"BLOCK": self.block, "COUNT": COUNT},
            warps=8,
        )
        self.join = Kernel(
            name=f"shortlist_{vocabulary}_join",
            function="join",
            signature={**scratch, "sharpness": "*fp32", "shortlist": "*i32", "blocks": "i32"},
            constants={
                "KEYS": max(2 * COUNT, power_of_two(self.blocks * COUNT)),
                "BLOCKS": power_of_two(self.blocks),
                "COUNT": COUNT,
                "WORDS": WORDS,
            },
            warps=8,
        )
        self.kernels = (self.shorten, self.join)

    def workspace(self, rows: int) -> dict[str, Buffer]:
        """Scratch memory of a call over that many rows, by the names that `launches` looks up."""
        places = (rows, self.blocks)
        buffers = {"keys": Buffer(dtype="i64", shape=(*places, COUNT))}
        buffers |= {name: Buffer(dtype="fp32", shape=places) for name in ("peaks", "sums")}
        return buffers | {"odds": Buffer(dtype="i32", shape=places)}

    def launches(self, pointers: Mapping[str, Any], rows: int) -> list[Launch]:
        """The launches of a call, in order.

        Args:
            pointers: `logits` [B, V], `sharpness` [B], `shortlist` [B, WORDS] and the scratch memory, by name.
            rows: B.
        """
        values = {**pointers, "vocabulary": self.vocabulary, "blocks": self.blocks}
        grids = ((self.shorten, (self.blocks, rows, 1)), (self.join, (rows, 1, 1)))
        return [
            Launch(kernel=kernel.name, grid=grid, arguments=tuple(values[name] for name in kernel.signature))
            for kernel, grid in grids
        ]
