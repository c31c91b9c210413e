"""A folder's chat templates: where they stand, and which of them a conversation goes through.

Enters: a folder. Leaves: its templates by their names. Invariant: where several files have one, it is that which
`transformers` takes.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import ArrieroError, FolderError, SessionError, shortened, shortened_text
from ...files.folders import read_json, template_names
from ...files.reading import read_text

DEFAULT, TOOL_USE = "default", "tool_use"
"""Names of the templates that are taken without and with tools where none is asked for."""


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A chat template.

    Attributes:
        source: The program, in Jinja.
        path: The file that it stands in; None where a caller gave it.
    """

    source: str
    path: Path | None = None

    def fault(self, reason: str) -> ArrieroError:
        """The error of a template that is no program."""
        if self.path is None:
            return SessionError(f"the chat_template given does not compile ({shortened_text(reason)}): correct it")
        return FolderError(f"{self.path}: the chat template does not compile ({shortened_text(reason)}): correct it")

    def too_costly(self, reason: str) -> SessionError:
        """The error of a template that takes more than it has."""
        name = "the chat_template given" if self.path is None else f"{self.path}: the chat template"
        return SessionError(f"{name} was stopped, {reason}: correct it, or give fewer messages")


def read_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, ChatTemplate]:
    """Reads a folder's chat templates.

    Files of Jinja come before what JSON holds; of a folder with a preprocessor, first of all what its processor's JSON
    holds, as `transformers`' processors have it.

    Args:
        folder: The model, bundle or checkpoint.
        config: Its tokenizer_config.json.

    Raises:
        FolderError: A file is damaged.
    """
    processor, legacy = folder / "processor_config.json", folder / "chat_template.json"
    of_processor = _named(read_json(processor).get("chat_template"), processor)
    of_legacy = _named(read_json(legacy).get("chat_template"), legacy)
    files = _files(folder)
    path = folder / "tokenizer_config.json"
    of_tokenizer = _named(config.get("chat_template"), path)
    has_processor = processor.is_file() or (folder / "preprocessor_config.json").is_file()
    if has_processor and (of_processor or of_legacy):
        return of_processor or {**files, **of_legacy}
    return files or of_tokenizer or of_legacy


def choose_template(
    templates: Mapping[str, ChatTemplate], asked: str | None, has_tools: bool, folder: Path
) -> ChatTemplate:
    """The template that a conversation goes through.

    Args:
        templates: The folder's.
        asked: A template's name, or a template; None takes the one for tools where there are any, or the default.
        has_tools: Whether tools came with the conversation.
        folder: Names the folder in errors.

    Raises:
        SessionError: There is no template, or none that is taken without being asked for.
    """
    if asked is not None:
        return templates.get(asked, ChatTemplate(asked))
    if not templates:
        raise SessionError(f"{folder} has no chat template: give a plain prompt instead")
    name = TOOL_USE if has_tools and TOOL_USE in templates else DEFAULT
    if name not in templates:
        names = shortened_text(", ".join(sorted(templates)))
        raise SessionError(f"{folder} has several chat templates and no default: give chat_template, one of {names}")
    return templates[name]


def _files(folder: Path) -> dict[str, ChatTemplate]:
    """The templates in files of their own."""
    paths = {Path(name).stem: folder / name for name in template_names(folder)}
    default = folder / "chat_template.jinja"
    if os.path.lexists(default):
        paths.setdefault(DEFAULT, default)
    return {name: ChatTemplate(read_text(path, folder=folder), path) for name, path in paths.items()}


def _named(value: Any, path: Path) -> dict[str, ChatTemplate]:
    """Templates as JSON has them: none, one, or several with names."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {DEFAULT: ChatTemplate(value, path)}
    if isinstance(value, list) and all(isinstance(each, dict) for each in value):
        value = {each.get("name"): each.get("template") for each in value}
    if not isinstance(value, dict) or not all(isinstance(text, str) for pair in value.items() for text in pair):
        raise FolderError(
            f"{path}: chat_template is {shortened(value)}, expected a text, or names and texts: correct it"
        )
    return {name: ChatTemplate(source, path) for name, source in value.items()}
