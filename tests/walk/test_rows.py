"""Rows of data in the forms that people have, all read as a session reads them."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pictures import drawn

from arriero.errors import DataError
from arriero.runtime.images.placeholders import ImagePrompts
from arriero.runtime.text import Text
from arriero.walk.conversations import Conversation, read_conversations
from arriero.walk.rows import read_rows

USER, ASSISTANT = {"role": "user", "content": "What is this?"}, {"role": "assistant", "content": "A lake."}
EQUAL = {
    "messages": {"messages": [USER, ASSISTANT]},
    "ShareGPT": {"conversations": [{"from": "human", "value": "What is this?"}, {"from": "gpt", "value": "A lake."}]},
    "ShareGPT's turns as OpenAI's": {"conversations": [USER, ASSISTANT]},
    "two lists": {"prompt": [USER], "completion": [ASSISTANT]},
}


def read(folder: Path, rows: list[object], tmp_path: Path, prompts: ImagePrompts | None = None) -> list[Conversation]:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), "utf-8")
    return list(read_conversations(path, Text(folder), prompts))


def test_a_conversation_is_the_same_in_every_form(tiny: Path, tmp_path: Path) -> None:
    found = [talk.ids_S.tolist() for talk in read(tiny, list(EQUAL.values()), tmp_path)]
    assert all(ids == found[0] for ids in found)


@pytest.mark.parametrize("name", ["rows.ndjson", "rows.json", "list.json"])
def test_rows_are_json_lines_or_a_list(tiny: Path, tmp_path: Path, name: str) -> None:
    rows = list(EQUAL.values())
    lines = "\n".join(map(json.dumps, rows))
    (tmp_path / name).write_text(json.dumps(rows, indent=2) if name == "list.json" else lines)
    read_as = [talk.ids_S.tolist() for talk in read_conversations(tmp_path / name, Text(tiny), None)]
    assert read_as == [talk.ids_S.tolist() for talk in read(tiny, list(rows), tmp_path)]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("rows.csv", "text\nx", "is a table of values apart by commas: save it as Parquet"),
        ("rows.jsonl.gz", "x", "is compressed: unpack it first"),
        ("one.json", '{\n"text": "x"}', "line 1: not JSON .*: give an object a line, or one list of objects"),
        ("list.json", "[5]", "row 1: no JSON object"),
        ("list.json", "[{]", "list.json: not JSON"),
    ],
)
def test_files_in_other_forms_are_not_taken_for_prose(
    tiny: Path, tmp_path: Path, name: str, content: str, said: str
) -> None:
    from arriero.export.checkpoint import open_checkpoint
    from arriero.walk.windows import read_windows

    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=said):
        read_windows(tiny, [tmp_path / name], open_checkpoint(tiny).spec, 4)


def test_texts_begin_as_the_tokenizer_begins_one(tiny: Path, tmp_path: Path) -> None:
    rows: list[object] = [{"text": "A line\u2028of text."}, {"prompt": "A line\u2028of", "completion": " text."}]
    first, second = read(tiny, rows, tmp_path)
    assert first.ids_S.tolist() == second.ids_S.tolist() == Text(tiny).encode("A line\u2028of text.")


def test_images_come_by_path_and_by_data_url(multimodal_checkpoint: Path, tmp_path: Path) -> None:
    drawn(20, 20).save(tmp_path / "small.png")
    prompts = ImagePrompts(Text(multimodal_checkpoint))
    ask = {"type": "text", "text": "What is this?"}
    rows: list[object] = [
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "small.png"}}, ask]}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "small.png"}, ask]}]},
        {"conversations": [{"from": "human", "value": "<image>\nWhat is this?"}], "image": "small.png"},
    ]
    found = read(multimodal_checkpoint, rows, tmp_path, prompts)
    assert len({tuple(talk.ids_S.tolist()) for talk in found}) == 1
    assert all(talk.images == (tmp_path / "small.png",) for talk in found)


def test_parquet_is_read_as_jsonl(multimodal_checkpoint: Path, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    drawn(20, 20).save(tmp_path / "small.png")
    prompts, text = ImagePrompts(Text(multimodal_checkpoint)), Text(multimodal_checkpoint)
    rows = [{**EQUAL["messages"], "images": []}, {"messages": [USER], "images": ["small.png"]}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    expected = read(multimodal_checkpoint, list(rows), tmp_path, prompts)
    found = list(read_conversations(tmp_path / "rows.parquet", text, prompts))
    assert [talk.ids_S.tolist() for talk in found] == [talk.ids_S.tolist() for talk in expected]
    embedded = [{"messages": [USER], "images": [{"bytes": (tmp_path / "small.png").read_bytes(), "path": None}]}]
    parquet.write_table(pyarrow.Table.from_pylist(embedded), tmp_path / "embedded.parquet")
    (inside,) = list(read_conversations(tmp_path / "embedded.parquet", text, prompts))
    assert np.array_equal(inside.ids_S, expected[1].ids_S)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"instruction": "x", "output": "y"}, "line 1 has instruction, output: expected messages, conversations"),
        ({"text": 5}, "line 1: text is 5, expected a text"),
        ({"prompt": "x", "completion": [ASSISTANT]}, "expected two texts or two lists of messages"),
        ({"conversations": [{"from": "narrator", "value": "x"}]}, "turn 1 is .*, expected a value, and from as one of"),
        ({"conversations": []}, "conversations is no list"),
        (["x"], "line 1: no JSON object: give one with messages"),
    ],
)
def test_other_rows_are_refused(tiny: Path, tmp_path: Path, row: object, said: str) -> None:
    with pytest.raises(DataError, match=said):
        read(tiny, [row], tmp_path)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "prose.txt"])
def test_a_git_lfs_pointer_says_git_lfs_pull(tiny: Path, tmp_path: Path, name: str) -> None:
    from arriero.export.checkpoint import open_checkpoint
    from arriero.walk.windows import read_windows

    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(DataError, match="git lfs pull"):
        read_windows(tiny, [tmp_path / name], open_checkpoint(tiny).spec, 4)


def test_damaged_parquet_and_folders_are_refused(tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(DataError, match="no Parquet file, or damaged"):
        list(read_conversations(tmp_path / "rows.parquet", Text(tiny), None))
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DataError, match="is a folder: give the files in it"):
        list(read_conversations(tmp_path / "folder.jsonl", Text(tiny), None))


def test_parquet_of_a_few_bytes_and_endless_rows_is_refused(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    indices = pyarrow.array(np.zeros(2000, np.int32))
    texts = pyarrow.DictionaryArray.from_arrays(indices, pyarrow.array(["a b " * 100_000]))
    for name, column in (("dictionary", texts), ("plain", texts.cast(pyarrow.string()))):
        path = tmp_path / f"{name}.parquet"
        parquet.write_table(pyarrow.table({"text": column}), path, compression="zstd")
        assert path.stat().st_size < 10_000
        with pytest.raises(DataError, match="far more data than its size holds"):
            list(read_rows(path))


def test_parquet_whose_names_are_no_text_is_refused(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"wordy": ["a"]}), tmp_path / "rows.parquet")
    content = (tmp_path / "rows.parquet").read_bytes()
    (tmp_path / "rows.parquet").write_bytes(content.replace(b"wordy", b"\xec\xec\xec\xec\xec"))
    with pytest.raises(DataError, match="no Parquet file, or damaged"):
        list(read_rows(tmp_path / "rows.parquet"))


def test_parquet_without_its_library_names_the_extra() -> None:
    code = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "from arriero.cli.terminal import one_line\nfrom arriero.walk.rows import read_rows\nfrom pathlib import Path\n"
        "try: list(read_rows(Path('x.parquet')))\n"
        "except ModuleNotFoundError as error: print(one_line(error, 'calibration'))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'arriero[parquet]'" in run.stdout
