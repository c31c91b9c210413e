"""The doctor on a good bundle, on spoiled ones, and on machines that a bundle is not for."""

import dataclasses
import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_gpu import FakeDriver
from json_keys import documented
from typer.testing import CliRunner

from arriero.cli.app import app
from arriero.engine import build_bundle
from arriero.errors import SessionError
from arriero.files.folders import SPEC, rank_fingerprint, read_spec
from arriero.files.machine_memory import Room
from arriero.files.manifest import MANIFEST
from arriero.files.packing import pack_bundle, unpack_bundle
from arriero.measuring import greedy
from arriero.measuring.doctor import gpu_checks, processor_checks, room_checks
from arriero.measuring.doctor.examination import Plan, examine
from arriero.measuring.doctor.finding import Finding
from arriero.plugins.cpu import library
from arriero.plugins.launch import Driver
from arriero.runtime.ranks import nccl
from arriero.spec.built_engine import CacheInput, EngineSpec, Profile

FREE = Plan(port=0, threads=1)


@pytest.fixture(scope="module")
def good(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that needs the kernels, for its rounded caches."""

    def record(folder: Path) -> None:
        greedy.record_greedy(folder, tiny_model)

    out = tmp_path_factory.mktemp("doctor") / "bundle"
    return build_bundle(tiny_model, out, kv_cache="int8", copy_weights=True, finish=record)


@pytest.fixture
def bundle(good: Path, tmp_path: Path) -> Path:
    """A copy, free to be spoiled."""
    return Path(shutil.copytree(good, tmp_path / "bundle"))


def no_driver() -> Driver:
    raise SessionError("no NVIDIA driver here (libcuda.so.1 is missing): run this bundle on a GPU")


def look(bundle: Path | None, plan: Plan = FREE, driver: Callable[[], Driver] = no_driver) -> dict[str, Finding]:
    return {each.check: each for each in examine(bundle, plan, open_driver=driver)}


def wrong(bundle: Path | None, plan: Plan = FREE, driver: Callable[[], Driver] = no_driver) -> dict[str, str]:
    return {name: each.text for name, each in look(bundle, plan, driver).items() if each.state == "found"}


def test_all_is_well_with_a_good_bundle(good: Path) -> None:
    findings = look(good)
    assert {each.state for each in findings.values()} == {"ok"}
    assert set(findings) == {
        *("bundle", "files", "tokenizer", "weights", "graph", "processor", "ONNX Runtime", "kernels", "threads"),
        *("memory", "disk", "port", "token"),
    }


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0x40
    path.write_bytes(content)


def edit(path: Path, change: Callable[[dict], object]) -> None:  # type: ignore[type-arg]
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


SPOILS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "a byte of the weights": (
        lambda folder: flip(folder / "model-00001-of-00003.safetensors", -1000),
        "files",
        r"model-00001-of-00003\.safetensors has another content: copy or unpack",
    ),
    "weights that end early": (
        lambda folder: (folder / "model-00001-of-00003.safetensors").write_bytes(
            (folder / "model-00001-of-00003.safetensors").read_bytes()[:-4096]
        ),
        "weights",
        "size or content differs",
    ),
    "no weights": (
        lambda folder: (folder / "model-00001-of-00003.safetensors").unlink(),
        "weights",
        "is not at .*--weights",
    ),
    "a byte of the graph": (lambda folder: flip(folder / "decoder.onnx", 3000), "files", "decoder.onnx has another"),
    "no graph": (lambda folder: (folder / "decoder.onnx").unlink(), "graph", "decoder.onnx"),
    "half a spec": (
        lambda folder: (folder / SPEC).write_text((folder / SPEC).read_text()[:1000]),
        "bundle",
        r"spec\.json is damaged",
    ),
    "a newer spec": (lambda folder: edit(folder / SPEC, lambda spec: spec.update(schema=9)), "bundle", "has schema 9"),
    "half a tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text()[:5000]),
        "tokenizer",
        "tokenizer.json",
    ),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer", "export with --tokenizer"),
    "a file more": (lambda folder: (folder / "x.py").write_text("1"), "files", r"x\.py is not in the manifest"),
    "half a manifest": (lambda folder: (folder / MANIFEST).write_text('{"schema": 1'), "files", "damaged"),
    "a manifest that leads elsewhere": (
        lambda folder: edit(folder / MANIFEST, lambda found: found["files"].update({"../x": {}})),
        "files",
        "plain file name",
    ),
    "another token": (
        lambda folder: edit(folder / greedy.FILE, lambda found: found.update(token=3, second=4, margin=2.0)),
        "files",
        "greedy.json has another",
    ),
    "half a record": (
        lambda folder: (folder / greedy.FILE).write_text('{"token": 3}'),
        "token",
        "greedy.json: damaged",
    ),
    "a template that is no program": (
        lambda folder: (folder / "chat_template.jinja").write_text("{% for message in %}"),
        "tokenizer",
        r"chat_template\.jinja: the chat template does not compile",
    ),
    "a template that refuses a question": (
        lambda folder: (folder / "chat_template.jinja").write_text("{{ raise_exception('tools only') }}"),
        "tokenizer",
        "for one question: .*tools only.*: correct it",
    ),
    "another model's tokenizer": (
        lambda folder: edit(folder / "tokenizer.json", lambda found: found["model"]["vocab"].update(zzzz=300_000)),
        "tokenizer",
        "a token of id 300000, the model a vocabulary of 2048: export with",
    ),
    "another model's record": (
        lambda folder: edit(folder / greedy.FILE, lambda found: found.update(prompt=[7, 300_000])),
        "token",
        "token id 300000 in a vocabulary of 2048",
    ),
    "a target that is none": (
        lambda folder: edit(folder / SPEC, lambda spec: spec.update(target="tensorrt:sm89")),
        "bundle",
        "a bundle's target is 'tensorrt:sm89', expected cpu",
    ),
    "a context that is another's": (
        lambda folder: edit(folder / SPEC, lambda spec: spec["model"].update(vocab_size=4096)),
        "graph",
        "not the graph that spec.json describes",
    ),
}


@pytest.mark.parametrize("name", SPOILS)
def test_a_spoiled_bundle_is_found_out(bundle: Path, name: str) -> None:
    import re

    spoil, check, said = SPOILS[name]
    spoil(bundle)
    found = wrong(bundle)
    assert re.search(said, found[check]), found
    assert all(": " in text and len(text) < 700 for text in found.values())


def test_a_token_that_differs_is_named(bundle: Path) -> None:
    (bundle / MANIFEST).unlink()
    before = greedy.read_greedy(bundle)
    assert before is not None
    edit(bundle / greedy.FILE, lambda found: found.update(token=3, margin=2.0))
    assert f"is {before.token} here" in wrong(bundle)["token"]
    edit(bundle / greedy.FILE, lambda found: found.update(second=before.token, margin=0.01))
    assert not wrong(bundle)  # within rounding
    (bundle / greedy.FILE).unlink()
    assert look(bundle)["token"].text == "not recorded at build"


def test_a_container_that_is_too_small_is_said_with_what_fits(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room_checks, "find_room", lambda: Room(90 << 20, 100 << 20, "this container"))
    said = wrong(good, Plan(port=0, threads=1, slots=40))["memory"]
    assert "40 sequences of 4096 tokens take" in said
    slots = int(said.rsplit("--slots ", 1)[1].split()[0])
    assert 1 <= slots < 40
    assert look(good, Plan(port=0, threads=1, slots=slots))["memory"].state == "ok"
    monkeypatch.setattr(room_checks, "find_room", lambda: Room(1 << 20, 100 << 20, "this container"))
    assert "more memory" in wrong(good)["memory"]


def test_a_taken_port_is_found(good: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        said = wrong(None, dataclasses.replace(FREE, port=taken.getsockname()[1]))
    assert set(said) == {"port"}
    assert "--port 0" in said["port"]


def test_a_machine_that_lacks_something_is_said_so(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "cpuinfo"
    old.write_text("flags\t\t: fpu sse2\nFeatures\t: fp asimd\n")
    monkeypatch.setattr(processor_checks, "FEATURES", old)
    monkeypatch.setattr(processor_checks, "_most_tasks", lambda: 5)
    monkeypatch.setattr(processor_checks, "library", library.library)
    monkeypatch.setattr(library, "EXTENSION_SUFFIXES", [".none"])
    said = wrong(good)
    assert set(said) == {"processor", "threads", "kernels"}
    assert "were not compiled" in said["kernels"]
    assert "--pids-limit" in said["threads"]


def test_what_is_no_bundle_is_said_so(tiny_model: Path, tmp_path: Path) -> None:
    assert "built for no machine yet" in wrong(tiny_model)["bundle"]
    assert "is no folder" in wrong(tmp_path / "nowhere")["bundle"]


def engine_bundle(good: Path, folder: Path, **about: object) -> Path:
    """A bundle whose spec says that it is an engine's."""
    spec = read_spec(good)
    shutil.copytree(good, folder)
    (folder / MANIFEST).unlink()
    (folder / "decoder.engine").write_bytes(b"engine")
    profile = Profile(name="decode", max_batch=8, usual_batch=1, max_length=1, usual_length=1, max_logits=1)
    engine = EngineSpec(
        **{  # type: ignore[arg-type]
            "file": "decoder.engine",
            "flavour": "tensorrt",
            "version": "11.4.1",
            "cuda": 13,
            "capabilities": (87,),
            "sha256": "fc7be9acdaa7ae7dc1e9bbe5b3ea51c0b1e4f4ab1f2ec0aab3ef7a4ae0cdbb64",
            "max_seq": 512,
            "profiles": (profile,),
            "caches": (CacheInput(name="0.key", shape=(2, 512, 16), dtype="bfloat16"),),
            "attention": "native",
            "experts": "plugin",
            "placement": "inside",
            "weight_streaming": False,
            "weights": 1 << 20,
            **about,
        }
    )
    record = dataclasses.replace(spec, target="tensorrt:sm87", graph="", weights=(), weight_files=(), engine=engine)
    (folder / SPEC).write_text(record.to_json())
    return folder


def test_an_engine_on_a_machine_without_a_gpu_is_found(good: Path, tmp_path: Path) -> None:
    found = look(engine_bundle(good, tmp_path / "engine"))
    assert found["driver"].state == found["TensorRT"].state == found["engine"].state == found["trust"].state == "found"
    assert found["GPU"].state == found["token"].state == "not checked"
    assert "--trust" in found["trust"].text


def test_an_engine_of_another_gpu_driver_or_size_is_found(good: Path, tmp_path: Path) -> None:
    folder = engine_bundle(good, tmp_path / "engine")
    assert "built for sm87, this GPU is sm90" in wrong(folder, driver=lambda: FakeDriver(90))["GPU"]
    assert "install a newer driver" in wrong(folder, driver=lambda: FakeDriver(87, version=(12, 4)))["GPU"]
    assert "--max-batch" in wrong(folder, driver=lambda: FakeDriver(87, size=1000))["GPU memory"]
    found = look(folder, driver=lambda: FakeDriver(87))
    assert {found[name].state for name in ("driver", "GPU", "types", "GPU memory")} == {"ok"}


def test_a_group_of_engines_is_looked_at_rank_by_rank_and_for_nccl(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group, hashes = tmp_path / "group", []
    group.mkdir()
    for rank in (0, 1):
        folder = engine_bundle(good, group / f"rank-{rank}")
        own = dataclasses.replace(read_spec(folder), rank=rank, ranks=2)
        (folder / SPEC).write_text(own.to_json())
        hashes.append(rank_fingerprint(folder))
    spec = dataclasses.replace(own, kind="group", rank=0, engine=None, rank_hashes=tuple(hashes))
    (group / SPEC).write_text(spec.to_json())
    monkeypatch.setattr(nccl, "_places", lambda: iter(["libnowhere.so"]))
    found = look(group, driver=lambda: FakeDriver(87))
    assert found["rank 0 GPU"].state == "ok"
    assert found["NCCL"].state == "found"
    assert "pip install nvidia-nccl-cu13" in found["NCCL"].text


def test_fp8_on_a_jetson_orin_is_refused(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    caches = (CacheInput(name="0.key", shape=(2, 512, 16), dtype="fp8"),)
    folder = engine_bundle(good, tmp_path / "engine", caches=caches)
    model, release = tmp_path / "model", tmp_path / "release"
    model.write_text("NVIDIA Jetson AGX Orin Developer Kit\0")
    release.write_text("# R36 (release), REVISION: 4.3, GCID: 1, BOARD: generic")
    monkeypatch.setattr(gpu_checks, "JETSON_MODEL", model)
    monkeypatch.setattr(gpu_checks, "JETSON_RELEASE", release)
    said = wrong(folder, driver=lambda: FakeDriver(87))
    assert "Jetson Orin (sm87) does not have" in said["types"]
    assert "JetPack 7.2.2" in said["Jetson"]
    release.write_text("# R38 (release), REVISION: 2.0")
    assert look(folder, driver=lambda: FakeDriver(87))["Jetson"].state == "ok"


def test_the_verb_says_each_thing_in_a_line_and_ends_with_two(good: Path, bundle: Path) -> None:
    runner = CliRunner()
    result = runner.invoke(app, ["doctor", str(good), "--port", "0", "--threads", "1"])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert len(lines) == 13
    assert all(line.startswith("ok ") for line in lines)
    (bundle / "decoder.onnx").unlink()
    result = runner.invoke(app, ["doctor", str(bundle), "--port", "0", "--json"])
    assert result.exit_code == 2
    found = json.loads(result.stdout)
    assert set(found) == documented("doctor")
    assert found["ok"] is False
    assert {each["state"] for each in found["checks"]} == {"ok", "found", "not checked"}


def test_a_packed_bundle_is_examined_like_the_one_that_was_packed(good: Path, tmp_path: Path) -> None:
    file = pack_bundle(good, tmp_path / "tiny.arriero")
    folder = unpack_bundle(file, tmp_path / "moved")
    assert not wrong(folder)
    assert "is a packed bundle: unpack it" in wrong(file)["bundle"]
