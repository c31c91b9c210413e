"""A tokenizer's tokens as the bytes that they write, for llguidance.

Enters: a byte-level tokenizer. Leaves: each token's bytes, and an `LLTokenizer` over them. Invariant: an added token,
special or not, writes no text of a grammar; only a grammar that names it (`<|python_start|>` in Lark) lets it come.
"""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from ...errors import SessionError
from ..tokenizing import encode_ordinary

if TYPE_CHECKING:
    from llguidance import LLTokenizer

LIBRARY_LACKS = "grammars, JSON schemas and regular expressions need llguidance: pip install 'arriero[grammar]'"
LONGEST = 1000
"""Bytes of a token at most: llguidance ends a thread over one whose bytes stand more than 1,023 deep in its tree."""

END = b"<end of the grammar's text>"


class Vocabulary:
    """A tokenizer's tokens, as llguidance's `TokenizerWrapper` takes them.

    Args:
        tokenizer: The tokenizer.
        size: Tokens that the model chooses from; those of the tokenizer beyond, and those that it does not know, never
            come. The one behind the last stands for the end of the text, so that no token of the model's does.

    Raises:
        SessionError: The tokenizer is not byte-level, or has a token that is too long.
    """

    def __init__(self, tokenizer: Tokenizer, size: int) -> None:
        self.tokenizer, self.size = tokenizer, size
        self.added = frozenset(tokenizer.get_added_tokens_decoder())
        self.tokens: Sequence[bytes] = [*token_bytes(tokenizer, size), END]
        if (longest := max(map(len, self.tokens))) > LONGEST:
            raise SessionError(
                f"grammars, JSON schemas and regular expressions need tokens of {LONGEST} bytes at most, and this "
                f"model's longest has {longest}: leave them out"
            )
        nameless = (token for token, text in enumerate(self.tokens) if not text)
        self.special_token_ids = sorted({*nameless, *(token for token in self.added if token < size), size})
        self.eos_token_id, self.bos_token_id = size, None
        named = ((token, self.tokens[token]) for token in sorted(self.added) if token < size)
        self.singles = (*((token, text) for token, text in enumerate(self.tokens[:size]) if len(text) == 1), *named)

    def __call__(self, text: str | bytes) -> list[int]:
        """Token ids of a grammar's fixed text, never an added token."""
        return encode_ordinary(self.tokenizer, text if isinstance(text, str) else text.decode("utf-8", "replace"))

    def open(self) -> "LLTokenizer":
        """The tokens in llguidance, which takes 3 s for 200,000.

        Raises:
            SessionError: llguidance is not installed.
        """
        try:
            from llguidance import LLTokenizer
            from llguidance._tokenizer import TokenizerWrapper
        except ModuleNotFoundError as error:
            raise SessionError(LIBRARY_LACKS) from error
        return LLTokenizer(TokenizerWrapper(self), n_vocab=self.size + 1, eos_token=self.size)


def token_bytes(tokenizer: Tokenizer, size: int) -> list[bytes]:
    """The bytes that each of the first `size` tokens writes; empty where the tokenizer has none of this id.

    Raises:
        SessionError: The tokenizer is not byte-level.
    """
    if not _is_byte_level(tokenizer):
        raise SessionError(
            "grammars, JSON schemas and regular expressions need a byte-level tokenizer, as Llama 4's is, and this "
            "model's is another: leave them out"
        )
    letters, added = byte_letters(), tokenizer.get_added_tokens_decoder()
    found = []
    for token in range(size):
        text = added[token].content if token in added else tokenizer.id_to_token(token) or ""
        is_coded = token not in added and all(letter in letters for letter in text)
        found.append(bytes(letters[letter] for letter in text) if is_coded else text.encode())
    return found


def byte_letters() -> dict[str, int]:
    """The byte that each letter of a byte-level vocabulary stands for (Radford et al. 2019, `bytes_to_unicode`)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + at): byte for at, byte in enumerate(others)}


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer's decoder is byte-level, alone or with steps that change nothing of it."""
    if tokenizer.decoder is None:
        return False
    decoder = json.loads(tokenizer.decoder.__getstate__())
    steps = decoder.get("decoders", [decoder])
    return {step.get("type") for step in steps} <= {"ByteLevel", "Fuse"} and bool(steps)
