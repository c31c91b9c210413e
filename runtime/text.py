"""Text in and out: the tokenizer and the chat templates.

Enters: a folder's own files. Leaves: token ids of texts and conversations, and texts of token ids. Invariant: a damaged
file is refused when it is read; a missing one only when it is needed.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from ..errors import FolderError, SessionError, shortened
from ..files.folders import read_json
from .chat.messages import Message, read_messages
from .chat.settings import ChatSettings, read_chat
from .chat.special_tokens import complete_tokenizer
from .chat.templates import DEFAULT, ChatTemplate, choose_template, read_templates

if TYPE_CHECKING:
    from .chat.control_tokens import ControlTokens
    from .chat.rendering import Writer


class Text:
    """A folder's tokenizer and chat templates.

    Args:
        folder: The model or bundle.

    Raises:
        FolderError: A file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / "tokenizer.json"
        try:
            # not `from_file`, which takes no path that is not UTF-8
            self.tokenizer = Tokenizer.from_buffer(path.read_bytes()) if path.is_file() else None
        except Exception as error:  # the tokenizers library raises plain Exception
            raise FolderError(f"{path}: damaged ({error}): export again from an intact checkpoint") from error
        self.config = read_json(folder / "tokenizer_config.json")
        self.special_tokens: dict[str, str] = {}
        if self.tokenizer is not None:
            self.special_tokens = complete_tokenizer(self.tokenizer, folder, self.config)
            self.tokenizer.no_truncation()  # a saved training setting would cut prompts without a word
            self.tokenizer.no_padding()

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with BOS where the tokenizer puts one.

        Args:
            text: Any text; special tokens written in it become those tokens.
            special_tokens: Whether the tokenizer adds its own (BOS).
        """
        ids: list[int] = self._tokenizer().encode(_checked(text), add_special_tokens=special_tokens).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
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
        writer = self._writer(messages, settings)
        text = _checked(writer.text)
        sanitizes = writer.chat.sanitizes
        ids = self._control_tokens.encode(writer) if sanitizes else self.encode(text, special_tokens=False)
        if self._has_processor and ids[:1] != (start := self.encode("")[:1]):  # as `transformers`' processors do
            ids = start + ids if start == [self.special_id("bos_token")] else ids
        return ids

    def render_chat(self, messages: Sequence[Message] | Message, **settings: Unpack[ChatSettings]) -> str:
        """A conversation as the chat template writes it; the arguments and errors are those of `encode_chat`."""
        return self._writer(messages, settings).text

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
        return lambda token: decoder.step(tokenizer, token) or ""

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

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise SessionError(f"{self.folder} has no tokenizer.json: give token ids instead of text")
        return self.tokenizer


def _checked(text: str) -> str:
    """A text that is valid Unicode.

    Raises:
        SessionError: It has halves of characters.
    """
    try:
        text.encode()
    except UnicodeError as error:
        raise SessionError("the text is not valid Unicode: give UTF-8") from error
    return text
