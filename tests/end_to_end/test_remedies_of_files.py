"""The remedies of refusals, each followed literally: damaged shards, data, golden files, and what a bench is given."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from remedies import Place, Remedy, checked, exported, follow
from safetensors.torch import load_file, save_file

from arriero.accuracy import record_golden
from arriero.accuracy.golden import read_golden
from arriero.export.checkpoint import open_checkpoint
from arriero.files.folders import read_spec
from arriero.measuring.bench import measure_folder
from arriero.walk.windows import read_windows

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def opens(folder: Path) -> bool:
    return bool(open_checkpoint(folder).tensors)


def with_header(data: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    """A safetensors file's bytes with another header, of the same length."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    assert len(text) <= length
    return data[:8] + text.ljust(length) + data[8 + length :]


def overlap(header: dict[str, Any]) -> None:
    first, second = sorted(name for name in header if name.endswith("layernorm.weight"))[:2]
    header[second]["data_offsets"] = header[first]["data_offsets"]


def misshape(header: dict[str, Any]) -> None:
    header["model.norm.weight"]["shape"] = [1]


HARMS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "cut short": (lambda data: data[:-8], "truncated, .*: download it again"),
    "cut short in its header": (lambda data: data[:100], "truncated or no safetensors file .*: download it again"),
    "empty": (lambda data: b"", "truncated or no safetensors file .*: download it again"),
    "too long": (lambda data: data + bytes(8), "too long, .*: download it again"),
    "a header of garbage": (lambda data: data[:8] + b"x" * 50 + data[58:], "damaged header .*: download it again"),
    "a header of a wrong length": (lambda data: b"\xff" * 8 + data[8:], ".*: download it again"),
    "overlapping tensors": (lambda data: with_header(data, overlap), "damaged header, .*: download it again"),
    "a wrong size": (lambda data: with_header(data, misshape), "damaged header, .*: download it again"),
    "a pointer of git's": (lambda data: POINTER, "is a git-lfs pointer, .*: run `git lfs pull` in its folder"),
    "a page of HTML": (lambda data: b"<!DOCTYPE html><html>Not found</html>", ".*: download it again"),
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_shard_is_downloaded_again(harm: str, place: Place) -> None:
    damage, says = HARMS[harm]
    folder = place.copy(place.small)
    intact = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(damage(intact))

    def download(place: Place) -> bool:
        (folder / SINGLE).write_bytes(intact)
        return opens(folder)

    follow(Remedy(name=harm, provoke=lambda place: opens(folder), says=says, follow=download), place)


def sharded(place: Place) -> Path:
    """A checkpoint in two shards with an index."""
    folder = place.copy(place.small)
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name].clone() for name in part}, folder / file)
    write_index(folder, {name: file for file, part in parts.items() for name in part})
    return folder


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def lose_shard(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()


def lose_tensor(folder: Path) -> None:
    path = folder / "model-00002-of-00002.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    path.unlink()
    tensors.pop("model.norm.weight", None) or tensors.pop(min(tensors))
    save_file(tensors, path)


def shorten_index(folder: Path) -> None:
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    write_index(folder, dict(sorted(weight_map.items())[1:]))


INDEXED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a missing shard": (lose_shard, "one of 1 of 2 shards that .* names: download the weights"),
    "a shard that lacks a tensor": (lose_tensor, "lacks .*, which the index puts there: download it again"),
    "an index that lacks a tensor": (shorten_index, "does not list .*: restore the index"),
    "an index that is no JSON": (lambda folder: (folder / INDEX).write_text("{"), "JSON.*: restore the file"),
    "an index that names no files": (lambda folder: write_index(folder, [1]), "weight_map .*: restore the file"),
    "an index that is a pointer": (lambda folder: (folder / INDEX).write_bytes(POINTER), "run `git lfs pull`"),
}


@pytest.mark.parametrize("harm", INDEXED)
def test_a_damaged_set_of_shards_is_restored(harm: str, place: Place) -> None:
    damage, says = INDEXED[harm]
    folder = sharded(place)
    assert opens(folder)
    intact = {path: path.read_bytes() for path in folder.iterdir()}
    damage(folder)

    def restore(place: Place) -> bool:
        for path, data in intact.items():
            path.write_bytes(data)
        return opens(folder)

    follow(Remedy(name=harm, provoke=lambda place: opens(folder), says=says, follow=restore), place)


TALK = {
    "messages": [{"role": "user", "content": "The list type " * 120}, {"role": "assistant", "content": "is mutable"}]
}


def lines(place: Place, *talks: Any) -> Path:
    return place.write(
        "talks.jsonl", "".join(each if isinstance(each, str) else json.dumps(each) + "\n" for each in talks)
    )


def read(place: Place, *talks: Any) -> bool:
    model = read_spec(place.model).model
    return read_windows(place.model, [lines(place, *talks)], model, 2, 64).ids_WS.size > 0


