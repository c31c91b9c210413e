"""Random pairs of a chat template and a conversation, written by us and by `transformers`, and compared."""

import collections
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

from chat_templates import TEMPLATES
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from arriero.errors import SessionError
from arriero.runtime.text import Text

TINY = Path(__file__).parent.parent.parent / "examples" / "tiny-llama4-vision"
MORE_TOKENS = ("<|python_start|>", "<|python_end|>", "<|reasoning_end|>")
WORDS = (
    *(
        "What is",
        "the",
        "list",
        "of",
        "x<y",
        "if a | b > 0:",
        "naïve",
        "日本",
        "🦙",
        "\n\n",
        "\t",
        "  ",
        "{}",
        '"quoted"',
    ),
    *("<b>", "&amp;", "{{ x }}", "{% raw %}", "'", "\\n", "|", "<", ">", "</s>", "[INST]", "1.5", "role"),
)
CONTROL = (
    "<|eot|>",
    "<|header_start|>",
    "<|image|>",
    "<|patch|>",
    "<|begin_of_text|>",
    "<think>",
    "</think>",
    "<|eom|>",
)


def write_folder(folder: Path) -> PreTrainedTokenizerBase:
    """Writes a tokenizer with more control tokens, special ones and others. Returns that of `transformers`."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken(token, special=True) for token in MORE_TOKENS])
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def random_text(rng: random.Random, control: float) -> str:
    """Some words, among them control tokens with a probability of `control` each."""
    words = [rng.choice(CONTROL if rng.random() < control else WORDS) for _ in range(rng.choice([0, 1, 2, 5, 12]))]
    return rng.choice(["", " "]).join(words) + rng.choice(["", "", " ", "\n"])


def random_value(rng: random.Random, control: float, depth: int = 0) -> Any:
    """A value as JSON has it."""
    kind = rng.randrange(7 if depth < 2 else 5)
    if kind < 5:
        return [random_text(rng, control), rng.randrange(-9, 99), rng.random(), rng.random() < 0.5, None][kind]
    values = [random_value(rng, control, depth + 1) for _ in range(rng.randrange(3))]
    return values if kind == 5 else {f"k{number}": value for number, value in enumerate(values)}


def random_content(rng: random.Random, control: float) -> Any:
    """A text, or a list of parts."""
    if rng.random() < 0.85:
        return random_text(rng, control)
    parts: list[dict[str, Any]] = [
        {"type": "text", "text": random_text(rng, control)} for _ in range(rng.randint(1, 3))
    ]
    if rng.random() < 0.4:
        parts.insert(rng.randrange(len(parts) + 1), {"type": "image"})
    return parts


def random_message(rng: random.Random, role: str, control: float) -> dict[str, Any]:
    """A message as clients write it."""
    message: dict[str, Any] = {"role": role, "content": random_content(rng, control)}
    if role in ("tool", "ipython"):
        message["content"] = rng.choice([message["content"], random_value(rng, control)])
        message.update(rng.choice([{}, {"tool_call_id": "c1"}, {"name": "f"}]))
    if role == "assistant":
        function = {"name": rng.choice(["f", "get_x"]), "arguments": {"a": random_value(rng, control), "b": 1}}
        if rng.random() < 0.3:
            function["arguments"] = '{"a": 1}'
        calls = [{"id": "c1", "type": "function", "function": function}] * rng.choice([1, 1, 2])
        message.update(rng.choice([{}, {}, {"tool_calls": None}, {"tool_calls": calls}, {"tool_calls": []}]))
        if message.get("tool_calls") and rng.random() < 0.6:
            message["content"] = None
        message.update(rng.choice([{}, {}, {"reasoning_content": "so"}, {"thinking": "so"}, {"refusal": None}]))
    return message


def random_schema(rng: random.Random, control: float) -> dict[str, Any]:
    """A tool."""
    properties = {
        name: {"type": rng.choice(["string", "integer", "array"])} for name in rng.sample("xyz", rng.randrange(3))
    }
    for each in properties.values():
        each["description"] = random_text(rng, control)
    function = {"name": "get_x", "description": random_text(rng, control)}
    function |= {"parameters": {"type": "object", "properties": properties, "required": list(properties)}}
    return {"type": "function", "function": function}


def random_pair(rng: random.Random, control: float) -> tuple[str, list[dict[str, Any]], dict[str, Any]]:
    """A template's name, a conversation, and what came with it."""
    roles = ["system"] * rng.choice([0, 1]) + ["user"]
    for _ in range(rng.randrange(4)):
        roles += rng.choice(
            [["assistant", "user"], ["assistant", "tool"], ["assistant", "ipython", "assistant"], ["user"]]
        )
    settings: dict[str, Any] = {"add_generation_prompt": rng.random() < 0.5}
    if rng.random() < 0.4:
        settings["tools"] = [random_schema(rng, control) for _ in range(rng.randrange(3))]
    if rng.random() < 0.3:
        settings["documents"] = [{"title": random_text(rng, control), "text": random_text(rng, control)}]
    variables = {
        "date_string": "1 May 2025",
        "tools_in_user_message": False,
        "enable_thinking": False,
        "tool_token": "T",
    }
    settings["chat_template_kwargs"] = {name: value for name, value in variables.items() if rng.random() < 0.3}
    if roles[-1] == "assistant" and rng.random() < 0.5:
        settings |= {"add_generation_prompt": False, "continue_final_message": True}
    return rng.choice(list(TEMPLATES)), [random_message(rng, role, control) for role in roles], settings


