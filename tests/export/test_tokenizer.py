"""A checkpoint without its tokenizer or preprocessor: said at export, and taken from elsewhere."""

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

import arriero
from arriero.cli.app import app
from arriero.errors import ExportError, SessionError
from arriero.export import export_checkpoint


def test_a_missing_tokenizer_is_said_and_taken_from_elsewhere(tiny: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(tiny, tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (bare / name).unlink()
    said: list[str] = []
    export_checkpoint(bare, tmp_path / "mute", notice=said.append)
    assert any(
        "has no tokenizer.json, so the model will take token ids" in line and "--tokenizer" in line for line in said
    )
    said.clear()
    model = export_checkpoint(bare, tmp_path / "model", tokenizer=tiny, notice=said.append)
    assert not said
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (model / name).read_bytes() == (tiny / name).read_bytes()
    with pytest.raises(ExportError, match=r"has no tokenizer.json: give with --tokenizer a folder that has one"):
        export_checkpoint(tiny, tmp_path / "other", tokenizer=bare)


def test_a_model_without_its_preprocessor_is_not_said_to_take_no_images(
    multimodal_checkpoint: Path, tmp_path: Path
) -> None:
    bare = shutil.copytree(multimodal_checkpoint, tmp_path / "bare")
    for path in bare.glob("*processor_config.json"):
        path.unlink()
    said: list[str] = []
    model = export_checkpoint(bare, tmp_path / "model", notice=said.append)
    assert any("has no preprocessor_config.json, so the model's vision tower gets no images" in line for line in said)
    (model / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    shown = " ".join(CliRunner().invoke(app, ["inspect", str(model)]).stdout.split())
    assert "tokenizer missing: export again with --tokenizer DIR" in shown
    assert "; its preprocessor_config.json is missing" in shown
    (tmp_path / "tokenizer.json").rename(model / "tokenizer.json")
    ask = [{"role": "user", "content": [{"type": "image", "path": "x.png"}, {"type": "text", "text": "What?"}]}]
    with pytest.raises(SessionError, match="export again with --tokenizer DIR") as caught:
        arriero.load(model).generate(ask)
    assert "takes no images" not in str(caught.value)