def latin(place: Place) -> Path:
    path = place.room / "latin.txt"
    path.write_bytes("café ".encode("latin-1") * 200)
    return path


def read_text(place: Place, path: Path) -> bool:
    return read_windows(place.model, [path], read_spec(place.model).model, 2, 64).ids_WS.size > 0


DATA = (
    Remedy(
        name="a line that is no JSON",
        provoke=lambda place: read(place, TALK, "{'messages': []}\n"),
        says=r"talks\.jsonl, line 2: not JSON .*: correct it",
        follow=lambda place: read(place, TALK, TALK),
    ),
    Remedy(
        name="a line that is no object",
        provoke=lambda place: read(place, [TALK]),
        says="line 1: no JSON object: give one with messages, .*text",
        follow=lambda place: read(place, TALK),
    ),
    Remedy(
        name="a line without messages",
        provoke=lambda place: read(place, {"question": "x"}),
        says="line 1 has .*: expected messages, conversations .*, prompt and completion, or text",
        follow=lambda place: read(place, TALK) and read(place, {"text": TALK["messages"][0]["content"]}),
    ),
    Remedy(
        name="a message without a role",
        provoke=lambda place: read(place, {"messages": [{"content": "x"}]}),
        says="line 1: .*role",
        follow=lambda place: read(place, TALK),
    ),
    Remedy(
        name="images for a model of text",
        provoke=lambda place: read(place, {**TALK, "images": ["cat.png"]}),
        says="has an image, the model takes text only: leave it out",
        follow=lambda place: read(place, TALK),
    ),
    Remedy(
        name="images that are no list",
        provoke=lambda place: read(place, {**TALK, "images": "cat.png"}),
        says="images is no list of paths: correct it",
        follow=lambda place: read(place, {**TALK, "images": []}),
    ),
    Remedy(
        name="too few tokens",
        provoke=lambda place: read(place, {"messages": TALK["messages"][1:]}),
        says="give more --data",
        follow=lambda place: read(place, TALK, {"messages": TALK["messages"][1:]}),
    ),
    Remedy(
        name="a text that is not UTF-8",
        provoke=lambda place: read_text(place, latin(place)),
        says="UTF-8",
        follow=lambda place: read_text(place, place.write("utf8.txt", latin(place).read_bytes().decode("latin-1"))),
    ),
    Remedy(
        name="a text file that is missing",
        provoke=lambda place: read_text(place, place.room / "missing.txt"),
        says="give text files with --data",
        follow=lambda place: read_text(place, place.text),
    ),
)


def recorded(place: Place, out: Path, **options: Any) -> Path:
    return record_golden(place.model, out, data=[place.text], samples=1, window=32, **options)


def cut_short(place: Place) -> Path:
    path = place.room / "golden.safetensors"
    if not path.exists():
        recorded(place, path)
        path.write_bytes(path.read_bytes()[:-100])
    return path


def measured(place: Place, **settings: Any) -> bool:
    few: dict[str, Any] = {"prefill": [4], "batch": [1], "decode_tokens": 1, "runs": 1}
    return bool(measure_folder(place.model, **{**few, **settings})["cases"])


OTHERS = (
    Remedy(
        name="a golden file that was cut short, recorded again",
        provoke=lambda place: read_golden(cut_short(place)),
        says="is no golden file .*: record one with `arriero golden`",
        follow=lambda place: read_golden(recorded(place, place.new())),
    ),
    Remedy(
        name="a golden file that was cut short, --force",
        provoke=lambda place: recorded(place, cut_short(place)),
        says="exists: choose another output, or --force to replace it",
        follow=lambda place: checked(place, place.model, recorded(place, cut_short(place), force=True), data=None),
    ),
    Remedy(
        name="a bench that is longer than the context",
        provoke=lambda place: measured(place, prefill=[5000]),
        says="give a shorter --prefill",
        follow=lambda place: measured(place),
    ),
    Remedy(
        name="a tied head that is stored counts, and one that is not is the embedding",
        provoke=lambda place: opens(headless(place)),
        says="set tie_word_embeddings to true in config.json",
        follow=lambda place: exported(place, headless(place, tie_word_embeddings=True)),
    ),
)


def headless(place: Place, **fields: Any) -> Path:
    """A checkpoint without a head, and perhaps other fields in its configuration."""
    folder = place.copy(place.small)
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / SINGLE).items() if name != "lm_head.weight"}
    (folder / SINGLE).unlink()
    save_file(tensors, folder / SINGLE)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    return folder


@pytest.mark.parametrize("remedy", [*DATA, *OTHERS], ids=lambda remedy: remedy.name)
def test_what_a_refusal_advises_helps(remedy: Remedy, place: Place) -> None:
    follow(remedy, place)


def test_a_text_may_hold_the_line_ends_of_other_systems(place: Place) -> None:
    said = "The list\u2028type\x85is\x0bmutable " * 60
    talk = json.dumps({"messages": [{"role": "user", "content": said}]}, ensure_ascii=False) + "\n"
    assert read(place, talk)
