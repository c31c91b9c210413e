"""Panics of the tokenizers library: one line of ours, and none of the library's."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from arriero.errors import FolderError
from arriero.runtime.panics import panics_refused
from arriero.runtime.text import Text

SEQUENCE = {"Sequence": {"id": "A", "type_id": 0}}
OTHER = {"Sequence": {"id": "B", "type_id": 0}}
TEMPLATE = {"type": "TemplateProcessing", "single": [OTHER], "pair": [SEQUENCE, OTHER], "special_tokens": {}}
BPE = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}
STRIP = {"type": "Strip", "content": "a", "start": 0, "stop": 5}

PANICS: dict[str, dict[str, Any]] = {
    "a merge shorter than its prefix": {"model": BPE | {"continuing_subword_prefix": "##"}},
    "a template of a second text": {"model": BPE, "post_processor": TEMPLATE},
    "a decoder that cuts off more than there is": {"model": BPE, "decoder": STRIP},
}


@pytest.mark.parametrize("parts", PANICS.values(), ids=PANICS)
def test_a_tokenizer_that_panics_is_refused_without_a_line_of_the_librarys(
    parts: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": []} | parts))
    with pytest.raises(FolderError, match=r"tokenizer\.json: damaged") as refused:
        Text(tmp_path)
    assert "\n" not in str(refused.value)
    assert capfd.readouterr() == ("", "")


def test_what_others_write_meanwhile_comes_out_behind_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(FolderError, match="damaged"), panics_refused(tmp_path, quiet=True):  # noqa: PT012
        os.write(2, b"one line\nthread '<unnamed>' (7) panicked at src/a.rs:1:2:\nno (entry)\nnote: run with\n")
        os.write(2, b"another\n")
        raise Exception("no (entry)")
    assert capfd.readouterr().err == "one line\nanother\n"
    with panics_refused(tmp_path, quiet=True), panics_refused(tmp_path, quiet=True):
        os.write(2, b"a third\n")
    assert capfd.readouterr().err == "a third\n"
