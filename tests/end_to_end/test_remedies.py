"""The remedies of refusals, each followed literally: folders and checks."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from remedies import Place, Remedy, built, calibrated, checked, exported, follow, runs

import arriero
from arriero.accuracy import record_golden
from arriero.accuracy.golden import VERSION
from arriero.engine import Options
from arriero.export import export_checkpoint
from arriero.files.folders import read_spec

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
        says="give a folder that `arriero export` or `arriero build` wrote",
        follow=lambda place: runs(place.model),
    ),
    Remedy(
        name="a bundle is not built",
        provoke=lambda place: built(place, built(place)),
        says="is built already: give the model it was built of",
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
        name="weights of a bundle that were moved",
        provoke=lambda place: arriero.load(built(place, moved_export(place)[0])),
        says="give its folder with --weights$",
        follow=lambda place: runs(
            built(place, moved_export(place)[0], options=Options(weights_from=moved_export(place)[1]))
        ),
    ),
    Remedy(
        name="a bundle that is to read weights where they are not",
        provoke=lambda place: built(place, place.model, options=Options(weights_from=place.room)),
        says="give its folder with --weights-from$",
        follow=lambda place: runs(built(place, place.model)),
    ),
    Remedy(
        name="the folder of moved weights as their placement",
        provoke=lambda place: built(place, place.model, options=Options(weights=str(place.small))),  # type: ignore[arg-type]
        says="a folder of weight files goes with --weights-from$",
        follow=lambda place: runs(
            built(place, moved_export(place)[0], options=Options(weights_from=moved_export(place)[1]))
        ),
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
        name="a rank alone",
        provoke=lambda place: arriero.load(exported(place, tp=2) / "rank-1"),
        says="give the group's folder, .*",
        follow=lambda place: runs(exported(place, tp=2)),
    ),
)


# Checks


def golden(place: Place, out: Path, reference: Path | None = None, **options: Any) -> Path:
    return record_golden(reference or place.model, out, data=[place.text], samples=1, window=32, **options)


def foreign_file(place: Place) -> Path:
    return place.write("notes.safetensors", "something else")


def of_another_version(place: Place) -> Path:
    path = place.room / "golden.safetensors"
    if not path.exists():
        golden(place, path)
        ours, other = f'"golden": "{VERSION}"'.encode(), f'"golden": "{"9" * len(VERSION)}"'.encode()
        path.write_bytes(path.read_bytes().replace(ours, other, 1))
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
        says="has its own text, .*: leave --data out",
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
        name="a golden file of another version",
        provoke=lambda place: checked(place, place.model, of_another_version(place), data=None),
        says="record it with `arriero golden`",
        follow=lambda place: checked(
            place, place.model, golden(place, of_another_version(place), force=True), data=None
        ),
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


@pytest.mark.parametrize("remedy", [*FOLDERS, *CHECKS], ids=lambda remedy: remedy.name)
def test_what_a_refusal_advises_helps(remedy: Remedy, place: Place) -> None:
    follow(remedy, place)
