"""Readers of every format, and what each makes of damaged files: taken, refused in one line, or trouble.

Enters: a seed, a kind of file and good folders. Leaves: an outcome for each case. Run as a script it takes cases from
its arguments, in one process, and says before each which one it is, so that its parent sees where it ended.
"""

import base64
import dataclasses
import io
import json
import os
import random
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from mutations import mutated, mutated_header, put_no_file
from op_batches import peak_memory
from PIL import Image
from pyarrow import parquet

import arriero
from arriero.accuracy.golden import read_golden
from arriero.accuracy.limits import read_limits
from arriero.cli.batch import read_prompts
from arriero.engine.cpu_lowering import lower_for_cpu
from arriero.errors import ArrieroError
from arriero.export.checkpoint import open_checkpoint
from arriero.export.draft_head import open_head
from arriero.files.folders import carry_files, read_spec
from arriero.files.safetensors import open_shard
from arriero.files.unheeded import unheeded
from arriero.loading import cpu_decoder_graph, cpu_tower_graph
from arriero.measuring.summary import summarise
from arriero.runtime.defaults import read_defaults
from arriero.runtime.images.sources import read_image
from arriero.runtime.images.tiles import read_tile_settings
from arriero.runtime.text import Text
from arriero.serving.doors import read_keys
from arriero.walk.conversations import read_conversations
from arriero.walk.rows import read_rows, read_utf8, said_in

EXAMPLES = Path(__file__).parents[2] / "examples"
PROMPT = [5, 9, 40, 7, 300]
SAID = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    {"role": "assistant", "content": "Hello <|eot|>"},
    {"role": "user", "content": "And?"},
]
LONGEST_LINE = 900
"""Characters of a refusal at most, paths among them."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """A file that is damaged in a copy of a good folder, and what then reads it."""

    base: str
    file: str
    read: Callable[[Path], object]
    is_same: bool = False
    """Whether what is read must be what the good folder gives."""


def tokens_of(folder: Path) -> object:
    """What a bundle or model computes, as far as it is taken."""
    session = arriero.load(folder, max_seq=32, threads=1)
    state = session.start(1, 16)
    return np.round(session.prefill(state, [PROMPT])[0], 4).tobytes()


def graph_of(folder: Path) -> None:
    """Reads a bundle's graph, and runs it where it is taken."""
    spec = read_spec(folder)
    cpu_decoder_graph(folder, spec)
    tokens_of(folder)


def lowered_of(folder: Path) -> None:
    """Lowers a model's graph."""
    lower_for_cpu(folder, read_spec(folder))


def tower_of(folder: Path) -> None:
    """Reads a bundle's vision tower's graph."""
    spec = read_spec(folder)
    assert spec.vision is not None
    cpu_tower_graph(folder, spec, spec.vision)


def spec_of(folder: Path) -> object:
    """Reads a spec as `inspect` and a session do; a session computes what the good one does, or is refused."""
    summarise(folder)
    return tokens_of(folder)


def chat_of(folder: Path) -> None:
    """Writes a conversation, and reads what else a folder says of text."""
    text = Text(folder)
    ids = text.encode_chat(SAID)
    text.decode(ids)
    text.encode_prompt("Some words, été 漢字 <|eot|>")
    read_defaults(folder, 2048)
    list(unheeded(folder))


def jsonl_of(folder: Path) -> None:
    list(read_conversations(folder / "talk.jsonl", Text(folder), None))


def carried_of(folder: Path) -> None:
    """Carries a folder's small files on."""
    target = folder / "carried"
    target.mkdir()
    carry_files(folder, target)


