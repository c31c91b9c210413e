"""Conversations: commands, refused turns, ended answers, and paths as people type or drop them."""

import io
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from json_keys import documented

from arriero.cli.chat import COMMAND, COMMANDS, Chat, interrupts_counted, paths
from arriero.cli.terminal import Terminal
from arriero.errors import SessionError


class Model:
    """Answers with the number of messages; refuses text that says so, and is interrupted by text that says so."""

    def __init__(self) -> None:
        self.heard: list[list[dict[str, Any]]] = []

    def answer(self, messages: list[dict[str, Any]], is_ended: Callable[[], bool]) -> str:
        self.heard.append([dict(message) for message in messages])
        said = str(messages[-1]["content"])
        if "refuse" in said:
            raise SessionError("the prompt is too long: shorten it")
        if "memory" in said:
            raise MemoryError
        if "never" in said:
            raise KeyboardInterrupt
        if "interrupt" in said:
            os.kill(os.getpid(), signal.SIGINT)
            assert is_ended()
            return "half"
        assert not is_ended()
        return f"answer {len(messages)}"


def converse(
    typed: str | bytes, monkeypatch: pytest.MonkeyPatch, *, first: str | None = None, **settings: Any
) -> tuple[Model, Chat]:
    model = Model()
    stdin = io.TextIOWrapper(io.BytesIO(typed.encode() if isinstance(typed, str) else typed), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", stdin)
    terminal = Terminal(as_json=settings.pop("as_json", False))
    chat = Chat(answer=model.answer, terminal=terminal, **settings)
    chat.run(first)
    return model, chat


def said(chat: Chat) -> list[Any]:
    return [message["content"] for message in chat.messages]


@pytest.mark.parametrize("word", ["refuse", "memory"])
def test_a_refused_turn_is_reported_and_the_chat_goes_on(
    word: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, chat = converse(f"a\n{word} this\nb\n", monkeypatch, as_json=True)
    assert said(chat) == ["a", "answer 1", "b", "answer 3"]
    out, err = capsys.readouterr()
    assert err.count("arriero: ") == 1
    assert set(json.loads(out)) == documented("error")


def test_a_line_that_is_not_utf_8_spoils_no_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, chat = converse(b"a\n\xff\xfe\nb\n", monkeypatch)
    assert said(chat) == ["a", "answer 1", "b", "answer 3"]
    assert "not UTF-8 text: convert it" in capsys.readouterr().err


def test_an_interrupt_ends_the_answer_and_not_the_conversation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGINT)
    _, chat = converse("interrupt\nnever\nb\n", monkeypatch)
    assert said(chat) == ["interrupt", "half", "b", "answer 3"]
    assert capsys.readouterr().err.count("[the answer was ended]") == 2
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_interrupt_does_not_wait_for_a_token() -> None:
    with interrupts_counted() as is_asked:
        assert not is_asked()
        os.kill(os.getpid(), signal.SIGINT)
        assert is_asked()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    system = [{"role": "system", "content": "s"}]
    lines = "a\n/help\n/clear\n/unknown\n/image\n/image /nowhere/x.png\n//etc is text\n/usr/bin is text\n/exit\nnever\n"
    model, chat = converse(lines, monkeypatch, messages=system, first="zero")
    assert said(chat) == ["s", "/etc is text", "answer 2", "/usr/bin is text", "answer 4"]
    assert [len(heard) for heard in model.heard] == [2, 4, 2, 4]
    err = capsys.readouterr().err
    assert all(command in err for command in COMMANDS)
    assert "/unknown is no command: /help lists them" in err
    assert "/image names no file: /image FILE" in err
    assert "/nowhere/x.png is no file" in err


@pytest.mark.parametrize("line", ["/help", "/image x", "/clear ", "/nothing at all", "/?"])
def test_a_slash_and_a_word_is_a_command(line: str) -> None:
    assert COMMAND.match(line)


@pytest.mark.parametrize("line", ["/usr/bin", "/a.b", "//x", "/ x", "x /help", "/5"])
def test_other_slashes_are_text(line: str) -> None:
    assert not COMMAND.match(line)


def test_images_belong_to_the_next_turn_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = tmp_path / "my photo.png"
    image.touch()
    model, _ = converse(f'/image "{image}"\nlook\nand\n/image {image}\n/clear\nb\n', monkeypatch)
    assert model.heard[0][0]["content"] == [{"type": "image", "path": str(image)}, {"type": "text", "text": "look"}]
    assert model.heard[1][-1]["content"] == "and"
    assert model.heard[2][-1]["content"] == "b"


@pytest.mark.parametrize(
    "name", ["a.png", "my photo.png", "it's.png", 'say "x".png', "ünï ✓.png", "a\\b.png", "100%.png"]
)
def test_every_way_to_type_a_path_finds_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shlex

    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / name
    path.touch()
    escaped = "".join(f"\\{char}" if char in " '\"\\" else char for char in str(path))
    ways = [str(path), shlex.quote(str(path)), escaped, path.as_uri(), f"~/{name}"]
    if not set(name) & set('"\\'):
        ways.append(f'"{path}"')
    for typed in ways:
        assert list(paths(typed)) == [path], typed


def test_several_files_are_several_images(tmp_path: Path) -> None:
    found = [tmp_path / "a b.png", tmp_path / "c.png"]
    for path in found:
        path.touch()
    assert list(paths(f"'{found[0]}' {found[1].as_uri()}")) == found
    assert list(paths("/nowhere/two words.png")) == [Path("/nowhere/two words.png")]
    assert list(paths("'/nowhere/open.png")) == [Path("'/nowhere/open.png")]
    assert len(paths("~nobody-of-this-name/x.png")) == 1


def test_a_terminal_survives_an_interrupt_and_a_refused_turn(tiny_model: Path) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "arriero", "run", str(tiny_model), "--chat", "--max-new-tokens", "3000"]
    command += ["--ignore-eos", "--temperature", "0"]
    heed = partial(
        signal.signal, signal.SIGINT, signal.SIG_DFL
    )  # a shell's background jobs pass on that they ignore it
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, preexec_fn=heed
    )
    os.close(theirs)
    seen = ""

    def until(words: str) -> None:
        nonlocal seen
        deadline = time.monotonic() + 120
        while words not in seen:
            assert time.monotonic() < deadline, seen
            seen += os.read(ours, 4096).decode("utf-8", "replace")
        seen = seen.partition(words)[2]

    try:
        until("> ")
        for _ in range(2):  # ended between two tokens, and the conversation goes on
            os.write(ours, b"hello\n")
            until("\n")
            while not seen.strip():
                seen += os.read(ours, 4096).decode("utf-8", "replace")
            process.send_signal(signal.SIGINT)
            until("[the answer was ended]")
            until("> ")
        os.write(ours, b"/image /nowhere\n")
        until("is no file")
        until("> ")
        for _ in range(12):  # at the prompt it ends the whole; before it waits for a line, the next one does
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):  # time for the end: one that ends is killed by a further signal
                process.wait(timeout=10)
                break
        assert process.poll() == 130
    finally:
        process.kill()
        process.wait()
        os.close(ours)
