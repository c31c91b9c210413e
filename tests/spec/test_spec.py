import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arriero.errors import FolderError
from arriero.spec.folder import FolderSpec
from arriero.spec.geometry import LayerSpec, ModelSpec, RopeScaling
from arriero.spec.recipe import Override, Recipe
from arriero.spec.stored_weights import Weight, WeightFile

MODEL = ModelSpec(
    vocab_size=100,
    hidden_size=32,
    layers=(LayerSpec(rope=True, chunk=16, experts=True), LayerSpec(rope=False, chunk=0, experts=False)),
    heads=4,
    kv_heads=2,
    head_dim=8,
    experts=4,
    experts_per_token=1,
    expert_size=16,
    dense_size=64,
    norm_eps=1e-5,
    qk_norm=True,
    rope_theta=5e5,
    rope_scaling=RopeScaling(factor=16.0, low_freq_factor=1.0, high_freq_factor=1.0, original_max_positions=32),
    max_positions=512,
    temperature_scale=0.1,
    temperature_floor=8.0,
    dtype="bfloat16",
)
FOLDER = FolderSpec(
    kind="bundle",
    version="1",
    model=MODEL,
    target="cpu",
    source_hashes={"config.json": "ab"},
    weight_files=(WeightFile(name="a.safetensors", path="/a", size=9, identity="cd"),),
    weights=(Weight(name="w", file="a.safetensors", offset=8, shape=(2, 3), dtype="bfloat16", convert="float32"),),
)
junk = st.none() | st.booleans() | st.integers(-3, 3) | st.text(max_size=3) | st.lists(st.integers(), max_size=2)


def test_a_spec_survives_its_json() -> None:
    assert FolderSpec.from_json(FOLDER.to_json()) == FOLDER


@given(st.data())
def test_any_change_is_read_or_refused(data: st.DataObject) -> None:
    fields = json.loads(FOLDER.to_json())
    places = [fields, fields["model"], fields["model"]["rope_scaling"], fields["weights"][0], fields["weight_files"][0]]
    place = data.draw(st.sampled_from(places))
    place[data.draw(st.sampled_from(sorted(place)))] = data.draw(junk)
    try:
        spec = FolderSpec.from_json(json.dumps(fields))
    except FolderError:
        return
    assert FolderSpec.from_json(spec.to_json()) == spec


def test_what_is_wrong_is_said() -> None:
    fields = json.loads(FOLDER.to_json())
    fields["model"]["kv_heads"] = 0
    with pytest.raises(FolderError, match="kv_heads is 0, expected 1 to"):
        FolderSpec.from_json(json.dumps(fields))
    fields["model"]["kv_heads"] = "two"
    with pytest.raises(FolderError, match="'two' is no int"):
        FolderSpec.from_json(json.dumps(fields))


def test_a_rank_is_one_of_its_ranks() -> None:
    fields = json.loads(FOLDER.to_json())
    wide = {**fields["model"], "heads": 8, "kv_heads": 4}
    split = {**fields, "model": wide, "rank": 3, "ranks": 4, "expert_groups": 2}
    assert FolderSpec.from_json(json.dumps(split)).rank == 3
    for wrong in ({"rank": 4}, {"rank": -1}, {"ranks": 0}, {"expert_groups": 3}, {"expert_groups": 0}):
        with pytest.raises(FolderError, match=r"damaged .rank -?[0-9]+ of"):
            FolderSpec.from_json(json.dumps({**split, **wrong}))
    for wrong, said in (({"ranks": 10**18}, "1000000000000000000 ranks, expected at most"), ({"ranks": 4096}, "is 0")):
        with pytest.raises(FolderError, match=said):
            FolderSpec.from_json(json.dumps({**split, **wrong}))
    older = {name: value for name, value in fields.items() if name not in ("rank", "ranks", "expert_groups")}
    assert FolderSpec.from_json(json.dumps(older)) == FOLDER


QUANTISED = dataclasses.replace(
    FOLDER,
    source="/c",
    recipe=Recipe(format="int8"),
    weights=(
        Weight(
            name="e", file="a.safetensors", offset=8, shape=(4, 32, 16), dtype="int8", convert="uint8",
            layout="panels", stacked=True, is_made=True,
        ),
        *FOLDER.weights,
    ),
)  # fmt: skip


def older(spec: FolderSpec) -> str:
    """The text that schema 1 had for a folder."""
    fields = json.loads(spec.to_json()) | {"schema": 1}
    for weight in fields["weights"]:
        if weight["stacked"]:
            weight["shape"][1:] = reversed(weight["shape"][1:])
    return json.dumps(fields)


def test_an_older_schema_is_read_where_the_folder_is_the_same() -> None:
    whole = dataclasses.replace(QUANTISED, recipe=None, kind="model", target="")
    kept = dataclasses.replace(
        whole, recipe=Recipe(format="fp8", overrides=(Override(pattern="*experts", format="none"),))
    )
    for spec in (FOLDER, QUANTISED, whole, kept):
        assert FolderSpec.from_json(older(spec)) == spec


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"kind": "model", "target": ""}, "export '/c' again$"),
        (
            {"kind": "model", "target": "", "source": "/m", "source_hashes": {"decoder.onnx": "a"}},
            "calibrate '/m' again$",
        ),
        (
            {"kind": "group", "target": "tensorrt"},
            "make its model anew .*arriero export.*arriero calibrate.* and build it$",
        ),
        ({"recipe": Recipe(format="fp8")}, "make its model anew"),
        ({"kind": "group", "target": ""}, "export '/c' again$"),
    ],
)
def test_quantised_experts_of_an_older_schema_are_refused(changes: dict[str, Any], remedy: str) -> None:
    with pytest.raises(FolderError, match=f"schema 1, of which quantised experts lie in another order: {remedy}"):
        FolderSpec.from_json(older(dataclasses.replace(QUANTISED, **changes)))
