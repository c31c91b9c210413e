"""Texts as tokens, within a bound of time where a tokenizer's own expressions may search without end.

Enters: a tokenizer and a text. Leaves: its tokens. Invariant: Llama 4's expression and the library's own are followed
at once, since they look at each character a few times; any other is waited for, and given up after some time.

The library's expressions count their steps from each place of a text alone, so that one that tries ways through the
rest of the text at every place is not ended: three stars take minutes for a page. What was given up goes on in one of
the library's own threads, of which there are as many as processors, until it ends or the process does.
"""

import functools
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from tokenizers import Encoding, Tokenizer

from ..errors import SessionError
from .tokenizer_bounds import expressions_of

SECONDS = 5.0
"""Time by the clock that a text with such expressions may take, where the process computes for most of it."""

BUSY = 3.0
"""Seconds of the process's processor time, before which a busy machine is waited for."""

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
BEFORE = r"[^\r\n\p{L}\p{N}]?"
KNOWN = frozenset(
    {
        f"{BEFORE}{UPPER}*{LOWER}+{CONTRACTIONS}?|{BEFORE}{UPPER}+{LOWER}*{CONTRACTIONS}?|{REST}",
        f"{CONTRACTIONS}|{BEFORE}\\p{{L}}+|{REST.replace('/', '')}",
    }
)
"""The expressions of Llama 4's tokenizer, and of Llama 3's."""


def encode(tokenizer: Tokenizer, text: str, *, special_tokens: bool) -> Encoding:
    """Tokens of a text.

    Args:
        tokenizer: The tokenizer.
        text: Any text; special tokens written in it become those tokens.
        special_tokens: Whether the tokenizer adds its own.

    Raises:
        SessionError: The tokenizer's expressions take too long.
    """
    if is_quick(tokenizer):
        return tokenizer.encode(text, add_special_tokens=special_tokens)
    batch = functools.partial(tokenizer.encode_batch, [text], add_special_tokens=special_tokens)
    return _within(batch)[0]


def encode_ordinary(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a text that no added token is looked for in.

    Raises:
        SessionError: The tokenizer's expressions take too long.
    """
    if not is_quick(tokenizer):
        plain = Tokenizer(tokenizer.model)
        if tokenizer.normalizer is not None:
            plain.normalizer = tokenizer.normalizer
        if tokenizer.pre_tokenizer is not None:
            plain.pre_tokenizer = tokenizer.pre_tokenizer
        return list(encode(plain, text, special_tokens=False).ids)
    if tokenizer.normalizer is not None:
        text = tokenizer.normalizer.normalize_str(text)
    words = [text]
    if tokenizer.pre_tokenizer is not None:
        words = [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    return [token.id for word in words for token in tokenizer.model.tokenize(word)]


def is_quick(tokenizer: Tokenizer) -> bool:
    """Whether its expressions are known to look at each character a few times."""
    return expressions_of(tokenizer) <= KNOWN


def _within(call: Callable[[], Any]) -> Any:
    """Calls what leaves the interpreter to others, and waits for its end within the time."""
    answers: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            answers.put((call(), None))
        except BaseException as error:  # a panic of the library's is no Exception
            answers.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    since, computed = time.monotonic(), time.process_time()
    while True:
        try:
            found, error = answers.get(timeout=0.5)
        except queue.Empty:
            if time.monotonic() - since > SECONDS and time.process_time() - computed > BUSY:
                raise SessionError(
                    f"the regular expressions of the folder's tokenizer.json take longer than {SECONDS:g} s for this "
                    "text: shorten it, or take the tokenizer of the checkpoint that it was made from"
                ) from None
            continue
        if error is not None:
            raise error
        return found
