"""Control tokens are the template's alone: the same words of a caller are ordinary text.

Enters: a conversation as its template wrote it. Leaves: token ids. Invariant: a control token that holds one character
of a caller's text is no control token, whatever the template does to that text, joins it to or cuts from it.

Who wrote which is seen by writing the conversation again. First with characters that no one else has (of a plane for
private use) in place of the control tokens that stand in the template itself: where the text is the same otherwise,
these are the template's. What is left may be put together by the template from pieces, as in `'<|' + role + '|>'`. So
then with such a character before each letter of the caller's that a control token has: where there is none, the
caller has no part in it. Where both change what the template does, no one can say, and the conversation is refused.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer

from ...errors import SessionError, shortened
from ..tokenizing import encode, encode_ordinary
from .environment import BrokenTemplateError, CostlyTemplateError, FailedTemplateError
from .rendering import Writer
from .sandbox import written_in

Span = tuple[int, int]

SIGN = "\U00100000"
"""Put before a caller's letter. The characters behind it stand for control tokens."""

PRIVATE = re.compile("[\U00100000-\U0010fffd]")
PRIVATE_PIECES = re.compile("[\U00100000-\U0010fffd]|[^\U00100000-\U0010fffd]+")
ORDINARY = "\ue000"
"""Takes the place of such characters where a caller or a template has any."""

WORD = re.compile(r"[\w-]+")
ENUMERATED = ("role", "type")
"""Keys whose values templates compare, and put together into control tokens."""


class ControlTokens:
    """The control tokens of a tokenizer: those that are special, and others where a template writes them.

    Args:
        tokenizer: The tokenizer.
        listed: The texts of those that are not special, as `chat_control_tokens` of a tokenizer's config lists them;
            None takes those that stand in the template.
    """

    def __init__(self, tokenizer: Tokenizer, listed: Sequence[str] | None = None) -> None:
        self.tokenizer, self.listed = tokenizer, listed
        self.added: dict[int, AddedToken] = tokenizer.get_added_tokens_decoder()

    def encode(self, writer: Writer) -> list[int]:
        """Token ids of a conversation, with control tokens where its template wrote some.

        Raises:
            SessionError: The template hides who wrote a control token.
        """
        source, text = writer.template.source, writer.text
        others = [token.content for token in self.added.values() if not token.special and not token.content.isspace()]
        listed = set(_written_in(writer, source, others) if self.listed is None else self.listed)
        control = {id for id, token in self.added.items() if token.special or token.content in listed}
        encoding = encode(self.tokenizer, text, special_tokens=False)
        found = list(zip(encoding.ids, encoding.offsets, strict=True))
        spans = [span for id, span in found if id in control]
        foreign = self._foreign(writer, spans)
        if not foreign:
            return list(encoding.ids)
        ids = self._encode_around(text, foreign)
        if sum(id in control for id in ids) != len(spans) - len(foreign):
            raise SessionError(
                f"the tokenizer writes {shortened(text[slice(*foreign[0])])} no other way than as a control token: "
                "take it out of the messages, or give sanitize_control_tokens=False"
            )
        return ids

    def _foreign(self, writer: Writer, spans: Sequence[Span]) -> list[Span]:
        """The places, of some, that hold characters of the caller's."""
        text = writer.text
        letters = set().union(*(each for value in writer.given() for each in _texts(value)))
        doubtful = [span for span in spans if _may_be_of(text[slice(*span)], letters)]
        if not doubtful:
            return []
        source, hidden = PRIVATE.sub(ORDINARY, writer.template.source), PRIVATE.sub(ORDINARY, text)
        known = self._of_template(writer, source, hidden)
        if known is not None:
            doubtful = [span for span in doubtful if span not in known and _stripped(text, span) not in known]
            if not doubtful:
                return []
        marked = writer.again(_Signs(text[slice(*span)] for span in doubtful), source, writer.named, {})
        if marked is not None and marked.replace(SIGN, "") == hidden:
            signed = set(_places(marked, SIGN))
            return [span for span in doubtful if not signed.isdisjoint(range(*span))]
        if known is None:
            raise SessionError(
                f"the chat template compares what messages say with {shortened(text[slice(*doubtful[0])])}, so that no "
                "one can see who wrote it: take it out of the messages, or give sanitize_control_tokens=False"
            )
        return doubtful

    def _of_template(self, writer: Writer, source: str, hidden: str) -> set[Span] | None:
        """The places of the control tokens that stand in the template; None where it does other things then."""
        special = (token.content for token in self.added.values())
        texts = sorted({*_written_in(writer, source, special), *(each for each in writer.named.values() if each)})
        swaps = {text: chr(ord(SIGN) + number) for number, text in enumerate(texts, 1)}
        named = {name: swaps.get(text, text) for name, text in writer.named.items()}
        marked = writer.again(_hide, source, named, swaps)
        if marked is None:
            return None
        texts_of = {swap: text for text, swap in swaps.items()}
        places, written, at = set(), [], 0
        for piece in PRIVATE_PIECES.findall(marked):
            text = texts_of.get(piece, piece)
            if piece in texts_of:
                places.add((at, at + len(text)))
            written.append(text)
            at += len(text)
        return places if "".join(written) == hidden else None

    def _encode_around(self, text: str, foreign: Sequence[Span]) -> list[int]:
        """Token ids of a text in which some control tokens are ordinary text."""
        ids: list[int] = []
        at = 0
        for start, end in foreign:
            ids += encode(self.tokenizer, text[at:start], special_tokens=False).ids
            ids += encode_ordinary(self.tokenizer, text[start:end])
            at = end
        return ids + list(encode(self.tokenizer, text[at:], special_tokens=False).ids)