KINDS = {
    "spec.json": Kind("bundle", "spec.json", spec_of, is_same=True),
    "spec.json of a model": Kind("model", "spec.json", lambda folder: summarise(folder)),
    "decoder.onnx": Kind("bundle", "decoder.onnx", graph_of),
    "decoder.onnx of a model": Kind("model", "decoder.onnx", lowered_of),
    "vision.onnx": Kind("seeing", "vision.onnx", tower_of),
    "config.json": Kind("checkpoint", "config.json", open_checkpoint),
    "index": Kind("checkpoint", "model.safetensors.index.json", open_checkpoint),
    "generation_config.json": Kind("text", "generation_config.json", chat_of),
    "tokenizer.json": Kind("text", "tokenizer.json", chat_of),
    "tokenizer_config.json": Kind("text", "tokenizer_config.json", chat_of),
    "special_tokens_map.json": Kind("text", "special_tokens_map.json", chat_of),
    "added_tokens.json": Kind("text", "added_tokens.json", chat_of),
    "template": Kind("text", "chat_template.jinja", chat_of),
    "processor_config.json": Kind("text", "processor_config.json", lambda folder: (chat_of(folder), tiles_of(folder))),
    "preprocessor_config.json": Kind("text", "preprocessor_config.json", lambda folder: read_tile_settings(folder)),
    "carried": Kind("text", "tokenizer_config.json", carried_of),
    "safetensors": Kind("files", "w.safetensors", lambda folder: open_shard(folder / "w.safetensors")),
    "golden": Kind("files", "golden.safetensors", lambda folder: read_golden(folder / "golden.safetensors")),
    "layers.json": Kind("engine", "layers.json", lambda folder: summarise(folder)),
    "spec.json of an engine": Kind("engine", "spec.json", lambda folder: summarise(folder)),
    "jsonl": Kind("text", "talk.jsonl", jsonl_of),
    "a draft's config.json": Kind("head", "config.json", lambda folder: head_of(folder)),
    "a draft's safetensors": Kind("head", "model.safetensors", lambda folder: head_of(folder)),
    "limits": Kind("files", "limits.toml", lambda folder: read_limits(folder / "limits.toml")),
    "prompts": Kind("files", "prompts.jsonl", lambda folder: read_prompts(folder / "prompts.jsonl")),
    "keys": Kind("files", "keys.txt", lambda folder: read_keys(folder / "keys.txt")),
    "rows": Kind("files", "rows.parquet", lambda folder: [said_in(row, at) for at, row in parquet_of(folder)]),
    "text": Kind("text", "plain.txt", lambda folder: Text(folder).encode(read_utf8(folder / "plain.txt"))),
    **{
        f"image.{form}": Kind("files", f"image.{form}", lambda folder, form=form: read_image(folder / f"image.{form}"))
        for form in ("png", "jpeg", "gif", "tiff", "webp", "bmp", "ppm")
    },
}


def head_of(folder: Path) -> None:
    """Opens a draft's head beside the spec of the model that it drafts for."""
    open_head(folder, read_spec(folder).model)


