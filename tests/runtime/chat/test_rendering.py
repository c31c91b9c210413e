import json
from pathlib import Path
from typing import Any

import pytest
from chat_templates import FULL, PARTS_ONLY, TEXTS_ONLY, THINKING
from transformers import AutoTokenizer

from arriero.errors import SessionError
from arriero.runtime.text import Text

SCHEMA = {
    "type": "function",
    "function": {"name": "weather", "description": "É <b>", "parameters": {"type": "object", "properties": {}}},
}
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}
ASKED: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "The weather?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "1", "content": {"sky": "clear"}},
    {"role": "assistant", "content": "Clear.", "tool_calls": None},
]
TEXTS = [{"role": "user", "content": [{"type": "text", "text": "One. "}, {"type": "text", "text": "Two."}]}]


@pytest.mark.parametrize("count", [2, 3, 4, 5])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tools": [SCHEMA]},
        {"tools": [SCHEMA], "chat_template_kwargs": {"tools_in_user_message": False, "date_string": "today"}},
        {"add_generation_prompt": False},
        {"add_generation_prompt": True},
        {"documents": [{"title": "a", "text": "b"}]},
        {"chat_template_kwargs": {"bos_token": "<s>"}},
    ],
    ids=str,
)
def test_tools_and_variables_are_those_of_transformers(tiny: Path, count: int, settings: dict[str, Any]) -> None:
    messages = ASKED[:count]
    given = {"add_generation_prompt": messages[-1]["role"] != "assistant", **settings, "chat_template": FULL}
    variables = given.pop("chat_template_kwargs", {})
    expected = AutoTokenizer.from_pretrained(tiny).apply_chat_template(messages, tokenize=False, **given, **variables)
    assert Text(tiny).render_chat(messages, chat_template=FULL, **settings) == expected


@pytest.mark.parametrize(
    ("last", "field"),
    [
        ({"content": "A list, "}, True),
        ({"content": "  "}, True),
        ({"content": [{"type": "text", "text": "A "}, {"type": "text", "text": "list "}]}, True),
        ({"content": "", "reasoning_content": "so it"}, "reasoning_content"),
        ({"content": "", "thinking": "so it "}, "thinking"),
    ],
)
@pytest.mark.parametrize("template", [FULL, THINKING])
def test_a_message_is_continued_as_in_transformers(
    tiny: Path, last: dict[str, Any], field: bool | str, template: str
) -> None:
    messages = [*ASKED[:2], {"role": "assistant", **last}]
    try:
        expected = AutoTokenizer.from_pretrained(tiny).apply_chat_template(
            messages, tokenize=False, continue_final_message=field, chat_template=template
        )
    except ValueError:
        with pytest.raises(SessionError, match=r"cannot be continued|could be continued"):
            Text(tiny).render_chat(messages, continue_final_message=field, chat_template=template)
    else:
        assert Text(tiny).render_chat(messages, continue_final_message=field, chat_template=template) == expected


def test_parts_before_a_template_that_takes_texts_are_one_text(tiny: Path) -> None:
    """`transformers` prints the list as Python does, or fails."""
    reference, text = AutoTokenizer.from_pretrained(tiny), Text(tiny)
    joined = [{"role": "user", "content": "One. \nTwo."}]
    assert "[{'type'" in reference.apply_chat_template(TEXTS, tokenize=False, chat_template=TEXTS_ONLY)
    expected = reference.apply_chat_template(
        joined, tokenize=False, chat_template=TEXTS_ONLY, add_generation_prompt=True
    )
    assert text.render_chat(TEXTS, chat_template=TEXTS_ONLY) == expected
    adding = "{% for message in messages %}{{ message.content + '|' }}{% endfor %}"
    with pytest.raises(TypeError):
        reference.apply_chat_template(TEXTS, tokenize=False, chat_template=adding)
    assert text.render_chat(TEXTS, chat_template=adding) == "One. \nTwo.|"
    pictured = [{"role": "user", "content": [{"type": "image"}, *TEXTS[0]["content"]]}]
    with pytest.raises(SessionError, match="takes texts, and a message has an image: leave the image out"):
        text.render_chat(pictured, chat_template=TEXTS_ONLY)


def test_only_messages_that_a_template_takes_as_text_are_joined(tiny: Path) -> None:
    more = {"role": "user", "content": [{"type": "text", "text": "Three. "}, {"type": "text", "text": "Four."}]}
    messages = [{"role": "system", "content": "x"}, *TEXTS, {"role": "assistant", "content": "y"}, more]
    found = Text(tiny).render_chat(messages, tools=[SCHEMA], chat_template=FULL)  # trims the first user's content
    assert "One. \nTwo.<|eot|>" in found
    assert "Three. Four.<|eot|>" in found


def test_a_text_before_a_template_that_takes_parts_is_a_part(tiny: Path) -> None:
    """`transformers` leaves it out without a word."""
    said = [{"role": "user", "content": "One. Two."}]
    reference = AutoTokenizer.from_pretrained(tiny)
    assert "One" not in reference.apply_chat_template(said, tokenize=False, chat_template=PARTS_ONLY)
    expected = reference.apply_chat_template(
        TEXTS, tokenize=False, chat_template=PARTS_ONLY, add_generation_prompt=True
    )
    assert Text(tiny).render_chat(said, chat_template=PARTS_ONLY) == expected


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tools": [print]}, "tools has a Python function: give its JSON schema"),
        ({"tools": print}, "tools has a Python function"),
        ({"tools": SCHEMA}, "tools is {.*expected a list of the JSON schemas"),
        ({"tools": ["f"]}, "tools has 'f', expected a list"),
        ({"documents": ["a"]}, "documents has 'a', expected a list of dictionaries"),
        ({"documents": 5}, "documents is 5"),
        ({"chat_template": 5}, "chat_template is 5, expected a template's name or a template"),
        ({"chat_template_kwargs": 5}, "chat_template_kwargs is 5, expected a dictionary"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs has 'messages': give it as a keyword"),
        ({"chat_template_kwargs": {5: 5}}, "chat_template_kwargs has 5"),
        ({"chat_template_kwargs": {"x": object()}}, "chat_template_kwargs holds <object"),
        ({"add_generation_prompt": "yes"}, "add_generation_prompt is 'yes', expected True or False"),
        ({"continue_final_message": 5}, "continue_final_message is 5, expected True, False or the name of a field"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "exclude each other: give one of them"),
        ({"continue_final_message": "nothing"}, "reads no nothing: it cannot be continued"),
        ({"sanitize_control_tokens": 1}, "sanitize_control_tokens is 1, expected True or False"),
        (
            {"chat_template": "{{ raise_exception('x' * 1000 + messages[0].content) }}"},
            "does not take these messages: xxx",
        ),
    ],
    ids=[*map(str, range(17))],
)
def test_settings_that_are_none_are_named(tiny: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(SessionError, match=said) as caught:
        Text(tiny).render_chat([{"role": "user", "content": "y" * 10_000}], **settings)
    assert len(str(caught.value)) < 500


def test_tools_are_given_as_the_refusal_says(tiny: Path) -> None:
    schema = {"type": "function", "function": {"name": "print", "parameters": {}}}
    written = Text(tiny).render_chat(ASKED[1:2], tools=[schema], chat_template=FULL)
    assert json.dumps(schema, indent=2) in written
