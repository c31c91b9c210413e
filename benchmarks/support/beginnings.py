"""Beginnings of prompts that a fleet comes to know, and whether its router sends a question where its own is known."""

from collections.abc import Collection, Sequence
from typing import Any

SUBJECTS = ("lists", "maps", "files", "threads", "numbers", "clocks", "errors", "sockets")
ASKS = 4
"""Questions about each beginning."""


def beginning(subject: str) -> str:
    """A beginning of several blocks, which differ from the first token on."""
    return f"{subject.title()} have a manual. " + f"It tells all that there is to know about {subject}. " * 12


def returned(homes: Collection[Sequence[Any]]) -> tuple[int, int]:
    """Questions after the first about each beginning, and how many of them went where the first one did.

    Args:
        homes: Who answered each question, for each beginning.
    """
    again = [home == seen[0] for seen in homes for home in seen[1:]]
    return len(again), sum(again)