def parquet_of(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    return list(read_rows(folder / "rows.parquet"))


def tiles_of(folder: Path) -> object:
    return read_tile_settings(folder)


ENGINE_LAYER = {
    "name": "l",
    "kind": "gemm",
    "inputs": [{"name": "a", "dims": [1, -1], "dtype": "BF16"}],
    "outputs": [{"name": "b", "dims": [1], "dtype": "BF16"}],
    "nodes": ["layers.0/self_attn.q_proj/MatMul_1"],
    "tactic": "t",
}


def write_bases(out: Path, model: Path, bundle: Path, seeing: Path, checkpoint: Path, golden: Path | None) -> None:
    """Writes the good folders: links to the large files, and the small ones beside them."""
    for name, source in {"model": model, "bundle": bundle, "seeing": seeing, "checkpoint": checkpoint}.items():
        shutil.copytree(source, out / name, ignore=shutil.ignore_patterns("*.py", "*.safetensors"))
        for path in source.glob("*.safetensors"):
            os.link(path, out / name / path.name)
    text, files, engine, head = (out / name for name in ("text", "files", "engine", "head"))
    for folder in (text, files, engine):
        folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(seeing / name, text / name)
    (text / "special_tokens_map.json").write_text('{"bos_token": "<|begin_of_text|>", "eos_token": {"content": "x"}}')
    (text / "added_tokens.json").write_text('{"<|more|>": 3000, "<|another|>": 3001}')
    settings = {"image_processor": {"size": {"height": 64, "width": 64}, "max_patches": 4, "patch_size": 8}}
    (text / "processor_config.json").write_text(json.dumps(settings))
    (text / "preprocessor_config.json").write_text(json.dumps(settings["image_processor"]))
    lines = [{"messages": SAID}, {"messages": SAID[1:2], "tools": [{"type": "function"}], "images": []}]
    (text / "talk.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (text / "plain.txt").write_text("Some plain words, été 漢字.\n" * 20)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8))
    for form in ("png", "jpeg", "gif", "tiff", "webp", "bmp", "ppm"):
        data = io.BytesIO()
        picture.save(data, form)
        (files / f"image.{form}").write_bytes(data.getvalue())
    (files / "w.safetensors").write_bytes(base64.b64decode(SAFETENSORS))
    shutil.copy(golden, files / "golden.safetensors") if golden else shutil.copy(
        files / "w.safetensors", files / "golden.safetensors"
    )
    (files / "limits.toml").write_text("[every]\nflips = 0.05\n[int8]\nkl = 0.02\ntop1 = 0.95\n")
    (files / "prompts.jsonl").write_text('{"prompt": "Hi", "id": 4}\n' + json.dumps({"messages": SAID}))
    (files / "keys.txt").write_text("sk-one-of-them\nsk-another\n")
    parquet.write_table(pyarrow.table({"messages": [SAID[3:]] * 3, "text": ["a", "b", "c"]}), files / "rows.parquet")
    head.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(EXAMPLES / "tiny-llama4-draft" / name, head / name)
    shutil.copy(model / "spec.json", head / "spec.json")
    spec = json.loads((bundle / "spec.json").read_text())
    spec |= {"graph": "", "target": "tensorrt-rtx:sm89", "weights": [], "weight_files": [], "session": {}}
    spec["engine"] = ENGINE
    (engine / "spec.json").write_text(json.dumps(spec))
    (engine / "layers.json").write_text(json.dumps([ENGINE_LAYER] * 3))


PROFILE = {"name": "decode", "max_batch": 8, "usual_batch": 1, "max_length": 1, "usual_length": 1, "max_logits": 1}
ENGINE = {
    **{"file": "decoder.engine", "flavour": "tensorrt-rtx", "version": "1", "capabilities": [89], "sha256": "a" * 64},
    **{"max_seq": 64, "profiles": [PROFILE], "attention": "plugin", "experts": "plugin", "placement": "inside"},
    **{"caches": [{"name": "0.key", "shape": [2, 64, 32], "dtype": "bfloat16"}], "weight_streaming": False},
    **{"weights": 100, "kernels": []},
}
HEADER = (
    b'{"__metadata__":{"a":"b"},"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},'
    b'"b":{"dtype":"BF16","shape":[4],"data_offsets":[24,32]}}'
)
SAFETENSORS = base64.b64encode(len(HEADER).to_bytes(8, "little") + HEADER + bytes(32)).decode()


def damage(base: Path, folder: Path, kind: Kind, rng: random.Random) -> None:
    """Makes a copy of a good folder in which one file is damaged."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(base / kind.base, folder, copy_function=os.link)
    path = folder / kind.file
    data = path.read_bytes()
    path.unlink()
    if rng.random() < 0.05:
        put_no_file(path, rng)
    elif kind.file.endswith(".safetensors") and rng.random() < 0.7:
        path.write_bytes(mutated_header(data, rng))
    else:
        path.write_bytes(mutated(data, rng))


def outcome(kind: Kind, folder: Path, expected: object) -> str:
    """What became of a case: `taken`, `refused`, or trouble in words."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = kind.read(folder)
    except ArrieroError as error:
        line = str(error)
        if "\n" in line or len(line) > LONGEST_LINE:
            return f"trouble: a refusal of {len(line)} characters: {line[:300]!r}"
        return "refused"
    except BaseException as error:
        return f"trouble: {type(error).__name__}: {str(error)[:300]!r}"
    if kind.is_same and found != expected:
        return "trouble: taken, and computes something else"
    return "taken"


def main() -> None:
    """Runs the cases that the arguments name: folder of good folders, scratch folder, seed, first and last number."""
    base, scratch, seed, first, last = Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:6])
    names = sorted(KINDS)
    report = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    expected: dict[str, object] = {}
    for number in range(first, last):
        rng = random.Random(seed * 1_000_003 + number)
        name = names[number % len(names)]
        kind = KINDS[name]
        report.write(f"begin {number}\n")
        if kind.is_same and name not in expected:
            expected[name] = kind.read(base / kind.base)
        damage(base, scratch / "case", kind, rng)
        started = time.process_time()
        found = outcome(kind, scratch / "case", expected.get(name))
        seconds, peak = time.process_time() - started, peak_memory()
        if seconds > 5 and not found.startswith("trouble"):
            found = f"trouble: {seconds:.1f} s"
        if peak > 2 << 30:
            found = f"trouble: {peak / 1e9:.1f} GB of memory"
        report.write(f"end {number} {name}\t{found}\n")


if __name__ == "__main__":
    main()
