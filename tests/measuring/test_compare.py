"""Bundles side by side: verdicts and measurements joined by the bundle's hash."""

import copy
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from arriero.errors import FolderError
from arriero.measuring.compare import compare_page, read_compared

MACHINE = {"processor": "AMD EPYC", "processors": 2, "memory_bytes": 64e9, "system": "Linux x86_64"}


def verdict(name: str, number: int, outcome: str = "pass", kl: float = 0.01) -> dict[str, Any]:
    contents = {"path": f"/a/{name}", "hash": f"{number:064}", "bytes": number * 10**6, "weights": {}}
    return {
        "schema": 1,
        "outcome": outcome,
        "recipe": "INT8 weights",
        "tokens": 1000,
        "contents": {"candidate": contents, "reference": {"path": "r", "hash": "f" * 64}},
        "metrics": {"kl": {"value": kl, "low": None, "high": None}, "perplexity": {"value": 9, "low": 8, "high": 10}},
    }


def bench(name: str, number: int, speed: float = 50.0) -> dict[str, Any]:
    case = {"batch": 1, "prefill": 128, "decode_tokens_per_second": speed, "prefill_tokens_per_second": 10 * speed}
    return {
        "schema": 1,
        "contents": {"path": f"/moved/{name}", "hash": f"{number:064}", "bytes": number * 10**6, "weights": {}},
        "machine": MACHINE,
        "threads": 1,
        "recipe": "INT8 weights",
        "peak_rss_bytes": 10**9,
        "cases": [case, {**case, "batch": 4}],
    }


def written(folder: Path, **results: dict[str, Any]) -> list[Path]:
    paths = []
    for name, fields in results.items():
        (folder / name).mkdir(parents=True)
        path = folder / name / ("verdict.json" if "outcome" in fields else "bench.json")
        path.write_text(json.dumps(fields))
        paths.append(path.parent)
    return paths


def test_results_of_one_bundle_are_one_row_wherever_it_lay(tmp_path: Path) -> None:
    results = {"v8": verdict("int8", 8), "b8": bench("int8", 8), "v4": verdict("int4", 4, "regressed", 0.3)}
    paths = written(tmp_path, **results, b4=bench("int4", 4, 90.0), b3=bench("int3", 3))
    found = {each.name: each for each in read_compared(paths)}
    assert set(found) == {"int8", "int4", "int3"}
    assert found["int8"].bench["cases"][0]["batch"] == found["int8"].case["batch"] == 1
    page = compare_page(paths)
    assert "<h1>3 bundles compared, 3.0 MB to 8.0 MB</h1>" in page
    assert "The smallest that keeps its limits: int8; the fastest of those: int8." in page
    assert "Without a verdict of the same contents: int3." in page
    assert page.count("<svg") == 2
    assert page.count("<h1") == 1


def test_what_cannot_be_judged_is_not_said_to_break_its_limits(tmp_path: Path) -> None:
    regressed = written(tmp_path, a=verdict("int4", 4, "regressed"))
    assert "None of them keeps its limits." in compare_page(regressed)
    undecided = written(tmp_path, b=verdict("int8", 8, "undecided"))
    assert "None of them is seen to keep its limits." in compare_page([*regressed, *undecided])


def test_names_stand_where_the_picture_has_room_for_them(tmp_path: Path) -> None:
    long = "llama-4-scout-int8-of-september"
    results = {
        "a": verdict(long, 8, kl=0.0),
        "b": bench(long, 8, 190.0),
        "c": verdict("int4", 4),
        "d": bench("int4", 4),
    }
    page = compare_page(written(tmp_path, **results))
    assert re.findall(r"text-anchor: (\w+)[^>]*>llama-4-scout-…ember, as the reference<", page) == ["end", "end"]
    assert re.findall(r"text-anchor: (\w+)[^>]*>int4<", page) in ([], ["start", "start"])  # start goes without saying
    assert f'<td class="b ">{long}' in page.replace("<wbr>", "")


def test_what_is_not_comparable_is_said(tmp_path: Path) -> None:
    other = verdict("int4", 4)
    other["tokens"] = 7
    slow = bench("int4", 4)
    slow["threads"] = 8
    page = compare_page(written(tmp_path, a=verdict("int8", 8), b=other, c=bench("int8", 8), d=slow))
    assert "perplexity and KL are not comparable" in page
    assert "speeds are not comparable" in page


VALUES: list[Any] = [None, 5, -1.5, "text", [], {}, [5], {"a": 5}, True, "\ud800$\\frac", 10**30]


def fields_of(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of every field."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in inside:
        yield (*path, name)
        yield from fields_of(inner, (*path, name))


@pytest.mark.parametrize("make", [verdict, bench])
def test_every_field_of_another_type_or_missing_is_one_line_or_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[..., dict[str, Any]]
) -> None:
    monkeypatch.setattr("arriero.measuring.compare.picture_in_two", lambda *_, **named: "")  # is slow
    path, refused, pages = tmp_path / "verdict.json", 0, 0
    for place in fields_of(copy.deepcopy(make("int8", 8))):
        for value in [*VALUES, "missing"]:
            fields = copy.deepcopy(make("int8", 8))
            *way, last = place
            inner: Any = fields
            for name in way:
                inner = inner[name]
            if value == "missing":
                del inner[last]
            else:
                inner[last] = value
            path.write_text(json.dumps(fields))
            said = ""
            try:
                compare_page([path])
            except FolderError as error:
                said = str(error)
            assert "\n" not in said
            refused, pages = refused + bool(said), pages + (not said)
    assert min(refused, pages) > 50


def test_a_field_of_another_type_is_named(tmp_path: Path) -> None:
    wrong = verdict("int8", 8)
    wrong["metrics"]["kl"]["low"] = "0.1"
    (path,) = written(tmp_path, a=wrong)
    with pytest.raises(FolderError, match=r"\(metrics\.kl\.low is '0\.1', expected a finite number\)"):
        compare_page([path])


def test_what_is_no_result_is_refused(tmp_path: Path) -> None:
    (paths,) = written(tmp_path, a=verdict("int8", 8))
    unknown = verdict("int8", 9)
    unknown["contents"]["candidate"]["hash"] = None
    (nameless,) = written(tmp_path / "n", a=unknown)
    (tmp_path / "x.json").write_text("{}")
    for given, said in (
        ([tmp_path / "x.json"], "no result that this Arriero wrote"),
        ([tmp_path / "none"], "No such file"),
        ([tmp_path], "holds neither verdict.json nor bench.json"),
        ([paths, paths], "is a second verdict"),
        ([nameless], "has no hash of its bundle"),
    ):
        with pytest.raises(FolderError, match=said):
            read_compared(given)
