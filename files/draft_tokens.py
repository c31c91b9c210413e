"""The tokens that a head guesses among, where they are fewer than the model's: a small file beside its graph.

Enters: a folder. Leaves: the model's token of each of the head's own, checked. Standard library only.
"""

import array
import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import CheckpointError, FolderError, shortened
from ..spec.draft import DRAFT_TOKENS
from ..spec.folder import FolderSpec
from .reading import open_regular
from .safetensors import encode_header, open_shard

NAME, CODE = "tokens", "I64"
"""Name and type of the file's only tensor."""


def write_tokens(folder: Path, tokens: Sequence[int]) -> None:
    """Writes the file into a folder."""
    values = array.array("q", tokens)
    if sys.byteorder == "big":
        values.byteswap()
    (folder / DRAFT_TOKENS).write_bytes(encode_header({NAME: (CODE, (len(values),))}) + values.tobytes())


def read_tokens(folder: Path, count: int, vocabulary: int) -> list[int]:
    """Reads the file of a folder.

    Args:
        folder: The folder.
        count: Tokens that the head guesses among.
        vocabulary: Tokens of the model.

    Raises:
        FolderError: It is missing or damaged, or names others than that many tokens of the model.
    """
    path, remedy = folder / DRAFT_TOKENS, "write the folder again"
    try:
        shard = open_shard(path)
        region = shard.tensors.get(NAME)
        if list(shard.tensors) != [NAME] or region is None or (region.dtype, region.shape) != (CODE, (count,)):
            raise FolderError(f"{path}: does not hold {count} tokens: {remedy}")
        with open_regular(path) as file:
            file.seek(region.offset)
            values = array.array("q", file.read(region.size))
    except CheckpointError as error:
        raise FolderError(f"{error}, or {remedy}") from error
    if sys.byteorder == "big":
        values.byteswap()
    tokens = values.tolist()
    if outside := next((token for token in tokens if not 0 <= token < vocabulary), None):
        raise FolderError(f"{path}: names the token {shortened(outside)} of {vocabulary}: {remedy}")
    if len(set(tokens)) < count:
        raise FolderError(f"{path}: names a token twice: {remedy}")
    return tokens


def carry_tokens(source: Path, target: Path, spec: FolderSpec) -> None:
    """Copies the file from one folder to another, where the draft has one.

    Raises:
        FolderError: As `read_tokens` does.
    """
    if spec.draft is not None and spec.draft.spec.vocab_size != spec.model.vocab_size:
        write_tokens(target, read_tokens(source, spec.draft.spec.vocab_size, spec.model.vocab_size))