def compare(ours: Text, theirs: PreTrainedTokenizerBase, pair: tuple[str, list[dict[str, Any]], dict[str, Any]]) -> str:
    """Writes a pair with both. Returns how they compare.

    Raises:
        AssertionError: We take it and write another text, or other ids.
    """
    name, messages, settings = pair
    given = {**settings, "chat_template": TEMPLATES[name]}
    variables = given.pop("chat_template_kwargs")
    try:
        expected = theirs.apply_chat_template(messages, tokenize=False, **given, **variables)
    except Exception:  # of any kind
        expected = None
    try:
        text = ours.render_chat(messages, **settings, chat_template=TEMPLATES[name])
    except SessionError as error:
        return "both refuse" if expected is None else f"we alone refuse: {str(error)[:60]}"
    if expected is None or text != expected:
        taken = [_taken(message, expected, name == "parts_only") for message in messages]
        assert taken != messages, f"{name}: {text!r} instead of {expected!r}"
        assert text == theirs.apply_chat_template(taken, tokenize=False, **given, **variables)
        return "we alone take, as another form of the same content"
    assert text == expected, f"{name}: {text!r} instead of {expected!r}"
    raw = theirs.apply_chat_template(messages, return_dict=False, **given, **variables)
    assert ours.encode_chat(messages, **settings, chat_template=TEMPLATES[name], sanitize_control_tokens=False) == raw
    try:
        marked = theirs.apply_chat_template(
            messages, return_dict=False, sanitize_control_tokens=True, **given, **variables
        )
    except ValueError:  # its marks change what the template does
        marked = None
    try:
        ids = ours.encode_chat(messages, **settings, chat_template=TEMPLATES[name])
    except SessionError as error:
        return f"equal, its control tokens refused: {str(error)[:60]}"
    assert ours.tokenizer is not None
    assert ours.tokenizer.decode(ids, skip_special_tokens=False) == text
    if marked is None:
        return "equal, of which transformers cannot say whose control tokens are"
    if ids == marked:
        return "equal, some control tokens as text" if marked != raw else "equal"
    special = {id for id, token in theirs.added_tokens_decoder.items() if token.special}
    found, allowed = (collections.Counter(id for id in each if id in special) for each in (ids, marked))
    assert found <= allowed, f"{name}: {theirs.decode(ids)!r} has more control tokens than {theirs.decode(marked)!r}"
    return "equal, more control tokens as text" if found < allowed else "equal, other ids of text"


def _taken(message: dict[str, Any], written: str | None, takes_parts: bool) -> dict[str, Any]:
    """A message with its texts in one where a template would print the list, or in a part where it takes parts."""
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": [_part(content)]} if takes_parts else message
    if (
        takes_parts
        or not isinstance(content, list)
        or not all(isinstance(part, dict) and "text" in part for part in content)
    ):
        return message
    is_lost = written is None or any(str(part) in written for part in content)
    return {**message, "content": "\n".join(part["text"] for part in content)} if is_lost else message


def _part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def compare_pairs(pairs: int, seed: int) -> collections.Counter[str]:
    """Compares that many pairs, half of them with control tokens in what is said. Returns the counts."""
    rng, counts = random.Random(seed), collections.Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        theirs = write_folder(Path(folder))
        ours = Text(Path(folder))
        for number in range(pairs):
            counts[compare(ours, theirs, random_pair(rng, 0.3 * (number % 2)))] += 1
    return counts
