"""Histories and their trend: lines appended, read back in series, drawn."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from arriero.cli.app import app
from arriero.errors import AccuracyError
from arriero.pages.history import append_run, in_series, line_of, read_history
from arriero.pages.trend import trend_page


def verdict(day: int, outcome: str = "pass", name: str = "scout-int8", **more: Any) -> dict[str, Any]:
    return {
        "date": f"2031-05-{day:02}T03:00:00Z",
        "version": "0.1.0",
        "candidate": f"/nightly/{day}/{name}",
        "reference": "scout.golden",
        "profile": "int8",
        "outcome": outcome,
        "contents": {"candidate": {"hash": f"{day:064}"}, "reference": {"hash": "f" * 64}},
        "metrics": {
            "kl": {"value": 0.01 + day / 1000, "low": 0.008, "high": 0.02},
            "top1": {"value": 0.95, "low": None, "high": None},
        },
        "limits": [{"metric": "kl", "side": "max", "limit": 0.03, "outcome": outcome, "origin": "default"}],
        **more,
    }


@pytest.fixture
def history(tmp_path: Path) -> Path:
    path = tmp_path / "nightly" / "history.jsonl"
    for day in range(1, 6):
        append_run(path, verdict(day, "regressed" if day == 5 else "pass"))
    append_run(path, verdict(5, name="scout-int4"))
    return path


def test_runs_are_series_by_names_wherever_the_folders_lie(history: Path) -> None:
    series = in_series(read_history(history))
    assert [(key[0], len(runs)) for key, runs in series.items()] == [("scout-int8", 5), ("scout-int4", 1)]
    run = series["scout-int8", "scout.golden", "int8"][0]
    assert run.hash == f"{1:064}"
    assert run.metrics["top1"]["low"] is None


def test_a_line_that_was_cut_off_spoils_no_other(history: Path) -> None:
    history.write_text(history.read_text().rstrip("\n"))
    append_run(history, verdict(7))
    assert len(read_history(history)) == 7


def spoilt(fields: dict[str, Any]) -> str:
    """A line in which some fields are others."""
    line = json.loads(line_of(verdict(8)))
    return json.dumps(line | ({"hashes": {"candidate": 5}} if "contents" in fields else fields))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 7 is no run"),
        ("[]", "its schema is no 1"),
        (json.dumps({"schema": 1}), r"\(date is missing\)"),
        (json.dumps({"schema": 9, "outcome": "pass"}), "its schema is no 1"),
        ({"date": "today"}, "its date is 'today', expected one as 2031"),
        ({"outcome": ["pass"]}, r"outcome is \['pass'\], expected a text"),
        ({"candidate": None}, "candidate is missing|candidate is None, expected a text"),
        ({"metrics": []}, r"metrics is \[\], expected an object"),
        ({"metrics": {"kl": {"value": "0.1"}}}, "metrics.kl.value is '0.1', expected a finite number"),
        ({"metrics": {"kl": {"value": 1e999}}}, "metrics.kl.value is inf, expected a finite number"),
        ({"limits": [5]}, r"limits\[0\] is 5, expected an object"),
        ({"limits": [{"metric": {}}]}, r"limits\[0\]\.metric is {}, expected a text"),
        ({"contents": 5}, "hashes.candidate"),
    ],
)
def test_a_line_that_is_no_run_is_named(history: Path, line: str | dict[str, Any], said: str) -> None:
    with history.open("a") as file:
        file.write((line if isinstance(line, str) else spoilt(line)) + "\n")
    with pytest.raises(AccuracyError, match=said):
        read_history(history)


def test_the_trend_says_first_what_the_last_run_found(history: Path) -> None:
    page = trend_page([history])
    assert '<h1 class="regressed">Regressed in the last run: scout-int8</h1>' in page
    assert page.count("<h1") == 1
    assert page.count("<svg") == 4  # two metrics of two series
    assert "http" not in page
    assert "5 runs: 4 passed, 1 regressed." in page


def test_runs_of_one_day_are_told_apart_and_no_axis_falls_below_zero(tmp_path: Path) -> None:
    none = {"flips": {"value": 0.0, "low": 0.0, "high": 0.0}}
    for hour in (3, 4):
        append_run(tmp_path / "h.jsonl", verdict(1, date=f"2031-05-01T0{hour}:30:00Z", metrics=none, limits=[]))
    drawn = trend_page([tmp_path / "h.jsonl"]).partition("<svg")[2].partition("</svg>")[0]
    ticks = re.findall(r">([^<>]+)</text>", drawn)
    assert {"05-01", "04:30"} <= set(ticks)
    assert not [tick for tick in ticks if tick.startswith(("-", "−"))]
    assert len(set(ticks)) == len(ticks)


def test_the_verb_makes_the_page_alone(history: Path, tmp_path: Path) -> None:
    def run(*more: str) -> tuple[int, str]:
        command = ["trend", str(history), "-o", str(tmp_path / "trend.html"), *more]
        result = CliRunner().invoke(app, command)
        return result.exit_code, result.stderr

    assert run()[0] == 0
    assert run()[0] == 2
    assert "--force to replace it" in run()[1]
    assert run("--force")[0] == 0
    (tmp_path / "trend.html").write_text("a thesis")
    assert "none of Arriero's" in run("--force")[1]
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    with pytest.raises(AccuracyError, match="holds no run"):
        trend_page([empty])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes that are files")
def test_nothing_is_appended_to_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "h.jsonl")
    with pytest.raises(AccuracyError, match="a pipe, expected a regular file: give another file with --history"):
        append_run(tmp_path / "h.jsonl", verdict(1))