def _written_in(writer: Writer, source: str, texts: Iterable[str]) -> list[str]:
    """The texts, of some, that stand in what a template may write."""
    try:
        return written_in(source, texts)
    except (BrokenTemplateError, FailedTemplateError) as error:
        raise writer.template.fault(str(error)) from error
    except CostlyTemplateError as error:
        raise writer.template.too_costly(str(error)) from error


def _may_be_of(token: str, letters: set[str]) -> bool:
    """Whether a control token may hold some of a caller's letters, but for words within it."""
    signs = {letter for letter in token if not letter.isalnum()}
    return not signs or not signs.isdisjoint(letters)


def _stripped(text: str, span: Span) -> Span:
    """A place without the white space that some tokens take with them."""
    found = text[slice(*span)]
    return span[0] + len(found) - len(found.lstrip()), span[1] - len(found) + len(found.rstrip())


def _texts(value: Any) -> Iterator[str]:
    """The texts in plain data, keys as well."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, each in value.items():
            yield from _texts(name)
            yield from _texts(each)
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each)


def _hide(value: Any) -> Any:
    """Plain data without characters that stand for something here."""
    if isinstance(value, str):
        return PRIVATE.sub(ORDINARY, value)
    if isinstance(value, dict):
        return {_hide(name): _hide(each) for name, each in value.items()}
    return [_hide(each) for each in value] if isinstance(value, list) else value


class _Signs:
    """Puts a sign before each letter that one of some control tokens has, but for words that templates compare."""

    def __init__(self, tokens: Iterable[str]) -> None:
        self.tokens = {token.casefold() for token in tokens}
        letters = {case for token in self.tokens for letter in token for case in (letter, letter.upper())}
        self.letter = re.compile("|".join(re.escape(letter) for letter in letters if not letter.isspace()))

    def __call__(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.letter.sub(rf"{SIGN}\g<0>", PRIVATE.sub(ORDINARY, value))
        if isinstance(value, dict):
            return {self._word(name): self._of_key(name, each) for name, each in value.items()}
        return [self(each) for each in value] if isinstance(value, list) else value

    def _of_key(self, name: Any, value: Any) -> Any:
        return self._word(value) if name in ENUMERATED else self(value)

    def _word(self, value: Any) -> Any:
        """A word as it is, where it alone makes no control token; anything else marked."""
        is_word = isinstance(value, str) and WORD.fullmatch(value)
        return value if is_word and not any(token in value.casefold() for token in self.tokens) else self(value)


def _places(marked: str, sign: str) -> Iterator[int]:
    """The places of signs in a text, counted without them."""
    for number, found in enumerate(re.finditer(re.escape(sign), marked)):
        yield found.start() - number
