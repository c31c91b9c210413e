"""Fuzzing that coverage guides, with atheris: the reader of `spec.json`, and that of safetensors headers.

    python -m venv build/atheris && build/atheris/bin/pip install atheris
    PYTHONPATH=.venv/source:tests/support build/atheris/bin/python tests/fuzz/guided.py spec CORPUS [OPTIONS]

`spec` or `safetensors` names the reader, which needs nothing but the standard library; CORPUS is a folder that keeps
what was found. Whatever is read is refused by an `ArrieroError` of one line, or keeps what it promises. Options such as
`-max_total_time=1200 -timeout=5 -rss_limit_mb=2048` are libFuzzer's.
"""

import json
import random
import sys
import tempfile
from pathlib import Path

import atheris
from mutations import mutate_json, mutated_header

with atheris.instrument_imports(include=["arriero"]):
    from arriero.errors import ArrieroError
    from arriero.files.folders import read_spec
    from arriero.files.safetensors import open_shard
    from arriero.spec.folder import SESSION_ENTRIES, FolderSpec

MODEL = {
    **{
        "vocab_size": 100,
        "hidden_size": 32,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 8,
        "experts": 4,
        "dtype": "bfloat16",
    },
    **{"layers": [{"rope": True, "chunk": 16, "experts": True}, {"rope": False, "chunk": 0, "experts": False}]},
    **{"experts_per_token": 1, "expert_size": 16, "dense_size": 64, "norm_eps": 1e-5, "qk_norm": True},
    **{"rope_theta": 5e5, "max_positions": 512, "temperature_scale": 0.1, "temperature_floor": 8.0},
    "rope_scaling": {
        **{"factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0, "original_max_positions": 32},
    },
}
WEIGHT = {"name": "w", "file": "a", "offset": 8, "shape": [2, 3], "dtype": "bfloat16", "convert": "float32"}
TOWER = {
    **{"hidden_size": 32, "layers": 3, "heads": 4, "mlp_size": 128, "image_size": 28, "patch_size": 7, "shuffle": 2},
    **{"adapter_size": 40, "rope_theta": 1e4, "image_token": 99},
}
SPEC = {
    **{"kind": "bundle", "version": "1", "model": MODEL, "target": "cpu", "schema": 2, "weights": [WEIGHT]},
    **{"weight_files": [{"name": "a", "path": "/a", "size": 90, "identity": "cd"}], "vision": {"spec": TOWER}},
    **{"session": {"session.disable_prepacking": "1"}, "recipe": {"format": "int8", "overrides": []}},
}
HEADER = {"__metadata__": {"a": "b"}, "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}
FOLDER = Path(tempfile.mkdtemp())


def file_of(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + bytes(24)


def check_line(said: str) -> None:
    assert "\n" not in said, said
    assert len(said) < 600, said


def read_one_spec(data: bytes) -> None:
    """A spec that is read survives its own text, and names no file elsewhere and no entry that is not known."""
    (FOLDER / "spec.json").write_bytes(data)
    try:
        spec = read_spec(FOLDER)
    except ArrieroError as error:
        check_line(str(error))
        return
    assert FolderSpec.from_json(spec.to_json()) == spec
    assert spec.session.keys() <= SESSION_ENTRIES.keys()
    names = [spec.graph, *(weight.file for weight in spec.weights), *(file.name for file in spec.weight_files)]
    assert not any(sign in name for name in names for sign in "/\\\0")


def read_one_header(data: bytes) -> None:
    """A header that is read has regions that cover its file's data, each of its shape's size."""
    path = FOLDER / "w.safetensors"
    path.write_bytes(data)
    try:
        shard = open_shard(path)
    except ArrieroError as error:
        check_line(str(error))
        return
    ends = 8 + int.from_bytes(data[:8], "little")
    for region in sorted(shard.tensors.values(), key=lambda region: (region.offset, region.size)):
        assert region.offset == ends
        ends += region.size
    assert ends == len(data)


def changed_spec(data: bytes, most: int, seed: int) -> bytes:
    """One in two changes is of the JSON's values, where it is some."""
    rng = random.Random(seed)
    try:
        return mutate_json(json.loads(data), rng)[:most] if rng.random() < 0.5 else atheris.Mutate(data, most)
    except (ValueError, RecursionError):
        return bytes(atheris.Mutate(data, most))


def changed_header(data: bytes, most: int, seed: int) -> bytes:
    rng = random.Random(seed)
    try:
        return mutated_header(data, rng)[:most] if rng.random() < 0.5 else atheris.Mutate(data, most)
    except (ValueError, RecursionError, OverflowError):
        return bytes(atheris.Mutate(data, most))


if __name__ == "__main__":
    reader = sys.argv.pop(1)
    one, change, seed = {
        "spec": (read_one_spec, changed_spec, json.dumps(SPEC).encode()),
        "safetensors": (read_one_header, changed_header, file_of(json.dumps(HEADER).encode())),
    }[reader]
    corpus = Path(sys.argv[1])
    corpus.mkdir(parents=True, exist_ok=True)
    (corpus / "seed").write_bytes(seed)
    atheris.Setup(sys.argv, one, custom_mutator=change)
    atheris.Fuzz()
