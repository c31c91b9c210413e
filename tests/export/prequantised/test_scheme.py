"""What a checkpoint says of its quantisation: read, or refused by name."""

import contextlib
import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arriero.errors import CheckpointError
from arriero.export.prequantised.scheme import Scheme, WeightGroup, read_scheme

WEIGHTS = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False}
INPUTS = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
PACKED = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64}
MODELOPT = {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}}


def config(**changes: Any) -> dict[str, Any]:
    """A text-only configuration quantised by compressed-tensors."""
    group = {"targets": ["Linear"], "weights": WEIGHTS, "input_activations": INPUTS, "output_activations": None}
    found = {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": "float-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    return {"model_type": "llama4_text", "quantization_config": copy.deepcopy(found) | changes}


def grouped(**changes: Any) -> dict[str, Any]:
    """The same with a changed group."""
    found = config()
    found["quantization_config"]["config_groups"]["group_0"] |= changes
    return found


def test_an_unquantised_checkpoint_has_no_scheme() -> None:
    assert read_scheme({"model_type": "llama4_text"}) is None


def test_each_method_is_read() -> None:
    dynamic, static = (WeightGroup(format="fp8", activations=each) for each in ("dynamic", "static"))  # type: ignore[arg-type]
    assert read_scheme(config()) == Scheme(method="compressed-tensors", groups=(dynamic,))
    packed = read_scheme(grouped(weights=PACKED, input_activations=None))
    assert packed is not None
    assert packed.groups == (WeightGroup(format="int4", activations="dynamic", group_size=64),)
    fbgemm = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]}
    nested = {"model_type": "llama4", "text_config": {}, "quantization_config": fbgemm}
    assert read_scheme(nested) == Scheme(method="fbgemm_fp8", groups=(dynamic,), activation_bound=1200.0)
    expected = Scheme(method="modelopt", groups=(static,), kv_cache="fp8")
    assert read_scheme({"model_type": "llama4_text"}, MODELOPT) == expected
    inside = {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_scheme": {"num_bits": 8, "type": "float"}}
    assert read_scheme({"model_type": "llama4_text", "quantization_config": inside}) == expected


@pytest.mark.parametrize("targets", [["re:.*attn.*"], ["Linear"]])
def test_of_several_groups_the_one_that_targets_a_module_counts(targets: list[str]) -> None:
    static = {**INPUTS, "strategy": "tensor", "dynamic": False}
    scheme = read_scheme(
        config(
            config_groups={
                "a": {"targets": ["re:.*experts.*"], "weights": WEIGHTS, "input_activations": INPUTS},
                "b": {"targets": targets, "weights": WEIGHTS, "input_activations": static},
            }
        )
    )
    assert scheme is not None
    assert scheme.group("model.layers.0.self_attn.q_proj", "fp8").activations == "static"
    assert scheme.group("model.layers.0.feed_forward.experts.3.up_proj", "fp8").activations == "dynamic"
    if targets == ["Linear"]:
        assert scheme.group("lm_head", "fp8").activations == "static"
    else:
        with pytest.raises(CheckpointError, match="several groups of fp8, none of which targets 'lm_head'"):
            scheme.group("lm_head", "fp8")
    with pytest.raises(CheckpointError, match="'lm_head' is stored as int8, quantization_config knows fp8 only"):
        scheme.group("lm_head", "int8")


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (
            config(quant_method="gptq"),
            "quantised by 'gptq'; of quantised checkpoints Arriero takes ModelOpt FP8; compress",
        ),
        (
            {"model_type": "llama4_text", "quantization_config": "int8"},
            "quantization_config is 'int8', expected an object",
        ),
        (config(quantization_status="frozen"), "quantization_status is 'frozen': save the checkpoint compressed"),
        (config(transform_config={"config_groups": {"a": 1}}), "rotated checkpoints are not taken"),
        (config(sparsity_config={"format": "sparse-24-bitmask"}), "sparse checkpoints are not taken"),
        (config(config_groups={}), "config_groups is {}: expected a group at least"),
        (
            config(kv_cache_scheme={**WEIGHTS, "strategy": "attn_head"}),
            "strategy is 'attn_head': Arriero takes one static",
        ),
        (config(kv_cache_scheme={**INPUTS, "strategy": "tensor"}), "dynamic is True: Arriero takes one static scale"),
        (grouped(weights=None), "group_0.weights is None, expected an object"),
        (grouped(weights={**WEIGHTS, "symmetric": False}), "symmetric is False: zero points are not taken"),
        (grouped(weights={**WEIGHTS, "num_bits": 4}), "num_bits is 4: 'float' of 4 bits, Arriero takes"),
        (
            grouped(weights={**WEIGHTS, "strategy": "block"}),
            "strategy is 'block': Arriero takes 8-bit weights with a scale",
        ),
        (
            grouped(input_activations=None),
            "input_activations is None: Arriero takes 8-bit weights with 8-bit activations",
        ),
        (
            grouped(input_activations={**INPUTS, "type": "int"}),
            "the weights are fp8, expected the same of the activations",
        ),
        (
            grouped(input_activations={**INPUTS, "strategy": "group"}),
            "strategy is 'group': Arriero takes one static scale",
        ),
        (
            grouped(input_activations={**INPUTS, "dynamic": "local"}),
            "dynamic is 'local': Arriero takes scales known before",
        ),
        (grouped(output_activations=INPUTS), "Arriero quantises inputs of products only"),
        (grouped(targets="Linear"), "targets is 'Linear': expected a list of names"),
        (grouped(targets=["re:*"]), "targets is ['re:*']: expected a list of names, or of patterns"),
        (grouped(weights=PACKED), "Arriero takes 4-bit weights with unquantised activations (W4A16)"),
        (
            grouped(weights={**PACKED, "group_size": 16}, input_activations=None),
            "group_size is 16: a group size of 32, 64 or 128 is what every target takes",
        ),
        (
            grouped(weights={**PACKED, "strategy": "channel", "group_size": None}, input_activations=None),
            "strategy is 'channel': a group size of 32, 64 or 128",
        ),
        (grouped(weights={**PACKED, "actorder": "group"}, input_activations=None), "actorder is 'group': act-order"),
    ],
)
def test_what_is_not_taken_is_named_with_what_was_found(found: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(said)):
        read_scheme(found)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda part: part.update(quant_algo="NVFP4"), "quantization.quant_algo is 'NVFP4': of quantised checkpoints"),
        (lambda part: part.update(kv_cache_quant_algo="NVFP4"), "kv_cache_quant_algo is 'NVFP4': Arriero takes FP8"),
    ],
)
def test_other_algorithms_of_modelopt_are_refused(damage: Callable[[dict[str, Any]], None], said: str) -> None:
    found = copy.deepcopy(MODELOPT)
    damage(found["quantization"])
    with pytest.raises(CheckpointError, match=re.escape(said)):
        read_scheme({"model_type": "llama4_text"}, found)


junk = st.none() | st.booleans() | st.integers(-1, 9) | st.text(max_size=2) | st.lists(st.text(max_size=2), max_size=2)
anything = junk | st.dictionaries(st.sampled_from(["format", "num_bits", "strategy", "weights"]), junk, max_size=2)


@given(
    st.dictionaries(st.sampled_from(sorted(config()["quantization_config"])), anything, max_size=2),
    st.dictionaries(st.sampled_from(["weights", "input_activations", "targets"]), anything, max_size=2),
)
def test_any_fields_are_read_or_refused(fields: dict[str, Any], of_group: dict[str, Any]) -> None:
    found = grouped(**of_group)
    found["quantization_config"] |= fields
    with contextlib.suppress(CheckpointError):
        read_scheme(found)
