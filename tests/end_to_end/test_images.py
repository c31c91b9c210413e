"""Images end to end: `transformers`' multimodal Llama 4 and ours, from the same photographs to the same text."""

import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import drawn, photo, photo_path
from PIL import Image
from transformers import Llama4ForConditionalGeneration
from typer.testing import CliRunner

import arriero
from arriero.cli.app import app
from arriero.engine import build_bundle
from arriero.errors import FolderError, SessionError
from arriero.files.folders import read_spec
from arriero.runtime import Session

PHOTO = "sklearn"
"""China: 640 × 427, four tiles and the global one."""


@pytest.fixture(scope="module")
def reference(multimodal_checkpoint: Path) -> Llama4ForConditionalGeneration:
    return Llama4ForConditionalGeneration.from_pretrained(multimodal_checkpoint, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def session(multimodal_model: Path) -> Session:
    return arriero.load(multimodal_model)


def sized(width: int, height: int) -> Image.Image:
    return photo(PHOTO).resize((width, height))


CASES: dict[str, tuple[str, list[Image.Image]]] = {
    "one tile": ("<|image|>What is this?", [sized(28, 28)]),
    "many tiles": ("What is this? <|image|>", [photo(PHOTO)]),
    "wide": ("<|image|>Say it.", [sized(90, 30)]),
    "several images": ("<|image|>and<|image|>, then<|image|>?", [sized(28, 20), photo("matplotlib"), sized(60, 60)]),
    "long": ("<|image|>" * 15 + "How many?", [sized(56, 56)] * 15),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_and_greedy_text_are_those_of_transformers(
    case: str, session: Session, reference: Llama4ForConditionalGeneration
) -> None:
    prompt, images = CASES[case]
    tokens = session.read(prompt, images)
    assert tokens.pixels_N3PP is not None
    pixels, ids = torch.from_numpy(tokens.pixels_N3PP), torch.tensor([tokens.ids])
    with torch.no_grad():
        expected = reference(ids, pixels).logits[0].numpy()
        continued = reference.generate(ids, pixel_values=pixels, max_new_tokens=8, do_sample=False, eos_token_id=-1)
    features = session.encode(tokens.pixels_N3PP)
    scored = [logits_SV for _, logits_SV in session.score(tokens.ids, features_MH=features)]
    assert np.abs(np.concatenate(scored) - expected).max() <= 1e-5 * max(1.0, np.abs(expected).max())
    found = session.generate(prompt, 8, images, temperature=0, eos_token_id=[])
    assert found.ids == continued[0, len(tokens.ids) :].tolist()


def test_rows_of_a_batch_keep_their_own_images(session: Session) -> None:
    prompts = [session.read("<|image|>a", [sized(28, 28)]), session.read("no image, but some more words")]
    prompts.append(session.read("<|image|>" * 2, [sized(60, 28), drawn(28, 28)]))
    none = np.empty((0, session.spec.hidden_size), np.float32)
    features = [none if (found := session.encode(each.pixels_N3PP)) is None else found for each in prompts]
    together = session.prefill(session.start(3, 200), [each.ids for each in prompts], features)
    for row, each in enumerate(prompts):
        alone = session.prefill(session.start(1, 200), [each.ids], [features[row]])
        assert np.abs(together[row] - alone[0]).max() <= 1e-5


def test_an_image_may_be_a_path_bytes_a_picture_or_an_array(session: Session, tmp_path: Path) -> None:
    image = sized(28, 28)
    image.save(tmp_path / "image.png")
    coded = io.BytesIO()
    image.save(coded, "PNG")
    forms = [tmp_path / "image.png", coded.getvalue(), image, np.asarray(image)]
    texts = {tuple(session.generate("What?", 4, [form], eos_token_id=[]).ids) for form in forms}
    assert len(texts) == 1


def test_a_question_about_images_is_a_message_with_them(session: Session) -> None:
    image = sized(28, 28)
    parts = [{"type": "image", "image": image}, {"type": "text", "text": "What is this?"}]
    assert session.read("What is this?", [image]).ids == session.read([{"role": "user", "content": parts}]).ids


def test_a_turn_with_an_image_seen_before_does_not_compute_it_again(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert session.tower is not None
    pixels = session.read("<|image|>", [drawn(28, 28)]).pixels_N3PP
    assert pixels is not None
    first = session.encode(np.concatenate([pixels, pixels[:1]]))
    monkeypatch.setattr(session.tower.backend, "encode", None)
    again = session.encode(pixels)
    assert first is not None
    assert again is not None
    assert np.array_equal(first[: len(again)], again)


def test_a_bundle_answers_as_its_model(session: Session, multimodal_model: Path, tmp_path: Path) -> None:
    bundle = build_bundle(multimodal_model, tmp_path / "bundle")
    assert (bundle / "vision.onnx").is_file()
    found = arriero.load(bundle).generate("What?", 6, [photo(PHOTO)], eos_token_id=[])
    assert found.ids == session.generate("What?", 6, [photo(PHOTO)], eos_token_id=[]).ids


BAD: dict[str, tuple[str | Sequence[int], list[object], str]] = {
    "no image for a placeholder": ("<|image|><|image|>", [sized(28, 28)], "2 <|image|> and 1 images came with it"),
    "patches written out": ("<|patch|>", [], "1 <|patch|> of its own"),
    "patches as ids": ([1, 2053, 5], [], "1 <|patch|> of its own"),
    "too many tokens": ("<|image|>" * 60, [photo(PHOTO)] * 60, "tokens (1200 of its images), the session holds 512"),
    "no file": ("What?", ["gone.jpg"], "gone.jpg: cannot be read (No such file or directory)"),
    "no image": ("What?", [b"text"], "not an image"),
    "an unknown part": ([{"role": "user", "content": [{"type": "audio"}]}], [], "message 1 has the part {'type'"),  # type: ignore[list-item]
    "images beside messages": ([{"role": "user", "content": "Hi"}], [sized(28, 28)], "1 images came beside them"),  # type: ignore[list-item]
}


@pytest.mark.parametrize("case", BAD)
def test_bad_images_are_one_line(case: str, session: Session) -> None:
    prompt, images, said = BAD[case]
    with pytest.raises(SessionError) as caught:
        session.generate(prompt, 4, images)  # type: ignore[arg-type]
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_image_for_a_text_only_model_is_refused(tiny_model: Path) -> None:
    with pytest.raises(SessionError, match="the model takes text only, leave the images out"):
        arriero.load(tiny_model).generate("What is this?", 4, [sized(28, 28)])


def test_a_preprocessor_of_other_tiles_is_refused(multimodal_model: Path, tmp_path: Path) -> None:
    bundle = build_bundle(multimodal_model, tmp_path / "bundle")
    (bundle / "processor_config.json").write_text(json.dumps({"patch_size": 14}))
    with pytest.raises(FolderError, match="features of a tile is 1, the vision tower's 4"):
        arriero.load(bundle).generate("What?", 4, [sized(28, 28)])


def test_the_command_line_takes_images(multimodal_model: Path, session: Session) -> None:
    path = str(photo_path(PHOTO))
    arguments = ["run", str(multimodal_model), "--max-new-tokens", "5", "--json", "--ignore-eos", "--temperature", "0"]
    result = CliRunner().invoke(app, [*arguments, "--image", path, "--prompt", "What?"])
    assert result.exit_code == 0, result.stderr
    expected = session.generate("What?", 5, [path], eos_token_id=[], temperature=0)
    assert json.loads(result.stdout)["ids"] == expected.ids
    said = CliRunner().invoke(app, [*arguments, "--chat", "--image", path], input="What?\n/image " + path + "\nAnd?\n")
    assert said.exit_code == 0, said.stderr
    answers = [json.loads(line) for line in said.stdout.splitlines()]
    assert answers[0]["ids"] == expected.ids
    assert len(answers) == 2


@pytest.mark.parametrize("asked", [["--prompt", "What?"], ["--chat"]], ids=["prompt", "chat"])
def test_an_image_that_cannot_be_taken_ends_the_command(
    asked: list[str], tiny_model: Path, multimodal_model: Path
) -> None:
    path = str(photo_path(PHOTO))
    refused = CliRunner().invoke(app, ["run", str(tiny_model), *asked, "--image", path], input="What?\n")
    assert refused.exit_code == 2
    assert refused.stderr == f"arriero: {tiny_model}: the model takes text only, leave the images out\n"
    refused = CliRunner().invoke(app, ["run", str(multimodal_model), *asked, "--image", "gone.png"], input="What?\n")
    assert refused.exit_code == 2
    assert refused.stderr.startswith("arriero: gone.png: cannot be read")


def test_a_chat_that_would_refuse_every_turn_ends(tiny_model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    for name, said in (("chat_template.jinja", "has no chat template"), ("tokenizer.json", "export again with --tok")):
        (copy / name).unlink()
        refused = CliRunner().invoke(app, ["run", str(copy), "--chat"], input="What?\n")
        assert refused.exit_code == 2
        assert said in refused.stderr


def test_the_spec_says_what_the_tower_is(multimodal_model: Path) -> None:
    vision = read_spec(multimodal_model).vision
    assert vision is not None
    assert (vision.graph, vision.spec.features, vision.spec.image_token) == ("vision.onnx", 4, 2053)
