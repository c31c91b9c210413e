"""The remedies of refusals, each followed literally: folders, export, calibration, builds and checks."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from planted_faults import changed_tensors
from remedies import Place, Remedy, edited, follow
from safetensors.torch import load_file, save_file

import arriero
from arriero.accuracy import check, record_golden
from arriero.calibration import calibrate_model
from arriero.calibration.presets import parse_recipe
from arriero.engine import Options, build_bundle
from arriero.engine.target import check_dtypes, parse_target
from arriero.export import export_checkpoint
from arriero.files.folders import read_spec


def runs(folder: Path, **options: Any) -> bool:
    return arriero.load(folder, max_seq=32, **options).generate([5, 6, 7], max_new_tokens=2).finish != ""


def exported(place: Place, checkpoint: Path | None = None, **options: Any) -> Path:
    return export_checkpoint(checkpoint or place.small, place.new("model"), **options)


def calibrated(place: Place, model: Path | None = None, out: Path | None = None, **options: Any) -> Path:
    options = {"recipe": "int8", "data": [place.text], "samples": 2, "floor": 0, **options}
    recipe = options.pop("recipe")
    recipe = parse_recipe(recipe, options.pop("changes", {}), options.pop("override", ()))
    return calibrate_model(model or exported(place), out or place.new("quantised"), recipe=recipe, **options)


def built(place: Place, model: Path | None = None, **options: Any) -> Path:
    return build_bundle(model or place.model, place.new("bundle"), **options)


def checked(place: Place, candidate: Path, against: Path, **options: Any) -> str:
    return check(candidate, against, **{"data": [place.text], "samples": 1, "window": 32, **options}).outcome


def golden(place: Place, out: Path, reference: Path | None = None, **options: Any) -> Path:
    return record_golden(reference or place.model, out, data=[place.text], samples=1, window=32, **options)


# Folders that are not what a verb takes


def taken(place: Place) -> Path:
    out = place.room / "taken"
    return out if out.exists() else exported(place).rename(out)


def linked(place: Place) -> Path:
    link = place.room / "link"
    if not link.is_symlink():
        link.symlink_to(taken(place), target_is_directory=True)
    return link


def without_symlink(place: Place) -> Path:
    linked(place).unlink()
    return export_checkpoint(place.small, place.room / "link")


def of_another_owner(place: Place) -> Path:
    (place.room / "photos").mkdir(exist_ok=True)
    place.write("photos/cat.txt", "cat")
    return place.room / "photos"


def moved_int8(place: Place) -> tuple[Path, Path]:
    """A quantised model whose weight files lie in another folder, and that folder."""
    model, weights = place.room / "moved", place.room / "weights"
    if not model.exists():
        shutil.copytree(place.int8, model)
        weights.mkdir()
        for path in model.glob("*.safetensors"):
            path.rename(weights / path.name)
    return model, weights


def moved_export(place: Place) -> tuple[Path, Path]:
    """An export whose checkpoint was moved, and where it is now."""
    model, there = place.room / "of-moved", place.room / "there"
    if not model.exists():
        export_checkpoint(here := place.copy(place.small), model)
        here.rename(there)
    return model, there


def changed_weights(place: Place) -> Path:
    folder = place.room / "changed"
    if not folder.exists():
        shutil.copytree(place.int8, folder)
        path = min(folder.glob("*.safetensors"))
        path.write_bytes(path.read_bytes()[:-8])
    return folder


def damaged_spec(place: Place) -> Path:
    out = taken(place)
    (out / "spec.json").write_text("{")
    return out


FOLDERS = (
    Remedy(
        name="a checkpoint is no model",
        provoke=lambda place: arriero.load(place.small),
        says="is a checkpoint: make a model of it with `arriero export` first",
        follow=lambda place: runs(exported(place)),
    ),
    Remedy(
        name="an empty folder is no model",
        provoke=lambda place: arriero.load(place.room),
        says="give a folder that `arriero export` wrote",
        follow=lambda place: runs(place.model),
    ),
    Remedy(
        name="a bundle is not built",
        provoke=lambda place: built(place, built(place)),
        says="is a bundle: give the model folder it was built from",
        follow=lambda place: built(place, Path(read_spec(built(place)).source)),
    ),
    Remedy(
        name="an output that exists, another",
        provoke=lambda place: export_checkpoint(place.small, taken(place)),
        says="exists: choose another output",
        follow=lambda place: exported(place),
    ),
    Remedy(
        name="an output that exists, --force",
        provoke=lambda place: export_checkpoint(place.small, taken(place)),
        says="or --force to replace it",
        follow=lambda place: export_checkpoint(place.small, taken(place), force=True),
    ),
    Remedy(
        name="another's folder is not offered --force",
        provoke=lambda place: export_checkpoint(place.small, of_another_owner(place)),
        says="is not replaced, choose another output$",
        follow=lambda place: exported(place),
    ),
    Remedy(
        name="a symlink, removed",
        provoke=lambda place: export_checkpoint(place.small, linked(place)),
        says="is a symlink, which is not replaced: remove it",
        follow=without_symlink,
    ),
    Remedy(
        name="a symlink, the folder it points to",
        provoke=lambda place: export_checkpoint(place.small, linked(place), force=True),
        says="or give the folder it points to",
        follow=lambda place: export_checkpoint(place.small, linked(place).resolve(), force=True),
    ),
    Remedy(
        name="an output in its input",
        provoke=lambda place: export_checkpoint(copy := place.copy(place.small), copy / "model"),
        says="choose an output beside the input",
        follow=lambda place: exported(place),
    ),
    Remedy(
        name="weights of an export that were moved",
        provoke=lambda place: arriero.load(moved_export(place)[0]),
        says="give its folder with --weights$",
        follow=lambda place: runs(moved_export(place)[0], weights=moved_export(place)[1]),
    ),
    Remedy(
        name="weights of a quantised model that were moved",
        provoke=lambda place: built(place, moved_int8(place)[0]),
        says="give its folder with --weights-from$",
        follow=lambda place: runs(
            built(place, moved_int8(place)[0], options=Options(weights_from=moved_int8(place)[1]))
        ),
    ),
    Remedy(
        name="weights of a reference that were moved",
        provoke=lambda place: checked(place, place.int8, moved_int8(place)[0]),
        says="give its folder with --against-weights$",
        follow=lambda place: checked(place, place.int8, moved_int8(place)[0], reference_weights=moved_int8(place)[1]),
    ),
    Remedy(
        name="a quantised model's weights that were changed",
        provoke=lambda place: arriero.load(changed_weights(place)),
        says="write .*changed again, with --force",
        follow=lambda place: runs(calibrated(place, place.model, changed_weights(place), force=True)),
    ),
    Remedy(
        name="a damaged spec.json",
        provoke=lambda place: arriero.load(damaged_spec(place)),
        says="spec.json is damaged .*: write the folder again",
        follow=lambda place: runs(export_checkpoint(place.small, damaged_spec(place), force=True)),
    ),
    Remedy(
        name="ranks are not joined",
        provoke=lambda place: arriero.load(exported(place, tp=2)),
        says="export without --tp",
        follow=lambda place: runs(exported(place)),
    ),
)


# Export, calibration, builds and checks


def overflowing(place: Place) -> Path:
    path = place.room / "overflowing"
    changes = {"model.norm.weight": lambda weight: weight * 1e6}
    return path if path.exists() else changed_tensors(place.small, path, changes)


def untied(place: Place, **changes: Any) -> Path:
    folder = place.copy(place.small)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["lm_head.weight"]
    save_file(tensors, path)
    return edited(folder / "config.json", **changes)


def set_of_another(place: Place, **fields: Any) -> Path:
    return edited(place.copy(place.small) / "config.json", **fields)


def named_weights(place: Place, name: str) -> Path:
    folder = place.copy(place.small)
    (folder / "model.safetensors").rename(folder / name)
    names = dict.fromkeys(load_file(folder / name), name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return folder


EXPORTS = (
    Remedy(
        name="an unknown dtype",
        provoke=lambda place: exported(place, dtype="int8"),
        says="expected one of float32, float16, bfloat16",
        follow=lambda place: [exported(place, dtype=each) for each in ("float32", "float16", "bfloat16")],
    ),
    Remedy(
        name="a value that float16 does not hold",
        provoke=lambda place: exported(place, overflowing(place), dtype="float16"),
        says="export with --dtype bfloat16 or float32",
        follow=lambda place: [exported(place, overflowing(place), dtype=each) for each in ("bfloat16", "float32")],
    ),
    Remedy(
        name="tp that does not divide",
        provoke=lambda place: exported(place, tp=3),
        says="choose one of 1, 2",
        follow=lambda place: exported(place, tp=2),
    ),
    Remedy(
        name="a head that is the embedding",
        provoke=lambda place: exported(place, untied(place)),
        says="set tie_word_embeddings to true in config.json",
        follow=lambda place: runs(exported(place, untied(place, tie_word_embeddings=True))),
    ),
    Remedy(
        name="a quantization_config of weights that are not",
        provoke=lambda place: exported(
            place,
            set_of_another(
                place,
                quantization_config={
                    "quant_method": "fbgemm_fp8",
                    "activation_scale_ub": 1200.0,
                    "modules_to_not_convert": [],
                },
            ),
        ),
        says="no weight is quantised: remove it there",
        follow=lambda place: exported(place, set_of_another(place, quantization_config=None)),
    ),
    Remedy(
        name="a starved expert, more samples",
        provoke=lambda place: calibrated(place, place.model, samples=1, floor=4),
        says="give more --data or --samples",
        follow=lambda place: calibrated(place, place.model, samples=12, floor=4),
    ),
    Remedy(
        name="a starved expert, a lower floor",
        provoke=lambda place: calibrated(place, floor=10**6),
        says="a lower --floor",
        follow=lambda place: calibrated(place, floor=1),
    ),
    Remedy(
        name="a starved expert, all experts",
        provoke=lambda place: calibrated(place, floor=10**6),
        says="or --all-experts",
        follow=lambda place: calibrated(place, floor=10**6, all_experts=True),
    ),
    Remedy(
        name="too little data",
        provoke=lambda place: calibrated(place, data=[place.write("little.txt", "Few.")]),
        says="give more --data",
        follow=lambda place: calibrated(place, data=[place.room / "little.txt", place.text]),
    ),
    Remedy(
        name="an unknown recipe",
        provoke=lambda place: calibrated(place, recipe="int2"),
        says="choose one of int8, fp8, int4",
        follow=lambda place: [calibrated(place, place.model, recipe=each) for each in ("int8", "fp8")],
    ),
    Remedy(
        name="a group size that is none",
        provoke=lambda place: calibrated(place, place.model, recipe="int4", changes={"group_size": 48}),
        says="is none of 32, 64 and 128",
        follow=lambda place: parse_recipe("int4", {"group_size": 64}, ()),
    ),
    Remedy(
        name="a group size that does not divide",
        provoke=lambda place: calibrated(place, recipe="int4", override=["*experts=none", "*mlp*=none"]),
        says="does not divide its 32 inputs: choose 32",
        follow=lambda place: calibrated(
            place, recipe="int4", changes={"group_size": 32}, override=["*experts=none", "*down_proj=none"]
        ),
    ),
    Remedy(
        name="no group size divides",
        provoke=lambda place: calibrated(place, recipe="int4", changes={"group_size": 32}),
        says="layers.0.feed_forward.experts: .* leave it out with an override of format none",
        follow=lambda place: calibrated(
            place,
            recipe="int4",
            changes={"group_size": 32},
            override=["layers.*.feed_forward.experts=none", "*down_proj=none"],
        ),
    ),
    Remedy(
        name="a quantised model is not quantised again",
        provoke=lambda place: calibrated(place, place.int8),
        says="give the model it came from",
        follow=lambda place: calibrated(place, Path(read_spec(place.int8).source)),
    ),
    Remedy(
        name="an unknown target",
        provoke=lambda place: built(place, target="tpu"),
        says=r"choose cpu, tensorrt-rtx:smNN\[,smNN…\] or tensorrt\[:smNN\]",
        follow=lambda place: [
            built(place, target="cpu"),
            *map(parse_target, ("tensorrt-rtx:sm89", "tensorrt-rtx:sm89,sm120", "tensorrt", "tensorrt:sm90")),
        ],
    ),
    Remedy(
        name="a GPU without bfloat16",
        provoke=lambda place: check_dtypes(parse_target("tensorrt-rtx:sm75"), ["bfloat16"]),
        says="export with --dtype float16 or target sm80",
        follow=lambda place: (
            check_dtypes(parse_target("tensorrt-rtx:sm75"), ["float16"]) is None
            and check_dtypes(parse_target("tensorrt-rtx:sm80"), ["bfloat16"]) is None
        ),
    ),
    Remedy(
        name="engine's options for the cpu",
        provoke=lambda place: built(place, options=Options(max_batch=2)),
        says="leave the engine's options out",
        follow=lambda place: built(place),
    ),
    Remedy(
        name="a rounded cache is the cpu's",
        provoke=lambda place: built(place, target="tensorrt-rtx:sm89", kv_cache="int8"),
        says="kv_cache is for the cpu target",
        follow=lambda place: runs(built(place, kv_cache="int8")),
    ),
    Remedy(
        name="an engine's cache is calibrated",
        provoke=lambda place: built(place, target="tensorrt-rtx:sm89", kv_cache="int8"),
        says="calibrate with --kv-cache int8 or fp8",
        follow=lambda place: [calibrated(place, changes={"kv_cache": each}) for each in ("int8", "fp8")],
    ),
)


def foreign_file(place: Place) -> Path:
    return place.write("notes.safetensors", "something else")


def of_another_version(place: Place) -> Path:
    path = place.room / "golden.safetensors"
    if not path.exists():
        golden(place, path)
    path.write_bytes(path.read_bytes().replace(b'"golden": "', b'"golden": "9', 1)[:-1])
    return path


def textless(place: Place, *, mended: bool = False) -> Path:
    folder = place.copy(place.model)
    (folder / "tokenizer.json").unlink()
    if mended:
        shutil.copy(place.tiny / "tokenizer.json", folder)
    return folder


CHECKS = (
    Remedy(
        name="a check without text",
        provoke=lambda place: checked(place, place.model, place.int8, data=None),
        says="give text files with --data",
        follow=lambda place: checked(place, place.model, place.int8),
    ),
    Remedy(
        name="a golden file has its text",
        provoke=lambda place: checked(place, place.model, golden(place, place.new())),
        says="has its own text: leave --data out",
        follow=lambda place: checked(place, place.model, golden(place, place.new()), data=None),
    ),
    Remedy(
        name="a golden file holds no layers",
        provoke=lambda place: checked(
            place, place.model, golden(place, place.room / "g"), data=None, locate_fault=True
        ),
        says="for --locate give the model it was recorded from",
        follow=lambda place: checked(place, place.int8, place.model, locate_fault=True),
    ),
    Remedy(
        name="a file that is no golden one",
        provoke=lambda place: checked(place, place.model, foreign_file(place), data=None),
        says="is no golden file .*: record one with `arriero golden`",
        follow=lambda place: checked(place, place.model, golden(place, place.new()), data=None),
    ),
    Remedy(
        name="a file that is no golden one is not replaced",
        provoke=lambda place: golden(place, foreign_file(place)),
        says="is not replaced, choose another output$",
        follow=lambda place: golden(place, place.new()),
    ),
    Remedy(
        name="a golden file that exists",
        provoke=lambda place: golden(place, golden(place, place.room / "again")),
        says="or --force to replace it",
        follow=lambda place: golden(place, place.room / "again", force=True),
    ),
    Remedy(
        name="a checked model without a tokenizer",
        provoke=lambda place: checked(place, textless(place), place.model),
        says="has no tokenizer.json that can be read .*: copy the checkpoint's into it",
        follow=lambda place: checked(place, textless(place, mended=True), place.model),
    ),
    Remedy(
        name="an unknown limit",
        provoke=lambda place: checked(place, place.model, place.int8, limits={"speed": 1.0}),
        says="choose from perplexity_ratio",
        follow=lambda place: checked(place, place.model, place.int8, limits={"perplexity_ratio": 2.0}),
    ),
)


@pytest.mark.parametrize("remedy", [*FOLDERS, *EXPORTS, *CHECKS], ids=lambda remedy: remedy.name)
def test_what_a_refusal_advises_helps(remedy: Remedy, place: Place) -> None:
    follow(remedy, place)
