"""Text in and out: the tokenizer and the chat templates.

Enters: a folder's own files. Leaves: token ids of texts and conversations, and texts of token ids. Invariant: a damaged
file is refused when it is read; a missing one only when it is needed.
"""

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from tokenizers.pre_tokenizers import ByteLevel

from ..errors import FolderError, SessionError, shortened
from ..files.folders import read_json
from ..files.reading import read_bytes
from .chat.messages import Message, read_messages
from .chat.settings import ChatSettings, read_chat
from .chat.special_tokens import complete_tokenizer
from .chat.templates import DEFAULT, ChatTemplate, choose_template, read_templates
from .panics import damaged, may_panic, panics_refused, try_tokenizer
from .tokenizer_bounds import check_text, growth_of
from .tokenizing import encode, is_quick

if TYPE_CHECKING:
    from .chat.control_tokens import ControlTokens
    from .chat.rendering import Writer


MOST_CHARACTERS = 1 << 26
"""Characters of a text at most, whatever the session holds; tokenising takes 150 bytes of memory for each, and as
much for each more that a tokenizer makes of it than one of bytes does."""

OF_BYTES = 4
"""Characters that a tokenizer of bytes makes of one, whose memory is counted."""


class Text:
    """A folder's tokenizer and chat templates.

    Args:
        folder: The model or bundle.

    Raises:
        FolderError: A file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.expected, self.may_panic = 0, False
        path = folder / "tokenizer.json"
        self.tokenizer: Tokenizer | None = None
        self.most_characters = MOST_CHARACTERS
        if os.path.lexists(path):
            self.tokenizer, growth = _read_tokenizer(path)
            self.most_characters //= max(1, growth // OF_BYTES)
        self.config = read_json(folder / "tokenizer_config.json")
        self.special_tokens: dict[str, str] = {}
        if self.tokenizer is not None:
            with panics_refused(folder, quiet=True):
                self.special_tokens = complete_tokenizer(self.tokenizer, folder, self.config)
                self.tokenizer.no_truncation()  # a saved training setting would cut prompts without a word
                self.tokenizer.no_padding()
                self.may_panic = may_panic(self.tokenizer)
                try_tokenizer(self.tokenizer)

    @property
    def is_quick(self) -> bool:
        """Whether texts take a time that their length bounds; so it is where only token ids are known."""
        return self.tokenizer is None or is_quick(self.tokenizer)

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with BOS where the tokenizer puts one.

        Args:
            text: Any text; special tokens written in it become those tokens.
            special_tokens: Whether the tokenizer adds its own (BOS).
        """
        tokenizer, text = self._tokenizer(), self._checked(text)
        with panics_refused(self.folder, quiet=self.may_panic):
            ids: list[int] = encode(tokenizer, text, special_tokens=special_tokens).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        with panics_refused(self.folder, quiet=self.may_panic):
            text: str = self._tokenizer().decode(list(ids), skip_special_tokens=True)
        return text

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a prompt as a person writes it: `encode`, but a BOS that is written gets no second one."""
        ids = self.encode(text)
        return ids[1:] if len(ids) > 1 and ids[0] == ids[1] == self.special_id("bos_token") else ids

    def encode_chat(self, messages: Sequence[Message] | Message, **settings: Unpack[ChatSettings]) -> list[int]:
        """Token ids of a conversation in the checkpoint's chat template, up to where the assistant speaks next.

        A conversation whose last message is the assistant's ends with it. Control tokens are the template's alone: what
        messages, tools and documents hold is ordinary text, unless `sanitize_control_tokens` is False.

        Args:
            messages: The turns; an image is a part `{"type": "image"}`.
            **settings: What is said beside them, see `ChatSettings`.

        Raises:
            SessionError: There is no template, or it does not take these messages.
            FolderError: The template does not compile.
        """
        from .chat.sandbox import one_budget

        self._tokenizer()  # before the template, which is missing where the tokenizer is
        with one_budget():
            writer = self._writer(messages, settings)
            text = self._checked(writer.text)
            with panics_refused(self.folder, quiet=self.may_panic):
                sanitizes = writer.chat.sanitizes
                ids = self._control_tokens.encode(writer) if sanitizes else self.encode(text, special_tokens=False)
        if self._has_processor and ids[:1] != (start := self.encode("")[:1]):  # as `transformers`' processors do
            ids = start + ids if start == [self.special_id("bos_token")] else ids
        return ids

    def render_chat(self, messages: Sequence[Message] | Message, **settings: Unpack[ChatSettings]) -> str:
        """A conversation as the chat template writes it; the arguments and errors are those of `encode_chat`."""
        from .chat.sandbox import one_budget

        with one_budget():
            return self._writer(messages, settings).text

    def prepare_chat(self) -> None:
        """Starts what conversations need and other prompts do not, so that the first one need not wait for it."""
        from .chat.sandbox import prepare

        prepare()

    def special_id(self, name: str) -> int | None:
        """The id of a special token by its name in `tokenizer_config.json`, as in `bos_token`; None if it has none."""
        token = self.special_tokens.get(name)
        return self._tokenizer().token_to_id(token) if token else None

    def open_stream(self) -> Callable[[int], str]:
        """Opens a stream of tokens: a function that takes one id after another, and returns the text that it completes.

        The text is empty while a character is unfinished, and always where there is no tokenizer.
        """
        tokenizer, decoder = self.tokenizer, DecodeStream(skip_special_tokens=True)
        if tokenizer is None:
            return lambda token: ""
        folder, may_panic = self.folder, self.may_panic

        def step(token: int) -> str:
            with panics_refused(folder, quiet=may_panic):
                return decoder.step(tokenizer, token) or ""

        return step

    @functools.cached_property
    def templates(self) -> dict[str, ChatTemplate]:
        """The chat templates by their names."""
        return read_templates(self.folder, self.config)

    @property
    def chat_template(self) -> str | None:
        """The source of the template that is taken where none is asked for, in Jinja; None where there is none."""
        template = self.templates.get(DEFAULT)
        return None if template is None else template.source

    def _writer(self, messages: Any, settings: ChatSettings) -> "Writer":
        from .chat.rendering import Writer  # here, since ids and plain text need no Jinja and a process starts sooner

        turns, _ = read_messages(messages)
        chat = read_chat(turns, settings)
        template = choose_template(self.templates, chat.template, chat.tools is not None, self.folder)
        return Writer(template, chat, self.special_tokens)

    @functools.cached_property
    def _control_tokens(self) -> "ControlTokens":
        from .chat.control_tokens import ControlTokens

        listed = self.config.get("chat_control_tokens")
        if listed is not None and not (isinstance(listed, list) and all(isinstance(each, str) for each in listed)):
            path = self.folder / "tokenizer_config.json"
            raise FolderError(
                f"{path}: chat_control_tokens is {shortened(listed)}, expected a list of texts: correct it"
            )
        return ControlTokens(self._tokenizer(), listed)

    @functools.cached_property
    def _has_processor(self) -> bool:
        return any((self.folder / f"{name}_config.json").is_file() for name in ("processor", "preprocessor"))

    def expect(self, tokens: int) -> None:
        """Refuses from now on, before they are tokenised, texts that must have more tokens than this.

        Of a tokenizer of bytes a text has at least as many tokens as its characters over those of the longest one.
        Where several sessions share the tokenizer, the most that one of them holds counts.
        """
        if self.tokenizer is not None and (longest := longest_of_bytes(self.tokenizer)) is not None:
            self.expected = max(self.expected, tokens)
            self.most_characters = min(MOST_CHARACTERS, self.expected * longest)

    def _checked(self, text: str) -> str:
        """A text that is valid Unicode, and not longer than one whose tokens could be taken.

        Raises:
            SessionError: It has halves of characters, or too many characters.
        """
        if len(text) > self.most_characters:
            where = "the session can hold" if self.expected else "are read at once"
            most = f"{where} {self.most_characters}" if self.expected else f"{self.most_characters} {where}"
            raise SessionError(f"the text has {len(text)} characters, {most} at most: shorten it")
        try:
            text.encode()
        except UnicodeError as error:
            raise SessionError("the text is not valid Unicode: give UTF-8") from error
        return text

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            remedy = "export again with --tokenizer DIR, or give token ids instead of text"
            raise SessionError(f"{self.folder} has no tokenizer.json: {remedy}")
        return self.tokenizer


def _read_tokenizer(path: Path) -> tuple[Tokenizer, int]:
    """Reads a tokenizer, and how many characters it may make of one.

    Raises:
        FolderError: The file is damaged, or a part of it makes too much of a text.
    """
    content = read_bytes(path, folder=path.parent)
    with panics_refused(path.parent, quiet=True):
        try:
            check_text(content)
            tokenizer = Tokenizer.from_buffer(content)
            return tokenizer, growth_of(tokenizer)
        except Exception as error:  # the tokenizers library raises plain Exception
            raise damaged(path, error) from error


def longest_of_bytes(tokenizer: Tokenizer) -> int | None:
    """Characters of a tokenizer's longest token, where each token stands for the bytes that it is written with.

    Returns:
        None of a tokenizer whose token may stand for a text of any length: one that normalises or knows no bytes, or a
        special token that takes the spaces beside it.
    """
    vocabulary, added = tokenizer.get_vocab(), tokenizer.get_added_tokens_decoder().values()
    takes_spaces = any(token.lstrip or token.rstrip for token in added)
    if tokenizer.normalizer is not None or takes_spaces or not vocabulary.keys() >= set(ByteLevel.alphabet()):
        return None
    return max(map(len, vocabulary))
