"""Files of prompts: answered in flight as if alone, resumable, and refused where they are none."""

import contextlib
import json
from pathlib import Path

import pytest
from json_keys import documented
from typer.testing import CliRunner

import arriero
from arriero.cli import batch
from arriero.cli.app import app
from arriero.cli.batch import read_prompts
from arriero.errors import SessionError
from arriero.runtime.text import Text

TINY = Path(__file__).parents[2] / "examples" / "tiny-llama4"

PROMPTS = [
    {"prompt": "The for statement", "id": "first"},
    {"messages": [{"role": "user", "content": "What is a list?"}]},
    {"prompt": "word " * 5000},
    {"prompt": "The with statement"},
]
SETTINGS = ["--max-new-tokens", "6", "--temperature", "0", "--max-seq", "256"]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, PROMPTS)) + "\n")
    return path


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["run", *map(str, arguments), *SETTINGS])
    return result.exit_code, result.stdout, result.stderr


def test_prompts_are_answered_as_if_alone_and_one_that_fails_ends_no_other(
    tiny_model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "answers.jsonl"
    code, stdout, stderr = run(tiny_model, "--prompts", prompts, "-o", out, "--json")
    assert code == 2  # one could not be answered
    assert set(json.loads(stdout)) == documented("run --prompts")
    assert "3 of 4 prompts answered" in stderr
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert [answer["line"] for answer in answers] == [1, 2, 3, 4]
    assert answers[0]["id"] == "first"
    assert "the session can hold" in answers[2]["error"]
    session = arriero.load(tiny_model, max_seq=256)
    for at, prompt in ((0, "The for statement"), (1, PROMPTS[1]["messages"]), (3, "The with statement")):
        alone = session.generate(prompt, max_new_tokens=6, temperature=0)
        assert answers[at]["ids"] == alone.ids
    whole = out.read_bytes()
    assert "exists: choose another output, or --force" in run(tiny_model, "--prompts", prompts, "-o", out)[2]

    add, kept = batch.Answers.add, []

    def stop(self: batch.Answers, answer: dict[str, object]) -> None:
        if len(kept) == 2:
            raise KeyboardInterrupt
        kept.append(answer)
        add(self, answer)

    again = tmp_path / "again.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(batch.Answers, "add", stop)
        assert run(tiny_model, "--prompts", prompts, "-o", again)[0] == 130
    assert not again.exists()
    assert "Going on: 2 of 4 prompts are answered." in run(tiny_model, "--prompts", prompts, "-o", again)[2]
    assert again.read_bytes() == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.jsonl", "answers.jsonl", "prompts.jsonl"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--prompts", "p.jsonl"], "add -o OUT.jsonl"),
        (["--prompt", "x", "-o", "out"], "-o is the file of answers to --prompts FILE"),
        (["--prompts", "p.jsonl", "-o", "out", "--chat"], "--chat does not go with --prompts"),
        (["--prompts", "none.jsonl", "-o", "out"], "No such file or directory: give a file of prompts with --prompts"),
        (["--prompts", ".", "-o", "out"], "is a folder: give a file of prompts with --prompts"),
        (["--prompt", "x", "--top-logprobs", "2"], "the JSON result alone: add --json"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: list[str], said: str) -> None:
    code, _, stderr = run("nowhere", *options)
    assert code == 2
    assert said in stderr


def test_messages_of_other_types_are_read_for_their_line_alone(tmp_path: Path) -> None:
    for content in (5, None, True, {"a": 1}, [5], [[]], [None], [{"path": 5}]):
        (tmp_path / "p.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": content}]}))
        (asked,) = read_prompts(tmp_path / "p.jsonl")
        assert asked.prompt == [{"role": "user", "content": content}]
        with contextlib.suppress(SessionError):  # and no other error
            Text(TINY).encode_chat(asked.prompt)


@pytest.mark.parametrize("line", ['{"text": "x"}', '{"prompt": 5}', "[]", "{", '{"prompt": "x", "messages": []}'])
def test_a_line_that_is_no_prompt_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "p.jsonl").write_text(f'{{"prompt": "x"}}\n{line}\n')
    code, _, stderr = run("nowhere", "--prompts", tmp_path / "p.jsonl", "-o", tmp_path / "out")
    assert code == 2
    assert "p.jsonl, line 2" in stderr
    assert 'write each in a line of JSON, {"prompt": TEXT} or' in stderr
