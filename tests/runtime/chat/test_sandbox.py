"""Chat templates within a budget: of time, of memory, of what they write; in a process that is kept."""

import dataclasses
import os
import subprocess
import threading
import time
from datetime import datetime
from pathlib import Path

import pytest

from arriero.errors import SessionError
from arriero.runtime.chat import sandbox
from arriero.runtime.chat.environment import BrokenTemplateError, CostlyTemplateError, FailedTemplateError
from arriero.runtime.chat.environment import render as render_here
from arriero.runtime.chat.sandbox import PROGRAM, one_budget, render, written_in
from arriero.runtime.kept_process import KeptProcess
from arriero.runtime.text import Text

NOON = datetime(2025, 5, 1, 12)
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
TINY = Path(__file__).parents[3] / "examples" / "tiny-llama4"


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A budget that a test can wait for."""
    monkeypatch.setattr(sandbox, "SECONDS", 0.5)
    monkeypatch.setattr(sandbox, "PROGRAM", dataclasses.replace(PROGRAM, seconds=0.5))


@pytest.mark.usefixtures("short")
def test_a_template_that_does_not_end_is_stopped_and_the_next_one_runs() -> None:
    started = time.monotonic()
    with pytest.raises(CostlyTemplateError, match="it takes longer than"):
        render(LOOP, {}, NOON)
    assert time.monotonic() - started < 20  # a busy machine starts processes slowly
    assert render("{{ x }}", {"x": 1}, NOON) == "1"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{{ 'a' * 10000000000 }}", "it takes more memory than it has"),
        ("{{ '%999999999d' | format(1) }}", "it takes (more memory than it has|longer)"),
        ("{% for a in range(99999) %}{{ 'a' * 1000 }}{% endfor %}", "it writes more than 10"),
        (
            "{% set n = namespace(x='a' * 9999) %}{% for a in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
            "it takes",
        ),
    ],
)
def test_a_template_that_takes_or_writes_too_much_is_stopped(source: str, said: str) -> None:
    with pytest.raises(CostlyTemplateError, match=said):
        render(source, {}, NOON)


def test_what_a_template_may_write_grows_with_what_is_said() -> None:
    said = "a" * 1_000_000
    assert len(render("{{ x }}{{ x }}", {"x": said}, NOON)) == 2 * len(said)


@pytest.mark.usefixtures("short")
def test_the_templates_of_a_conversation_share_one_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "WAIT", 1.0)
    wait = "{% for a in range(300) %}{% for b in range(1000) %}{% endfor %}{% endfor %}"

    def talk() -> None:
        for _ in range(1000):
            render(wait, {}, NOON)

    with one_budget(), pytest.raises(CostlyTemplateError):
        talk()


def test_the_process_is_kept() -> None:
    process = sandbox._kept()
    render("{{ 1 }}", {}, NOON)
    kept = process.process
    render("{{ 2 }}", {}, NOON)
    assert process.process is kept is not None


def test_a_process_that_was_killed_is_started_again() -> None:
    render("{{ 1 }}", {}, NOON)
    process = sandbox._kept().process
    assert process is not None
    process.kill()
    assert render("{{ 2 }}", {}, NOON) == "2"


def test_threads_share_the_process() -> None:
    found: dict[int, str] = {}

    def ask(number: int) -> None:
        found[number] = render("{{ x }}", {"x": number}, NOON)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: str(number) for number in range(20)}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs forks")
def test_a_fork_has_a_process_of_its_own() -> None:
    render("{{ 1 }}", {}, NOON)
    child = os.fork()
    if not child:
        os._exit(render("{{ 2 }}", {}, NOON) != "2")
    assert os.waitpid(child, 0)[1] == 0
    assert render("{{ 3 }}", {}, NOON) == "3"


def test_errors_are_those_of_the_environment() -> None:
    with pytest.raises(BrokenTemplateError, match="line 1"):
        render("{% if %}", {}, NOON)
    with pytest.raises(BrokenTemplateError, match="line 1"):
        written_in("{% if %}", [])
    with pytest.raises(FailedTemplateError, match="no"):
        render("{{ raise_exception('no') }}", {}, NOON)
    assert written_in("{{ '<e>' }}<x>", ["<e>", "<x>", "<y>"]) == ["<e>", "<x>"]


@pytest.mark.parametrize(
    "value", ["\ud800é\U0001f600\0", 10**40, 1.5, float("inf"), {1: [None, True]}, [[], {}], "a\r\nb"]
)
def test_values_come_through_as_they_are(value: object) -> None:
    source = "{{ x }}|{{ x is mapping }}|{{ x is string }}|{{ x is integer }}"
    assert render(source, {"x": value}, NOON) == render_here(source, {"x": value}, NOON)


def test_a_machine_that_is_busy_stops_no_template(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = "{%- for a in range(99999) %}{%- for b in range(9) %}{% endfor %}{% endfor %}done"
    monkeypatch.setattr(sandbox, "SECONDS", 0.0)  # the clock's seconds are not counted
    assert render(slow, {}, NOON) == "done"


@pytest.mark.usefixtures("short")
def test_where_no_process_can_be_started_templates_run_and_are_given_up_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **named: object) -> None:
        raise PermissionError("no processes here")

    process = KeptProcess(PROGRAM)
    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr(sandbox, "_kept", lambda: process)
    text = Text(TINY)
    assert "Hi" in text.render_chat([{"role": "user", "content": "Hi"}])
    with pytest.raises(SessionError, match="the chat_template given was stopped, it takes longer than 3 s: correct it"):
        text.render_chat([{"role": "user", "content": "Hi"}], chat_template=LOOP)


def test_a_folders_template_that_does_not_end_is_named(tmp_path: Path, short: None) -> None:
    (tmp_path / "tokenizer.json").write_bytes((TINY / "tokenizer.json").read_bytes())
    (tmp_path / "chat_template.jinja").write_text(LOOP)
    with pytest.raises(
        SessionError, match=r"chat_template\.jinja: the chat template was stopped, it takes longer than"
    ):
        Text(tmp_path).encode_chat([{"role": "user", "content": "Hi"}])
