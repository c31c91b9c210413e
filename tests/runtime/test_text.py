import re
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from arriero.errors import FolderError, SessionError
from arriero.runtime.defaults import read_defaults
from arriero.runtime.stopping import StopText
from arriero.runtime.text import Text

TEXTS = ("def f(x):\n    return x", "naïve café — 日本語 🦙", "", " leading", "<|eot|> in a text")
MESSAGES = [
    {"role": "system", "content": "Be brief. "},
    {"role": "user", "content": "What is str.join?"},
    {"role": "assistant", "content": "A method."},
    {"role": "user", "content": "Of what?"},
]


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_transformers(tiny: Path, text: str) -> None:
    assert Text(tiny).encode(text) == AutoTokenizer.from_pretrained(tiny)(text).input_ids


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_chat_template_gives_the_ids_of_transformers(tiny: Path, count: int) -> None:
    reference = AutoTokenizer.from_pretrained(tiny)
    messages = MESSAGES[:count]
    expected = reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert Text(tiny).encode_chat(messages) == expected


@pytest.mark.parametrize("template", [None, "{% for m in messages %}{{ m['content'] }}|{% endfor %}"])
def test_an_open_message_ends_the_prompt_as_in_transformers(tiny: Path, tmp_path: Path, template: str | None) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny / name, tmp_path)
    if template is not None:
        (tmp_path / "chat_template.jinja").write_text(template)
    messages = [*MESSAGES[:2], {"role": "assistant", "content": "A method, "}]
    reference = AutoTokenizer.from_pretrained(tmp_path)
    expected = reference.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    assert Text(tmp_path).render_chat(messages, continue_final_message=True) == expected
    (tmp_path / "chat_template.jinja").write_text("nothing of its content")
    with pytest.raises(SessionError, match="leaves out the end of the last message: it cannot be continued"):
        Text(tmp_path).render_chat(messages, continue_final_message=True)


@pytest.mark.parametrize("name", ["bos_token", "eos_token", "pad_token", "unk_token"])
def test_special_tokens_have_the_ids_of_transformers(tiny: Path, name: str) -> None:
    assert Text(tiny).special_id(name) == getattr(AutoTokenizer.from_pretrained(tiny), f"{name}_id")


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_pieces_make_the_whole_text(tiny: Path, text: str) -> None:
    reader = Text(tiny)
    ids = reader.encode(text, special_tokens=False)
    pieces = list(map(reader.open_stream(), ids))
    assert "".join(pieces) == reader.decode(ids)
    assert "\ufffd" not in "".join(pieces)


def test_a_folder_without_a_tokenizer_takes_ids_only(tmp_path: Path) -> None:
    with pytest.raises(SessionError, match=r"has no tokenizer\.json: export again with --tokenizer DIR"):
        Text(tmp_path).encode("x")
    with pytest.raises(SessionError, match=r"has no tokenizer\.json: .* or give token ids instead"):
        Text(tmp_path).encode_chat(MESSAGES)


def test_a_folder_without_a_template_says_so(tiny: Path, tmp_path: Path) -> None:
    shutil.copy(tiny / "tokenizer.json", tmp_path)
    with pytest.raises(SessionError, match="has no chat template: give a plain prompt"):
        Text(tmp_path).encode_chat(MESSAGES)


def test_a_template_that_refuses_is_quoted(tiny: Path, tmp_path: Path) -> None:
    shutil.copy(tiny / "tokenizer.json", tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(SessionError, match="does not take these messages: roles must alternate"):
        Text(tmp_path).encode_chat(MESSAGES)
    (tmp_path / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(SessionError, match="does not take these messages"):
        Text(tmp_path).encode_chat(MESSAGES)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(FolderError, match=r"tokenizer\.json: damaged"):
        Text(tmp_path)
    (tmp_path / "generation_config.json").write_text("[")
    with pytest.raises(FolderError, match=r"generation_config\.json: damaged"):
        read_defaults(tmp_path)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ('{"do_sample": true, "temperature": "hot"}', "generation_config.json: "),
        ('{"do_sample": true, "top_p": 3}', "generation_config.json: top_p is 3, expected"),
        ('{"eos_token_id": "x"}', "generation_config.json: eos_token_id is 'x'"),
        ('{"eos_token_id": {"a": 1}}', "generation_config.json: eos_token_id is"),
    ],
)
def test_a_generation_config_out_of_range_is_named(tmp_path: Path, config: str, said: str) -> None:
    (tmp_path / "generation_config.json").write_text(config)
    with pytest.raises(FolderError, match=re.escape(said)):
        read_defaults(tmp_path)


def test_a_saved_truncation_does_not_cut_prompts(tiny: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = "The quick brown fox jumps over the lazy dog"
    assert Text(tmp_path).encode(text) == Text(tiny).encode(text)


def test_defaults_are_greedy_unless_the_checkpoint_samples(tmp_path: Path) -> None:
    path = tmp_path / "generation_config.json"
    path.write_text('{"eos_token_id": [1, 2], "temperature": 0.6, "top_p": null}')
    assert read_defaults(tmp_path).sampling.temperature == 0
    assert read_defaults(tmp_path).eos_token_ids == (1, 2)
    path.write_text('{"eos_token_id": 5, "temperature": 0.6, "do_sample": true, "top_p": 0.9}')
    sampling = read_defaults(tmp_path).sampling
    assert (sampling.temperature, sampling.top_p) == (0.6, 0.9)
    assert read_defaults(tmp_path).eos_token_ids == (5,)


@pytest.mark.parametrize(
    ("pieces", "stops", "shown"),
    [
        (["one ", "two"], (), ("one two", False)),
        (["one ", "two"], "two", ("one ", True)),
        (["one t", "w", "o three"], ["two"], ("one ", True)),
        (["one t", "w", "x"], ["two"], ("one twx", False)),
        (["a", "b", "c"], ["bc", "ab"], ("", True)),
        (["aab"], ["ab"], ("a", True)),
        (["endles"], ["endless"], ("endles", False)),
        (["x"], [""], ("x", False)),
    ],
)
def test_text_is_shown_up_to_the_first_stop_string(pieces: list[str], stops: object, shown: tuple[str, bool]) -> None:
    stop, text = StopText(stops), ""  # type: ignore[arg-type]
    for piece in pieces:
        more, stopped = stop.take(piece)
        text += more
        if stopped:
            break
    else:
        stopped = False
        text += stop.rest()
    assert (text, stopped) == shown
