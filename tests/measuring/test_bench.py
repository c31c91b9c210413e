import json
from pathlib import Path
from typing import Any

import pytest
from json_keys import documented
from typer.testing import CliRunner

from arriero.cli.app import app
from arriero.cli.tables_of_speed import show_measured
from arriero.engine import build_bundle
from arriero.errors import FolderError, SessionError
from arriero.measuring import timing
from arriero.measuring.bench import RESULT, measure_folder, parse_sizes, write_measured


@pytest.fixture(scope="module")
def bundle(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_bundle(tiny_model, tmp_path_factory.mktemp("bench") / "bundle")


@pytest.fixture(scope="module")
def found(bundle: Path) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing.Stream.__init__, "__defaults__", (1 << 24,))
        return measure_folder(bundle, prefill=[8, 16], batch=[1, 2], decode_tokens=2, runs=2, threads=1)


def test_figures_of_a_case_belong_together(found: dict[str, Any]) -> None:
    assert [(case["prefill"], case["batch"]) for case in found["cases"]] == [(8, 1), (8, 2), (16, 1), (16, 2)]
    for case in found["cases"]:
        rows = case["batch"]
        assert case["prefill_tokens_per_second"] * case["ttft_seconds"] == pytest.approx(rows * case["prefill"])
        assert case["decode_tokens_per_second"] * case["itl_seconds"] == pytest.approx(rows)
        parts = case["step_bytes"]
        assert parts["total"] == parts["shared"] + parts["experts"] + parts["kv_cache"]
        assert case["decode_bytes_per_second"] == pytest.approx(parts["total"] / case["itl_seconds"])
        assert case["share_of_stream"] > 0
        assert len(case["readings"]) == 2
        assert all(reading["stream_bytes_per_second"] > 0 for reading in case["readings"])
    assert found["peak_rss_bytes"] > 20e6
    assert found["stream"] == {"bytes_per_second": found["stream"]["bytes_per_second"], "buffer_bytes": 1 << 24}


def test_a_bundle_and_its_model_must_read_the_same_bytes(found: dict[str, Any], tiny_model: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing.Stream.__init__, "__defaults__", (1 << 24,))
        model = measure_folder(tiny_model, prefill=[8], batch=[2], decode_tokens=2, runs=1)
    assert model["cases"][0]["step_bytes"] == found["cases"][1]["step_bytes"]
    # the filled slots of the two steps, 9 and 10, in eight layers of two kv heads of 32
    assert model["cases"][0]["step_bytes"]["kv_cache"] == 2 * 9.5 * 8 * 2 * 2 * 32 * 4


def test_results_are_written_whole_and_not_over_others(found: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "measured"
    write_measured(found, out)
    assert json.loads((out / RESULT).read_text()) == found
    assert set(found) == documented("bench")
    assert (out / "bench.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(FolderError, match="--force to replace it"):
        write_measured(found, out)
    write_measured(found, out, force=True)


def test_the_table_shows_a_line_a_case(found: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    show_measured(found, None)
    shown = capsys.readouterr().out
    assert "TTFT" in shown
    assert "2 runs" in " ".join(shown.split())
    assert sum(line.strip().startswith(("8 ", "16 ")) for line in shown.splitlines()) == 4
    show_measured({**found, "stream": None}, None)  # an engine's
    assert "GB/s" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prefill": [4096], "decode_tokens": 1}, "a prompt of 4096 tokens and 1 decoded ones are more than"),
        ({"prefill": [0]}, r"prefill is \[0\]"),
        ({"batch": []}, r"batch \[\]"),
        ({"prefill": [100], "batch": [10**20]}, r"a batch of 1\d{20} rows of .* tokens takes .* of memory"),
        ({"prefill": [100], "batch": [10**7]}, "a batch of 10000000 rows of .* tokens takes .* of memory"),
        ({"decode_tokens": 0}, "decode_tokens is 0, expected 1 to 4095"),
        ({"runs": 0}, "runs is 0"),
        ({"threads": 0}, "threads is 0"),
    ],
)
def test_settings_out_of_range_are_named(bundle: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(SessionError, match=message):
        measure_folder(bundle, **given)


def test_lists_of_sizes_are_read() -> None:
    assert parse_sizes("128, 512", "--prefill") == [128, 512]
    assert parse_sizes(None, "--prefill") is None
    with pytest.raises(SessionError, match="--batch is '1,x', expected whole numbers from 1 up"):
        parse_sizes("1,x", "--batch")


def test_the_verb_ends_with_one_line_where_an_option_is_wrong(bundle: Path, tmp_path: Path) -> None:
    wrong = CliRunner().invoke(app, ["bench", str(bundle), "--batch", "0"])
    assert wrong.exit_code == 2
    assert len(wrong.stderr.strip().splitlines()) == 1
    taken = CliRunner().invoke(app, ["bench", str(bundle), "-o", str(tmp_path)])
    assert "choose another output" in taken.stderr
