"""A bundle's proof of itself: the likeliest token behind fixed token ids, recorded when it is built.

Enters: a bundle, or the model that an engine was built from. Leaves: `greedy.json` in the bundle, which `arriero
doctor` compares with what another machine computes. It needs no tokenizer, and one piece of eight tokens.
"""

import dataclasses
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ArrieroWarning, FolderError, SessionError
from ..files.folders import rank_folder, read_spec
from ..files.machine_memory import find_room
from ..files.reading import read_json
from ..loading import load
from ..runtime.room import size
from ..spec.fields import decode
from ..spec.folder import FolderSpec
from ..spec.sizes import check_sizes

if TYPE_CHECKING:
    from ..runtime import Session

FILE = "greedy.json"
SCHEMA = 1
LENGTH = 8
"""Token ids of the prompt."""

TIE = 0.05
"""Nats between the two likeliest tokens below which rounding may exchange them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Greedy:
    """The record.

    Attributes:
        prompt: Token ids.
        token: The likeliest token behind them.
        second: The second likeliest.
        margin: Nats between the two.
        schema: Version of this record.
    """

    prompt: tuple[int, ...]
    token: int
    second: int
    margin: float
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        check_sizes(self, ("token", "second"), 0)
        check_sizes(self, ("schema",), SCHEMA, SCHEMA)
        if not 1 <= len(self.prompt) <= 64 or not all(0 <= token < 2**31 for token in self.prompt):
            raise ValueError("a prompt that is none of 1 to 64 token ids")
        if self.margin < 0:
            raise ValueError(f"margin is {self.margin}, expected none below 0")


def record_greedy(bundle: Path, source: Path, weights: Path | None = None) -> Greedy:
    """Computes a bundle's token on the CPU and writes it into the bundle.

    Args:
        bundle: The bundle; of an engine, which may have no GPU here, the model is asked.
        source: The model that it was built from.
        weights: Folder of the model's weight files, where they have moved.

    Raises:
        ArrieroError: It cannot be computed here; the message says why.
    """
    spec = read_spec(bundle)
    folder = bundle if spec.target == "cpu" else source
    needed, free = _weights(folder), find_room().free
    if needed > free:
        raise SessionError(f"its weights are {size(needed)}, {size(free)} of memory are free")
    found = compute_greedy(open_for_greedy(folder, weights), prompt_of(spec))
    (bundle / FILE).write_text(json.dumps(dataclasses.asdict(found)) + "\n", "utf-8")
    return found


def read_greedy(bundle: Path) -> Greedy | None:
    """A bundle's record; None where there is none.

    Raises:
        FolderError: It is damaged.
    """
    path = bundle / FILE
    try:
        found = decode(Greedy, read_json(path, remedy="build the bundle again", folder=bundle))
        if max(found.prompt) >= (most := read_spec(bundle).model.vocab_size):
            raise ValueError(f"token id {max(found.prompt)} in a vocabulary of {most}")
        return found
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise FolderError(f"{path}: damaged ({error}): build the bundle again") from error


def compute_greedy(session: "Session", prompt: tuple[int, ...]) -> Greedy:
    """The record of what a session computes.

    Raises:
        SessionError: The prompt is none of the model's, or it computes no numbers.
    """
    import numpy as np

    logits_V = session.logits(np.array([prompt], np.int64))[0, -1]
    if not np.isfinite(logits_V).all():
        raise SessionError("its logits are no numbers: build the bundle again")
    token, second = (int(each) for each in np.argsort(-logits_V, kind="stable")[:2])
    return Greedy(prompt=prompt, token=token, second=second, margin=float(logits_V[token] - logits_V[second]))


def prompt_of(spec: FolderSpec) -> tuple[int, ...]:
    """Fixed token ids over a model's whole vocabulary, none of them an image's."""
    image = None if spec.vision is None else spec.vision.spec.image_token
    tokens = (number * spec.model.vocab_size // (LENGTH + 1) for number in range(1, LENGTH + 1))
    return tuple(token if token != image else token - 1 for token in tokens)


def compare_greedy(expected: Greedy, found: Greedy) -> str | None:
    """The difference between a record and what was computed here; None where nothing does but for rounding."""
    if found.token == expected.token:
        return None
    if found.token == expected.second and expected.margin < TIE:
        return None
    return (
        f"the likeliest token behind {len(expected.prompt)} fixed ones is {found.token} here, by {found.margin:.3g} "
        f"nats; at build it was {expected.token}, by {expected.margin:.3g}"
    )


def open_for_greedy(folder: Path, weights: Path | None = None, threads: int | None = None) -> "Session":
    """Loads a folder for a few tokens.

    Raises:
        ArrieroError: It cannot be loaded here.
    """
    spec = read_spec(folder)
    own = rank_folder(folder, spec, 0)[1] if spec.kind == "group" else spec
    longest = None if own.engine is not None else min(2 * LENGTH, spec.model.max_positions)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ArrieroWarning)  # they are said to whoever runs it
        return load(folder, max_seq=longest, threads=threads, weights=weights)


def _weights(folder: Path) -> int:
    """Bytes of the weight files that a session reads."""
    spec = read_spec(folder)
    each = [rank_folder(folder, spec, rank)[1] for rank in range(spec.ranks)] if spec.kind == "group" else [spec]
    return sum(file.size for own in each for file in own.weight_files)
