"""The remedies of refusals, each followed literally: export, calibration and builds."""

from pathlib import Path
from typing import Any

import pytest
from planted_faults import changed_tensors
from remedies import Place, Remedy, built, calibrated, edited, exported, follow, runs
from safetensors.torch import load_file, save_file

from arriero.calibration.presets import parse_recipe
from arriero.engine import Options
from arriero.engine.target import check_dtypes, parse_target
from arriero.files.folders import read_spec


def overflowing(place: Place) -> Path:
    path = place.room / "overflowing"
    changes = {"model.norm.weight": lambda weight: weight * 1e6}
    return path if path.exists() else changed_tensors(place.small, path, changes)


def untied(place: Place, **changes: Any) -> Path:
    folder = place.copy(place.small)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["lm_head.weight"]
    path.unlink()  # its pages are those of the tensors
    save_file(tensors, path)
    return edited(folder / "config.json", **changes)


def set_of_another(place: Place, **fields: Any) -> Path:
    return edited(place.copy(place.small) / "config.json", **fields)


def misnamed(place: Place) -> Path:
    """A checkpoint whose one shard has another name."""
    folder = place.room / "misnamed"
    if not folder.exists():
        place.copy(place.small).rename(folder)
        (folder / "model.safetensors").rename(folder / "llama.safetensors")
    return folder


def renamed(place: Place) -> Path:
    folder = misnamed(place)
    (folder / "llama.safetensors").rename(folder / "model.safetensors")
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
        name="a shard with another name",
        provoke=lambda place: exported(place, misnamed(place)),
        says="rename it to model.safetensors",
        follow=lambda place: runs(exported(place, renamed(place))),
    ),
    Remedy(
        name="a shard in place of its folder",
        provoke=lambda place: exported(place, place.small / "model.safetensors"),
        says="give the folder that holds it and config.json",
        follow=lambda place: runs(exported(place, place.small)),
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
        provoke=lambda place: calibrated(place, place.model, samples=1, floor=32),
        says="with more --data or --samples",
        follow=lambda place: calibrated(place, place.model, samples=12, floor=32),
    ),
    Remedy(
        name="a starved expert, a lower floor",
        provoke=lambda place: calibrated(place, floor=10**6),
        says="with a lower --floor",
        follow=lambda place: calibrated(place, floor=1),
    ),
    Remedy(
        name="a starved expert, all experts",
        provoke=lambda place: calibrated(place, floor=10**6),
        says="with --all-experts",
        follow=lambda place: calibrated(place, floor=10**6, all_experts=True),
    ),
    Remedy(
        name="a starved expert, fallback",
        provoke=lambda place: calibrated(place, floor=10**6),
        says="with --floor-action fallback",
        follow=lambda place: calibrated(place, floor=10**6, floor_action="fallback"),
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
        follow=lambda place: [calibrated(place, recipe=each) for each in ("int8", "fp8")],
    ),
    Remedy(
        name="a group size that is none",
        provoke=lambda place: calibrated(place, place.model, recipe="int4", changes={"group_size": 48}),
        says="is none of 32, 64 and 128",
        follow=lambda place: parse_recipe("int4", {"group_size": 64}, ()),
    ),
    Remedy(
        name="a group size that does not divide",
        provoke=lambda place: calibrated(place, recipe="int4"),
        says="does not divide its 32 inputs: choose 32",
        follow=lambda place: calibrated(
            place, recipe="int4", changes={"group_size": 32}, override=["*experts=none", "*down_proj=none"]
        ),
    ),
    Remedy(
        name="no group size divides",
        provoke=lambda place: calibrated(place, recipe="int4", changes={"group_size": 32}),
        says="leave it out with an override of format none",
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
        name="a GPU before sm80",
        provoke=lambda place: parse_target("tensorrt-rtx:sm75"),
        says="tensorrt-rtx builds for sm80, sm86, sm89, sm120, sm121, not for 'sm75': choose among these",
        follow=lambda place: parse_target("tensorrt-rtx:sm80,sm86,sm89,sm120,sm121"),
    ),
    Remedy(
        name="a GPU without FP8",
        provoke=lambda place: check_dtypes(parse_target("tensorrt-rtx:sm86"), ["fp8"]),
        says="calibrate with --recipe int8 or target sm89",
        follow=lambda place: (
            check_dtypes(parse_target("tensorrt-rtx:sm86"), ["int8"]) is None
            and check_dtypes(parse_target("tensorrt-rtx:sm89"), ["fp8"]) is None
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


@pytest.mark.parametrize("remedy", [*EXPORTS], ids=lambda remedy: remedy.name)
def test_what_a_refusal_advises_helps(remedy: Remedy, place: Place) -> None:
    follow(remedy, place)
