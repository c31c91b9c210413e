"""Matchers made by llguidance, and the trial of a grammar that may not be to be made.

Enters: a grammar, a schema or an expression, and tokens. Leaves: a matcher. llguidance takes them apart by functions
that call themselves, and multiplies some out: a chain of a few thousand rules or references ends its process, and a
small schema can take minutes or all memory. Invariant: `answer`, which runs in a process of its own, does to a grammar
all that a session will, on a quarter of the stack.

Standard library only, but for llguidance where it is used: the process loads this file alone.
"""

import ctypes
import functools
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

Made = TypeVar("Made")

WHITESPACE = r"[ ]|\n[ \t]{0,20}"
"""White space between tokens of JSON: none, a space, or a new line with its indentation."""

OPTIONS: Any = {
    "whitespace_pattern": WHITESPACE,
    "whitespace_flexible": True,
    "item_separator": ",",
    "key_separator": ":",
    "lenient": False,
    "coerce_one_of": False,
}
"""How llguidance reads a schema; they prevail over a schema's own `x-guidance`."""

STACK, STEP_STACK = 16 << 20, 2 << 20
"""Bytes of stack on which a grammar is tried: made, and followed. Threads have four times as much."""

STEPS = 8
"""Tokens that a trial follows."""

MADE = b"m"
"""The kind of answer of a trial: llguidance has ended with a matcher or a reason, and how many bytes it holds."""

Singles = tuple[tuple[int, bytes], ...]
"""Tokens and their bytes."""


def make_matcher(tokens: "LLTokenizer", kind: str, source: str) -> "LLMatcher":
    """Makes the matcher of a grammar, which may hold an error.

    Args:
        tokens: The tokens.
        kind: `grammar`, `json_schema` or `regex`.
        source: The grammar.

    Raises:
        ValueError: llguidance does not take it.
    """
    from llguidance import LLMatcher, LLParserLimits

    if kind == "json_schema":
        written = LLMatcher.grammar_from_json_schema(source, overrides=OPTIONS)
    else:
        written = (LLMatcher.grammar_from_lark if kind == "grammar" else LLMatcher.grammar_from_regex)(source)
    return LLMatcher(tokens, written, log_level=0, limits=LLParserLimits(verbose_errors=False))


def on_stack(size: int, make: Callable[[], Made]) -> Made:
    """Calls a function on a stack of its own size in bytes; what it raises is raised here."""
    found: list[Made] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            found.append(make())
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, name="grammar")
    with _sizes:
        usual = threading.stack_size(size)
        try:
            thread.start()
        finally:
            threading.stack_size(usual)
    thread.join()
    if raised:
        raise raised[0]
    return found[0]


_sizes = threading.Lock()
"""Held while threads begin with another stack than the usual."""


def answer(request: tuple[Any, ...]) -> tuple[bytes, str]:
    """Tries a grammar over a vocabulary of bytes: whatever it says of the grammar, the session will say itself."""
    kind, source, size, singles = request
    tokens, before = _tokens(size, singles), _bytes_held()
    try:
        matcher = make_matcher(tokens, kind, source)
        on_stack(STEP_STACK, lambda: _follow(matcher, [token for token, _ in singles]))
    except (ValueError, MemoryError):
        return MADE, "0"
    return MADE, str(max(0, _bytes_held() - before))


def _follow(matcher: "LLMatcher", tokens: list[int]) -> None:
    """Takes some steps, another choice each."""
    matcher = matcher.deep_copy()
    for step in range(STEPS):
        mask = matcher.compute_bitmask()
        possible = [token for token in tokens if token >> 3 < len(mask) and mask[token >> 3] >> (token & 7) & 1]
        if not possible or matcher.is_error() or not matcher.consume_token(possible[step * 7919 % len(possible)]):
            return


class _Bytes:
    """A vocabulary in which nothing but some tokens has text, as llguidance's `TokenizerWrapper` takes it."""

    def __init__(self, size: int, singles: Singles) -> None:
        texts = dict(singles)
        self.tokens = [texts.get(token, b"") for token in range(size)] + [b"<end>"]
        self.eos_token_id, self.bos_token_id = size, None
        self.special_token_ids = [token for token in range(size + 1) if len(self.tokens[token]) != 1]
        self.of_byte = {text[0]: token for token, text in singles if len(text) == 1}

    def __call__(self, text: str | bytes) -> list[int]:
        said = text.encode() if isinstance(text, str) else text
        return [self.of_byte[byte] for byte in said if byte in self.of_byte]


@functools.lru_cache(maxsize=4)
def _tokens(size: int, singles: Singles) -> "LLTokenizer":
    from llguidance import LLTokenizer
    from llguidance._tokenizer import TokenizerWrapper

    return LLTokenizer(TokenizerWrapper(_Bytes(size, singles)), n_vocab=size + 1, eos_token=size)


class _Allocated(ctypes.Structure):
    """The GNU C library's `mallinfo2`."""

    _fields_ = [(f"field{number}", ctypes.c_size_t) for number in range(10)]


def _bytes_held() -> int:
    """Bytes that this process has allocated and not freed; 0 where the C library does not tell."""
    tell = getattr(ctypes.CDLL(None), "mallinfo2", None) if sys.platform == "linux" else None
    if tell is None:
        return 0
    tell.restype = _Allocated
    told = tell()
    return int(told.field4 + told.field7)  # mapped blocks, and all others
