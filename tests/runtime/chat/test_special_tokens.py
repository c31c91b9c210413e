import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from arriero.errors import FolderError
from arriero.runtime.text import Text

TINY = Path(__file__).parents[3] / "examples" / "tiny-llama4"
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
TEMPLATE = "".join(
    f"{name}={{{{ {name} }}}}{{{{ {name} is defined }}}};"
    for name in (*NAMES, "image_token", "x_token", "add_bos_token")
)
SAID = [{"role": "user", "content": "Hi"}]
TEXT = "a <pad> <new> <old><|eot|> <|x|> <|y|>def"


def object_of(content: str, **flags: bool) -> dict[str, Any]:
    return {"content": content, "lstrip": False, "rstrip": False, "single_word": False, "normalized": False, **flags}


def saved(content: str, **flags: bool) -> dict[str, Any]:
    return {"__type": "AddedToken", **object_of(content, special=True, **flags)}


CONFIGS: list[dict[str, dict[str, Any]]] = [
    {},
    {"special_tokens_map": {"bos_token": "<|eot|>", "cls_token": "<|x|>"}},
    {"special_tokens_map": {"unk_token": object_of("<new>"), "image_token": "<|y|>"}},
    {"special_tokens_map": {"additional_special_tokens": ["<|x|>", "<|y|>"]}},
    {"special_tokens_map": {"extra_special_tokens": {"image_token": "<|x|>"}}},
    {"tokenizer_config": {"extra_special_tokens": {"image_token": "<|x|>", "x_token": "<|y|>"}}},
    {"tokenizer_config": {"extra_special_tokens": ["<|x|>", "<|eot|>"]}},
    {"tokenizer_config": {"additional_special_tokens": ["<|x|>"], "extra_special_tokens": None}},
    {
        "tokenizer_config": {"extra_special_tokens": ["<|x|>"]},
        "special_tokens_map": {"extra_special_tokens": ["<|y|>"]},
    },
    {"tokenizer_config": {"x_token": "<|x|>", "add_bos_token": True, "mask_token": saved("<new>", rstrip=True)}},
    {"tokenizer_config": {"pad_token": None, "eos_token": "<old>"}},
    {"tokenizer_config": {"added_tokens_decoder": {"692": saved("def")}}, "special_tokens_map": {"cls_token": "<|x|>"}},
    {"tokenizer_config": {"added_tokens_decoder": {"2048": object_of("<new>", special=False)}, "sep_token": "<new>"}},
    {"tokenizer_config": {"added_tokens_decoder": {"3": object_of("<|eot|>", special=True, lstrip=True)}}},
    {"added_tokens": {"<new>": 2048, "<old>": 2049}, "special_tokens_map": {"cls_token": "<old>"}},
]


@pytest.mark.parametrize("files", CONFIGS, ids=str)
def test_special_tokens_are_those_of_transformers(tmp_path: Path, files: dict[str, dict[str, Any]]) -> None:
    shutil.copy(TINY / "tokenizer.json", tmp_path)
    config = json.loads((TINY / "tokenizer_config.json").read_text()) | files.get("tokenizer_config", {})
    for name, value in {**files, "tokenizer_config": config}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    reference, ours = AutoTokenizer.from_pretrained(tmp_path), Text(tmp_path)
    assert ours.render_chat(SAID) == reference.apply_chat_template(SAID, tokenize=False)
    assert ours.special_tokens == reference.special_tokens_map
    ids = ours.encode(TEXT)
    assert ids == reference(TEXT).input_ids
    assert ours.decode(ids) == reference.backend_tokenizer.decode(ids, skip_special_tokens=True)


def test_a_saved_padding_names_the_padding_token(tmp_path: Path) -> None:
    tokenizer = Text(TINY).tokenizer
    assert tokenizer is not None
    tokenizer.enable_padding(pad_id=3, pad_token="<|eot|>")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text("{{ pad_token }}{{ bos_token is defined }}")
    expected = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(SAID, tokenize=False)
    assert Text(tmp_path).render_chat(SAID) == expected == "<|eot|>False"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tokenizer_config", {"bos_token": 5}),
        ("tokenizer_config", {"eos_token": {"lstrip": True}}),
        ("tokenizer_config", {"extra_special_tokens": 7}),
        ("tokenizer_config", {"extra_special_tokens": [None]}),
        ("tokenizer_config", {"model_specific_special_tokens": [1]}),
        ("tokenizer_config", {"added_tokens_decoder": {"x": "y"}}),
        ("tokenizer_config", {"added_tokens_decoder": [1]}),
        ("special_tokens_map", {"unk_token": ["<x>"]}),
        ("special_tokens_map", []),
        ("added_tokens", {"<x>": "y"}),
    ],
)
def test_a_token_that_is_none_is_named(tmp_path: Path, name: str, value: Any) -> None:
    shutil.copy(TINY / "tokenizer.json", tmp_path)
    (tmp_path / f"{name}.json").write_text(json.dumps(value))
    with pytest.raises(FolderError, match=r"correct it|export again"):
        Text(tmp_path)
