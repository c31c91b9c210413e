"""Panics of the tokenizers library as one line of ours: what it prints of them itself is left out.

Enters: a call of the library. Leaves: its result, or a refusal of the tokenizer. The library is Rust, which writes a
panic to file descriptor 2 before Python learns of it; so that is caught meanwhile, and all else that was written there
comes out behind it. Invariant: nothing that others write is lost.
"""

import contextlib
import json
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from tokenizers import Tokenizer

from ..errors import FolderError, shortened_text
from .tokenizing import encode

ADDED = ("lstrip", "rstrip", "single_word")
"""Settings of an added token that look at what stands beside it."""

BEHIND = rb"\n(stack backtrace:\n( [^\n]*\n)*)?(note: [^\n]*\n)?"
"""Lines that may stand behind a panic's own."""

STDERR = 2

SAMPLES = ("", "a", "Some words, and 12 more: été 漢字 \U0001f600\n  ")
"""Texts that a tokenizer is tried with."""


def may_panic(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer has parts beyond those of Llama's, which the library may have overlooked cases of."""
    added = tokenizer.get_added_tokens_decoder().values()
    decoder = None if tokenizer.decoder is None else json.loads(tokenizer.decoder.__getstate__()).get("type")
    has_settings = any(getattr(token, name) for token in added for name in ADDED)
    return tokenizer.normalizer is not None or decoder not in (None, "ByteLevel") or has_settings


def try_tokenizer(tokenizer: Tokenizer) -> None:
    """Has a tokenizer read some texts and write some tokens, so that a panic comes when it is loaded."""
    for text in SAMPLES:
        with contextlib.suppress(Exception):  # a text that it has no token for
            tokenizer.decode(encode(tokenizer, text, special_tokens=True).ids)
    with contextlib.suppress(Exception):
        tokenizer.decode(list(range(min(8, tokenizer.get_vocab_size()))))


@contextlib.contextmanager
def panics_refused(folder: Path, *, quiet: bool) -> Iterator[None]:
    """Refuses a tokenizer that breaks the library's own assumptions: a plain `Exception`, or none of Python's.

    Args:
        folder: The tokenizer's folder.
        quiet: Whether what the library prints of it is left out, which costs some microseconds.

    Raises:
        FolderError: The tokenizer does.
    """
    with contextlib.ExitStack() as stack:
        forget = stack.enter_context(_CAUGHT) if quiet else None
        try:
            yield
        except BaseException as error:
            if type(error) is not Exception and isinstance(
                error, Exception | KeyboardInterrupt | SystemExit | GeneratorExit
            ):
                raise
            if forget is not None:
                forget(str(error))
            raise damaged(folder / "tokenizer.json", error) from error


def damaged(path: Path, error: BaseException) -> FolderError:
    """The refusal of a tokenizer."""
    return FolderError(f"{path}: damaged ({shortened_text(str(error), 150)}): export again from an intact checkpoint")


class _Caught:
    """Text that is written to file descriptor 2 while a thread is within; it comes out when the last one leaves."""

    def __init__(self) -> None:
        self.lock, self.inside = threading.Lock(), 0
        self.own: int | None = None
        self.file: IO[bytes] | None = None
        self.forgotten: list[str] = []

    def __enter__(self) -> Callable[[str], None]:
        with self.lock:
            self.inside += 1
            if self.inside == 1:
                with contextlib.suppress(OSError):  # closed, or no room for a file: panics are printed then
                    self.file = tempfile.TemporaryFile()
                    self.own = os.dup(STDERR)
                    os.dup2(self.file.fileno(), STDERR)
        return self.forgotten.append

    def __exit__(self, *_: Any) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                self._let_out()

    def _let_out(self) -> None:
        """Puts the descriptor back, and writes what was caught without the panics that were refused."""
        own, file, panics = self.own, self.file, list(self.forgotten)
        self.own, self.file = None, None
        self.forgotten.clear()
        if own is not None:
            os.dup2(own, STDERR)
            os.close(own)
        if file is None:
            return
        with file:
            file.seek(0)
            written = file.read()
        for said in panics:
            text = re.escape(said.encode())
            written = re.sub(rb"(?m)^\n?thread '[^\n]* panicked at [^\n]*\n" + text + BEHIND, b"", written)
        if written:
            with contextlib.suppress(OSError):
                os.write(STDERR, written)


_CAUGHT = _Caught()
