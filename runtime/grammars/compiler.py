"""Grammars made ready: from what a caller writes to matchers that sequences start from.

Enters: a grammar in Lark, a JSON schema or a regular expression. Leaves: a `Grammar`. Invariants: what llguidance does
not enforce in full is refused with its reason, so that a continuation that is complete is valid. Between the tokens of
JSON stands a space or a line's beginning at most, so that a small model does not write white space until its end.
Nothing is made here that has not been made in a process of its own before, within time, memory and stack.
"""

import functools
import json
import signal
import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ...errors import SessionError, shortened, shortened_text
from ..kept_process import ENDED, KeptProcess, Program, process_for
from .guide import Guide, MaskWorker
from .json_schemas import enforceable
from .trial import MADE, STACK, make_matcher, on_stack
from .vocabulary import Vocabulary

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

KINDS = {"grammar": "a grammar in Lark", "json_schema": "a JSON schema", "regex": "a regular expression"}
"""Settings that a continuation follows, one at most."""

LONGEST = 1 << 19
"""Characters of a grammar at most."""

KEPT, KEPT_BYTES = 64, 1 << 28
"""Grammars that are kept for the next requests, and the memory that they take together."""

SECONDS, MEMORY = 2.0, 1 << 29
"""Processor time and address space that a grammar may take to be made; JSON schemas take some hundredths of it."""

WAIT = 30.0
"""Seconds that a trial may take on a machine that is busy."""

PROGRAM = Program(module=str(Path(__file__).with_name("trial.py")), memory=MEMORY, seconds=SECONDS, stack=STACK)


@dataclass(frozen=True, eq=False, slots=True)
class Grammar:
    """A grammar that sequences follow.

    Attributes:
        kind: The setting that it came from.
        source: As it was given; a schema as JSON.
        size: Bytes of memory that it was seen to take.
    """

    kind: str
    source: str
    size: int
    _matcher: "LLMatcher" = field(repr=False)
    _words: NDArray[np.uint32] = field(repr=False)
    _vocabulary: Vocabulary = field(repr=False)
    _worker: MaskWorker = field(repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def open(self, ends: Collection[int]) -> Guide:
        """Opens the grammar for one sequence, which any of `ends` may end."""
        with self._lock:
            matcher = self._matcher.deep_copy()
        return Guide(matcher, self._words, self._vocabulary.size, ends, self._vocabulary.added, self._worker)


class GrammarCompiler:
    """Compiles the grammars of one model, and keeps the last `KEPT`.

    Args:
        tokenizer: The model's tokenizer.
        size: Tokens that it chooses from.
    """

    def __init__(self, tokenizer: Tokenizer, size: int) -> None:
        self.tokenizer, self.size = tokenizer, size
        self.worker, self.lock = MaskWorker(), threading.Lock()
        self.kept: OrderedDict[tuple[str, str], Grammar] = OrderedDict()

    def read(self, settings: Mapping[str, Any]) -> Grammar | None:
        """The grammar that settings ask for; None where they ask for none.

        Raises:
            SessionError: They ask for two, or one that is none or cannot be enforced, or llguidance is not installed.
        """
        given = {kind: settings[kind] for kind in KINDS if settings.get(kind) is not None}
        if not given:
            return None
        if len(given) > 1:
            raise SessionError(f"{' and '.join(given)} exclude each other: give one of them")
        ((kind, value),) = given.items()
        return self.compile(kind, value)

    def compile(self, kind: str, value: Any) -> Grammar:
        """Compiles a grammar of one of the `KINDS`; a schema may be a dictionary, True, or their JSON.

        Raises:
            SessionError: As `read` does.
        """
        source = _schema(value) if kind == "json_schema" else value
        if not isinstance(source, str):
            raise SessionError(f"{kind} is {shortened(value)}, expected {KINDS[kind]} as a text")
        if len(source) > LONGEST:
            raise SessionError(f"{kind} has {len(source)} characters, {LONGEST} at most are taken: shorten it")
        with self.lock:
            if (kind, source) in self.kept:
                self.kept.move_to_end((kind, source))
                return self.kept[kind, source]
        grammar = self._compile(kind, source)
        with self.lock:
            self.kept[kind, source] = grammar
            while len(self.kept) > KEPT or (
                len(self.kept) > 1 and sum(each.size for each in self.kept.values()) > KEPT_BYTES
            ):
                self.kept.popitem(last=False)
        return grammar

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        """The tokens and their bytes."""
        return Vocabulary(self.tokenizer, self.size)

    @functools.cached_property
    def tokens(self) -> "LLTokenizer":
        """The tokens in llguidance. Made with the first grammar; whoever wants that to be quick asks for them before.

        Raises:
            SessionError: The tokenizer is not byte-level, or llguidance is not installed.
        """
        return self.vocabulary.open()

    def _compile(self, kind: str, source: str) -> Grammar:
        tokens = self.tokens
        size = self._tried(kind, source)
        try:
            matcher = on_stack(4 * STACK, lambda: make_matcher(tokens, kind, source))
        except ValueError as error:
            raise _refused(kind, str(error)) from error
        words = np.zeros((self.size + 32) // 32, np.uint32)
        if not matcher.is_error():
            matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        if matcher.is_error():
            raise _refused(kind, matcher.get_error())
        return Grammar(kind, source, size, matcher, words, self.vocabulary, self.worker)

    def _tried(self, kind: str, source: str) -> int:
        """The bytes that a grammar takes, which has been made and followed in a process of its own before.

        Raises:
            SessionError: It ended that process, or took too long.
        """
        found = _kept().ask((kind, source, self.size, self.vocabulary.singles), WAIT)
        if found is None:  # no process can be started here
            return 0
        answer, text = found
        if answer == MADE:
            return int(text)
        said = f"it takes longer than {SECONDS:g} s or {MEMORY >> 20} MB to be made"
        if answer == ENDED and text == f"-{int(signal.SIGSEGV)}":
            said = f"its rules, references or groups are chained or nested deeper than {STACK >> 20} MB of stack hold"
        raise SessionError(f"{kind} is refused ({said}): make it smaller")


def prepare() -> None:
    """Starts the process in which grammars are tried, so that the first need not wait for it."""
    _kept().start()


def _kept() -> KeptProcess:
    return process_for(PROGRAM)


def _refused(kind: str, reason: str) -> SessionError:
    """The error for a grammar that llguidance does not take."""
    remedy = "leave out what it names" if kind == "json_schema" else "correct it"
    return SessionError(f"{kind} is refused ({shortened_text(reason, 240)}): {remedy}")


def _schema(value: Any) -> str:
    """A JSON schema as JSON text in llguidance's keywords, of a dictionary, True, or JSON text of one.

    Raises:
        SessionError: It is none of these.
    """
    expected = "a JSON schema: a dictionary, or JSON text of one"
    if isinstance(value, str):
        if len(value) > LONGEST:
            return value
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise SessionError(f"json_schema is {shortened(value)}, expected {expected}") from error
    if value is True:  # takes any document
        return "{}"
    if not isinstance(value, Mapping):
        raise SessionError(f"json_schema is {shortened(value)}, expected {expected}")
    try:
        return json.dumps(enforceable(value), allow_nan=False, ensure_ascii=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise SessionError(f"json_schema is {shortened(value)}, which is no JSON ({error}): give plain data") from error
