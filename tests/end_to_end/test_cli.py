"""The command as its user types it."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from json_keys import documented
from typer.testing import CliRunner

from arriero.cli.app import app

COMMAND = [str(Path(sys.executable).with_name("arriero"))]


def arriero(*arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, input=stdin, timeout=120)


def refused(run: subprocess.CompletedProcess[str], said: str) -> None:
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr.count("\n") == 1
    assert said in run.stderr
    assert "Traceback" not in run.stderr


def test_help_names_every_verb() -> None:
    run = arriero("--help")
    assert run.returncode == 0
    assert all(verb in run.stdout for verb in ("export", "calibrate", "build", "run"))


def test_export_build_and_run_agree(tiny: Path, tmp_path: Path) -> None:
    exported = arriero("export", tiny, "-o", tmp_path / "model", "--json")
    assert exported.returncode == 0, exported.stderr
    assert json.loads(exported.stdout)["folder"] == str(tmp_path / "model")
    assert set(json.loads(exported.stdout)) == documented("written")
    assert arriero("build", tmp_path / "model", "-o", tmp_path / "bundle").returncode == 0
    prompt = ("--prompt", "The for statement", "--max-new-tokens", 12, "--temperature", 0)
    texts = [arriero("run", tmp_path / name, *prompt).stdout for name in ("model", "bundle")]
    assert texts[0] == texts[1]
    assert len(texts[0]) > 12
    refused(arriero("export", tiny, "-o", tmp_path / "model"), "exists: choose another output, or --force")
    assert arriero("build", tmp_path / "model", "-o", tmp_path / "bundle", "--force").returncode == 0


def test_calibrate_lists_each_weight_and_its_model_runs(tiny_model: Path, tmp_path: Path) -> None:
    text = Path(__file__).parent.parent.parent / "examples" / "tiny-llama4" / "unseen.txt"
    arguments = ("--recipe", "int8", "--data", text, "--samples", 4, "--floor", 1, "--kv-cache", "int8", "--json")
    run = arriero("calibrate", tiny_model, "-o", tmp_path / "int8", *arguments)
    assert run.returncode == 0, run.stderr
    weights = json.loads(run.stdout)["weights"]
    assert set(json.loads(run.stdout)) == documented("calibrate")
    assert len(weights) == 8 * 7 + 4 * 8 * 2
    assert min(weight["output_sqnr"] for weight in weights) > 20
    assert len(arriero("run", tmp_path / "int8", "--prompt", "The for statement", "--max-new-tokens", 12).stdout) > 12


def test_calibrate_sums_up_what_it_did(tiny: Path, tiny_model: Path, tmp_path: Path) -> None:
    arguments = ("--recipe", "int8", "--data", tiny / "train.py", "--samples", 1, "--floor", 0)
    run = arriero("calibrate", tiny_model, "-o", tmp_path / "int8", *arguments)
    assert run.stdout == ""
    assert re.search(r"^ attention +32 +int8 +(\d+\.\d +){3}\d+\.\d *$", run.stderr, re.MULTILINE)
    assert f"Report: {tmp_path / 'int8' / 'report.html'}\n" in run.stderr
    assert re.search(r"^Weights: 10\.8 MB before, \d\.\d MB after \(\d\d%\)$", run.stderr, re.MULTILINE)
    assert re.search(r"^Experts: the least busy saw \d+ tokens, .* of an even share; the busiest", run.stderr, re.M)
    assert (tmp_path / "int8" / "report.html").exists()
    assert "layers.7.self_attn.q_proj" not in run.stderr
    again = ["calibrate", *map(str, (tiny_model, "-o", tmp_path / "int8", *arguments, "--force"))]
    assert "layers.7.self_attn.q_proj" in CliRunner().invoke(app, [*again, "--verbose"]).stderr
    silent = CliRunner().invoke(app, [*again, "--quiet"])
    assert (silent.exit_code, silent.stdout, silent.stderr) == (0, "", "")


def test_run_prints_json_for_programs(tiny_model: Path) -> None:
    run = arriero("run", tiny_model, "--prompt", "-", "--max-new-tokens", 7, "--json", stdin="The int type")
    result = json.loads(run.stdout)
    assert len(result["ids"]) <= 7
    assert result["finish"] in ("length", "eos")
    assert result["tokens_per_second"] > 0


def test_run_heeds_the_generation_config_and_names_what_it_does_not(tiny_model: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    prompt = ("--prompt", "The for statement", "--json", "--ignore-eos", "--top-logprobs", 2)
    (model / "generation_config.json").write_text('{"max_new_tokens": 3, "num_beams": 4, "eos_token_id": 5000}')
    run = arriero("run", model, *prompt)
    result = json.loads(run.stdout)
    assert len(result["ids"]) == 3
    assert [len(each["top"]) for each in result["logprobs"]] == [2, 2, 2]
    warned = [line for line in run.stderr.splitlines() if line.startswith("arriero: ")]
    assert warned == [
        "arriero: generation_config.json: eos_token_id 5000 is outside the vocabulary and changes nothing",
        "arriero: generation_config.json: not heeded, though it may change results: num_beams=4",
    ]
    assert len(json.loads(arriero("run", model, *prompt, "--max-new-tokens", 5).stdout)["ids"]) == 5
    assert arriero("run", model, *prompt, "--quiet").stderr == ""


def test_run_tells_how_many_guesses_were_right(tiny_model: Path) -> None:
    prompt = "The list type has a list. The list type has a list."
    settings = ("--max-new-tokens", 60, "--temperature", 0, "--ignore-eos", "--prompt-lookup", 5)
    run = arriero("run", tiny_model, "--prompt", prompt, *settings)
    told = re.search(r"(\d+) of (\d+) guesses right \((\d+)%\)", run.stderr)
    assert told is not None
    right, guesses, share = map(int, told.groups())
    assert share == round(100 * right / guesses)


def test_chat_takes_a_line_a_turn(tiny_model: Path) -> None:
    lines = "What is str.join, and what does it return where the list is empty?\n\nExplain dict.get.\n"
    run = arriero("run", tiny_model, "--chat", "--json", "--max-new-tokens", 20, stdin=lines)
    first, second = (json.loads(line) for line in run.stdout.splitlines())
    assert (first["reused_tokens"], first["acceptance_rate"]) == (0, None)
    assert second["reused_tokens"] > 0  # the first turn is not computed again


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("run", "{model}"), "there is nothing to say: give --prompt TEXT"),
        (("run", "{model}", "--prompt", "x", "--system", "y"), "add --chat"),
        (("run", "{model}", "--prompt", "x", "--top-p", "3"), "top_p is 3.0, expected a number from 0 to 1"),
        (("run", "{model}", "--prompt", "word " * 9000), "the session holds 4096: shorten it"),
        (("run", "{tiny}", "--prompt", "x"), "is a checkpoint: make a model of it with `arriero export` first"),
        (("run", "/nowhere", "--prompt", "x"), "/nowhere is no folder"),
        (("export", "/nowhere", "-o", "{out}"), "/nowhere is no folder"),
        (("export", "{tiny}", "-o", "{out}", "--dtype", "int8"), "dtype is 'int8', expected one of float32"),
        (
            ("export", "{tiny}", "-o", "{out}", "--tp", "4"),
            "tp is 4, which does not divide the 2 kv heads: choose one of",
        ),
        (
            ("export", "{tiny}", "-o", "{out}", "--tp", "2", "--ep", "3"),
            "ep is 3, which does not divide tp (2): choose",
        ),
        (
            ("calibrate", "{model}", "-o", "{out}", "--recipe", "int8", "--data", "/nowhere"),
            "/nowhere: No such file or directory: give text files with --data",
        ),
        (
            ("calibrate", "{model}", "-o", "{out}", "--recipe", "int4", "--data", "x", "--group-size", "48"),
            "group size 48 is none of 32, 64 and 128",
        ),
        (("build", "{model}", "-o", "{out}", "--target", "tpu"), "target 'tpu' is unknown: choose cpu"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    tiny: Path, tiny_model: Path, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    places = {"model": tiny_model, "tiny": tiny, "out": tmp_path / "out"}
    refused(arriero(*(argument.format(**places) for argument in arguments)), said)
    assert not (tmp_path / "out").exists()


def test_input_that_is_not_utf_8_is_named(tiny_model: Path) -> None:
    for arguments, stdin in (((b"--prompt", b"-"), b"\xff\xfe\xfd"), ((b"--prompt", b"caf\xe9"), b"")):
        command = [*COMMAND, "run", str(tiny_model), *arguments]
        run = subprocess.run(command, capture_output=True, input=stdin, timeout=120)
        assert run.returncode == 2
        assert b"UTF-8" in run.stderr
        assert run.stderr.count(b"\n") == 1


def test_a_damaged_checkpoint_is_one_line(checkpoint: Path, tmp_path: Path) -> None:
    path = sorted(checkpoint.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-1])
    refused(arriero("export", checkpoint, "-o", tmp_path / "out"), "truncated")
    path.unlink()
    refused(arriero("export", checkpoint, "-o", tmp_path / "out"), "No such file, one of")
    assert not (tmp_path / "out").exists()


def test_debug_shows_the_traceback() -> None:
    run = arriero("run", "/nowhere", "--prompt", "x", "--debug")
    assert run.returncode == 2
    assert "Traceback" in run.stderr


def test_a_bundle_runs_with_nothing_but_the_runtimes_libraries(tiny_model: Path, tmp_path: Path) -> None:
    assert arriero("build", tiny_model, "-o", tmp_path / "bundle").returncode == 0
    code = (
        "import sys\n"
        "for name in ('torch', 'onnx', 'onnx_ir', 'onnxscript', 'transformers'): sys.modules[name] = None\n"
        "import arriero\n"
        f"print(len(arriero.load({str(tmp_path / 'bundle')!r}).generate('The', max_new_tokens=5, eos_token_id=[]).ids))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "5", run.stderr
