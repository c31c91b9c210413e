"""Text in and out: the tokenizer and the chat template.

Enters: a folder's own files. Leaves: token ids of texts and conversations, and texts of token ids. Invariant: a damaged
file is refused when it is read; a missing one only when it is needed.
"""

import functools
import json
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from ..errors import FolderError, SessionError

if TYPE_CHECKING:
    from jinja2 import Template

Message = dict[str, Any]
"""One turn of a conversation: `role`, and `content`, a text or a list of parts."""

MARK = "<open-message> "
"""Put where a message is to be continued; the space at its end shows whether the template trims."""


class Text:
    """A folder's tokenizer and chat template.

    Args:
        folder: The model or bundle.

    Raises:
        FolderError: A file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / "tokenizer.json"
        try:
            self.tokenizer = Tokenizer.from_file(str(path)) if path.is_file() else None
        except Exception as error:  # the tokenizers library raises plain Exception
            raise FolderError(f"{path}: damaged ({error}): export again from an intact checkpoint") from error
        if self.tokenizer is not None:  # a saved training setting would cut prompts without a word
            self.tokenizer.no_truncation()
            self.tokenizer.no_padding()
        self.config = read_json(folder / "tokenizer_config.json")

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with BOS where the tokenizer puts one.

        Args:
            text: Any text; special tokens written in it become those tokens.
            special_tokens: Whether the tokenizer adds its own (BOS).
        """
        try:
            ids: list[int] = self._tokenizer().encode(text, add_special_tokens=special_tokens).ids
        except (TypeError, UnicodeError) as error:
            raise SessionError("the text is not valid Unicode: give UTF-8") from error
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        text: str = self._tokenizer().decode(list(ids), skip_special_tokens=True)
        return text

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation in the checkpoint's chat template, up to where the assistant speaks next.

        A conversation whose last message is the assistant's ends with it.
        """
        return self.encode(self.render_chat(messages), special_tokens=False)

    def render_chat(self, messages: Sequence[Message], *, open_last: bool = False) -> str:
        """A conversation as the chat template writes it.

        Args:
            messages: The turns.
            open_last: Whether the text ends within the last message, to be continued, not where the assistant begins.

        Raises:
            SessionError: There is no template, or it does not take these messages.
        """
        template = self.chat_template
        if template is None:
            raise SessionError(f"{self.folder} has no chat template: give a plain prompt instead")
        special = {name: _token(self.config.get(name)) for name in ("bos_token", "eos_token", "pad_token")}
        turns = list(messages)
        asks = not turns or turns[-1].get("role") != "assistant"
        if open_last:
            turns[-1] = {**turns[-1], "content": turns[-1]["content"] + MARK}
        try:
            text = _compiled(template).render(
                messages=turns, tools=None, documents=None, add_generation_prompt=asks and not open_last, **special
            )
        except Exception as error:  # a template is a program, and fails in its own ways
            raise SessionError(f"the chat template does not take these messages: {error}") from error
        return _up_to_mark(text) if open_last else text

    def special_id(self, name: str) -> int | None:
        """The id of a special token by its name in `tokenizer_config.json`, as in `bos_token`; None if it has none."""
        token = _token(self.config.get(name))
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
    def chat_template(self) -> str | None:
        """The template's source, in Jinja; None where there is none."""
        path = self.folder / "chat_template.jinja"
        if path.is_file():
            return path.read_text("utf-8")
        template = read_json(self.folder / "chat_template.json").get("chat_template", self.config.get("chat_template"))
        if isinstance(template, list):  # several named templates
            template = {each["name"]: each["template"] for each in template}.get("default")
        return template

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise SessionError(f"{self.folder} has no tokenizer.json: give token ids instead of text")
        return self.tokenizer


@functools.lru_cache(maxsize=4)
def _compiled(source: str) -> "Template":
    """A chat template, compiled once: that takes longer than all else that a short prompt needs."""
    from jinja2 import TemplateError  # here, since ids and plain text need none of it and a process starts sooner
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, empty where the file is missing.

    Raises:
        FolderError: The file is damaged.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise FolderError(f"{path}: damaged ({error}): export again from an intact checkpoint") from error
    if not isinstance(value, dict):
        raise FolderError(f"{path}: not a JSON object: export again from an intact checkpoint")
    return value


def _up_to_mark(text: str) -> str:
    """The text that a template wrote before the mark, without the space that it trims from a message's end."""
    place = text.rfind(MARK.strip())
    if place < 0:
        raise SessionError("the chat template leaves out the end of the last message: it cannot be continued")
    return text[:place] if text[place:].startswith(MARK) else text[:place].rstrip()


def _token(value: Any) -> str:
    """A special token's text; tokenizer configs write it plainly or as an object."""
    return str(value.get("content", "")) if isinstance(value, dict) else str(value or "")
