import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from arriero.errors import FolderError, SessionError
from arriero.files.folders import carry_files
from arriero.runtime.text import Text

TINY = Path(__file__).parents[3] / "examples" / "tiny-llama4"
SAID = [{"role": "user", "content": "Hi"}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
NAMED = [{"name": "default", "template": "list default"}, {"name": "tool_use", "template": "list tools"}]


def folder_of(path: Path, files: dict[str, str], **config: object) -> Path:
    """The tiny model's tokenizer with other files beside it, and other settings in its config."""
    shutil.copy(TINY / "tokenizer.json", path)
    settings = json.loads((TINY / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({**settings, **config}))
    for name, text in files.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(text)
    return path


@pytest.mark.parametrize("tools", [None, [], TOOLS])
@pytest.mark.parametrize(
    ("files", "config"),
    [
        ({"chat_template.jinja": "file"}, {"chat_template": "config"}),
        ({}, {"chat_template": "config"}),
        ({}, {"chat_template": NAMED}),
        ({}, {"chat_template": {"default": "dict default", "tool_use": "dict tools"}}),
        ({"chat_template.jinja": "file"}, {"chat_template": NAMED}),
        ({"chat_template.jinja": "file", "additional_chat_templates/tool_use.jinja": "file tools"}, {}),
        ({"chat_template.jinja": "file", "additional_chat_templates/default.jinja": "other default"}, {}),
        ({"chat_template.jinja": "file\r\n\n"}, {}),
    ],
)
def test_the_template_is_that_of_transformers(
    tmp_path: Path, files: dict[str, str], config: dict[str, object], tools: list[dict[str, object]] | None
) -> None:
    folder = folder_of(tmp_path, files, **config)
    reference = AutoTokenizer.from_pretrained(folder)
    expected = reference.apply_chat_template(SAID, tools=tools, tokenize=False)
    assert Text(folder).render_chat(SAID, tools=tools) == expected
    if isinstance(reference.chat_template, dict):
        for name in reference.chat_template:
            expected = reference.apply_chat_template(SAID, chat_template=name, tokenize=False)
            assert Text(folder).render_chat(SAID, chat_template=name) == expected
    assert Text(folder).render_chat(SAID, chat_template="{{ messages[0].content }}!") == "Hi!"


def test_a_processors_template_comes_first_in_a_folder_that_has_one(tmp_path: Path) -> None:
    files = {"chat_template.jinja": "file", "chat_template.json": '{"chat_template": "legacy"}'}
    assert Text(folder_of(tmp_path, files)).render_chat(SAID) == "file"
    (tmp_path / "preprocessor_config.json").write_text("{}")
    assert Text(tmp_path).render_chat(SAID) == "legacy"
    (tmp_path / "processor_config.json").write_text('{"chat_template": "processor"}')
    assert Text(tmp_path).render_chat(SAID) == "processor"
    (tmp_path / "processor_config.json").write_text('{"chat_template": null}')
    (tmp_path / "chat_template.json").unlink()
    assert Text(tmp_path).render_chat(SAID) == "file"


def test_several_templates_without_a_default_are_asked_for_by_name(tmp_path: Path) -> None:
    folder = folder_of(
        tmp_path, {"additional_chat_templates/rag.jinja": "rag", "additional_chat_templates/x.jinja": "x"}
    )
    with pytest.raises(SessionError, match="several chat templates and no default: give chat_template, one of rag, x"):
        Text(folder).render_chat(SAID)
    assert Text(folder).render_chat(SAID, chat_template="rag") == "rag"


def test_templates_with_names_travel_with_the_folder(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    source = folder_of(tmp_path / "a", {"additional_chat_templates/rag.jinja": "rag", "added_tokens.json": "{}"})
    carry_files(source, tmp_path / "b")
    assert Text(tmp_path / "b").render_chat(SAID, chat_template="rag") == "rag"
    assert (tmp_path / "b" / "added_tokens.json").is_file()


@pytest.mark.parametrize(
    ("files", "config", "named"),
    [
        (
            {"chat_template.jinja": "a\n{% if %}"},
            {},
            r"chat_template\.jinja: the chat template does not compile \(line 2",
        ),
        ({}, {"chat_template": "{{"}, r"tokenizer_config\.json: the chat template does not compile \(line 1"),
        ({}, {"chat_template": 5}, r"tokenizer_config\.json: chat_template is 5, expected a text, or names and texts"),
        ({}, {"chat_template": [{"name": "x"}]}, r"tokenizer_config\.json: chat_template is "),
        ({"additional_chat_templates/default.jinja": "{% x %}"}, {}, r"default\.jinja: the chat template does not"),
    ],
)
def test_a_broken_template_is_the_files_fault(
    tmp_path: Path, files: dict[str, str], config: dict[str, object], named: str
) -> None:
    with pytest.raises(FolderError, match=named):
        Text(folder_of(tmp_path, files, **config)).encode_chat(SAID)


def test_a_broken_template_of_the_callers_is_the_callers_fault(tiny: Path) -> None:
    with pytest.raises(SessionError, match=r"the chat_template given does not compile \(line 1: "):
        Text(tiny).encode_chat(SAID, chat_template="{% for %}")


def test_a_template_that_is_no_text_is_the_files_fault(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {})
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(FolderError, match=r"chat_template\.jinja: cannot be read"):
        Text(folder).render_chat(SAID)
