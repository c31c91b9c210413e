"""EAGLE-3 heads in both published forms: exported they compute what `transformers`' parts of Llama compute."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from eagle_reference import Reference, head_config, write_head
from transformers import Llama4ForCausalLM

import arriero
from arriero.errors import CheckpointError, ExportError, FolderError
from arriero.export import export_checkpoint
from arriero.export.draft_config import draft_spec
from arriero.export.draft_head import open_head
from arriero.files.folders import read_spec
from arriero.loading import cpu_draft_graph
from arriero.spec.draft import DRAFT_TOKENS

VOCABULARY, STATES = 97, [1, 2, 4]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FORMS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "speculators": ({}, {}, {}),
    "eagle": ({}, {}, {"form": "eagle", "has_embedding": False}),
    "fewer tokens": ({}, {"vocabulary": 40}, {"tokens": sorted({*range(1, 80, 2)})}),
    "two layers": ({"num_hidden_layers": 2, "rope_parameters": LLAMA3}, {"norm_output": True}, {}),
    "norms": ({"num_key_value_heads": 4}, {"norm": "each", "norm_before_residual": True}, {"form": "eagle"}),
    "norm of all": ({"hidden_size": 48, "head_dim": 8}, {"norm": "whole"}, {}),
}


@pytest.fixture(scope="module")
def base(make_llama4: Callable[..., Llama4ForCausalLM], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "checkpoint"
    make_llama4(seed=3).save_pretrained(folder)
    return folder


def made(seed: int, config: dict[str, Any], head: dict[str, Any]) -> Reference:
    """A random head for the small Llama 4 of the tests."""
    torch.manual_seed(seed)
    given = {"vocabulary": VOCABULARY, **head}
    return Reference(head_config(VOCABULARY, **config), 32, len(STATES), **given).eval()


@pytest.mark.parametrize("form", FORMS)
def test_a_head_computes_what_transformers_computes(form: str, base: Path, tmp_path: Path) -> None:
    config, head, written = FORMS[form]
    reference = made(1, config, head)
    if not written.get("has_embedding", True):
        model = Llama4ForCausalLM.from_pretrained(base)
        reference.embed_tokens.weight.data = model.model.embed_tokens.weight.data
    folder = write_head(reference, tmp_path / "head", STATES, **written)
    session = arriero.load(export_checkpoint(base, tmp_path / "model", draft=folder), max_seq=64)
    assert session.draft is not None
    rng = np.random.default_rng(0)
    ids, further = rng.integers(3, VOCABULARY, 9).tolist(), rng.integers(3, VOCABULARY, 4).tolist()
    states_SW = torch.randn(9, 96)
    expected = reference.chain(ids, states_SW, further)
    draft = session.draft.backend
    caches = draft.caches(2, 32)
    binding, past_B = draft.bind(caches, slice(0, 2)), np.array([0, 0], np.int32)
    ids_BS, states_BSW = np.zeros((2, 12), np.int64), np.zeros((2, 12, 96), np.float32)
    ids_BS[0, :9], states_BSW[0, :9] = ids, states_SW.numpy()
    ids_BS[1, :5], states_BSW[1, :5] = ids[:5], states_SW[:5].numpy()  # a shorter row beside it, padded
    logits_BV, hidden_BH = draft.bind(caches, slice(0, 2)).begin(ids_BS, past_B, np.array([8, 4]), states_BSW)
    found, past_B = [logits_BV[0]], np.array([9, 5], np.int32)
    for token in further:
        logits_BV, hidden_BH = binding.go_on(np.array([token, 7]), past_B, hidden_BH)
        found, past_B = [*found, logits_BV[0].copy()], past_B + 1
    np.testing.assert_allclose(np.stack(found), expected.numpy(), atol=1e-5)
    shorter = reference.chain(ids[:5], states_SW[:5], [7] * 4)
    np.testing.assert_allclose(logits_BV[1], shorter[-1].numpy(), atol=1e-5)


def test_the_decoder_gives_the_states_that_the_head_names(base: Path, tmp_path: Path) -> None:
    folder = write_head(made(1, {}, {}), tmp_path / "head", STATES)
    session = arriero.load(export_checkpoint(base, tmp_path / "model", draft=folder), max_seq=64)
    ids = torch.randint(3, VOCABULARY, (1, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model = Llama4ForCausalLM.from_pretrained(base)
        passed: list[Any] = [model.model.embed_tokens(ids)]
        for layer in model.model.layers:
            layer.register_forward_hook(lambda module, given, found: passed.append(found))
        model(ids)
    state = session.start(1, 32, drafted=True)
    binding: Any = state.binding(slice(0, 1))
    positions = np.arange(11)[None]
    _, states_BSW = binding.step_with_states(ids.numpy(), np.array([0], np.int32), positions)
    expected = torch.cat([each[0] if isinstance(each, tuple) else each for each in (passed[n] for n in STATES)], -1)
    np.testing.assert_allclose(states_BSW, expected.numpy(), atol=2e-5)


def test_both_forms_name_the_same_states(base: Path, tmp_path: Path) -> None:
    head = made(1, {}, {})
    ours = write_head(head, tmp_path / "a", STATES)
    theirs = write_head(head, tmp_path / "b", STATES, form="eagle")
    specs = [
        read_spec(export_checkpoint(base, tmp_path / f"m{n}", draft=each)) for n, each in enumerate((ours, theirs))
    ]
    assert specs[0].draft is not None
    assert specs[0].draft.spec.states == tuple(STATES)
    assert specs[0].draft == specs[1].draft


def test_a_folder_that_stands_alone_has_the_head_in_it(base: Path, tmp_path: Path) -> None:
    folder = write_head(made(1, {}, {"vocabulary": 40}), tmp_path / "head", STATES, tokens=list(range(40)))
    model = export_checkpoint(base, tmp_path / "model", draft=folder, copy_weights=True)
    onnx.checker.check_model(str(model / "draft.onnx"), full_check=False)
    assert {file.path for file in read_spec(model).weight_files} == {""}
    assert {"draft-model.safetensors", DRAFT_TOKENS, "draft.onnx"} <= {path.name for path in model.iterdir()}


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"speculators_model_type": "dflash"}, "speculators_model_type is 'dflash', expected 'eagle3'"),
    ({"speculators_model_type": None, "architectures": ["EagleLlama"]}, r"architectures is \['EagleLlama'\], expected"),
    ({"new_field": 1}, "'new_field' is a field of a draft that is not known"),
    ({"fc_norm": True, "norm_before_fc": True}, "fc_norm is True, expected false beside norm_before_fc"),
    ({"fc_norm": True}, r"tensor 'fc_norm.0.weight' is missing"),
    ({"eagle_aux_hidden_state_layer_ids": [1, 2]}, r"tensor 'fc.weight' has shape \[32, 96\]"),
    ({"eagle_aux_hidden_state_layer_ids": [1, 2, 5]}, "behind layer 5 of 4"),
    ({"eagle_aux_hidden_state_layer_ids": [1, 2, 2]}, "the draft's states are"),
    ({"draft_vocab_size": 98}, "guesses 98 tokens, the model has 97"),
    ({"draft_vocab_size": 40}, r"tensor 'lm_head.weight' has shape \[97, 32\]"),
    ({"transformer_layer_config": []}, r"transformer_layer_config is \[\], expected an object"),
    ({"target_hidden_size": 64}, "target_hidden_size is 64, expected 32"),
]


@pytest.mark.parametrize(("changes", "said"), REFUSED)
def test_other_heads_are_refused_by_what_is_wrong(
    changes: dict[str, Any], said: str, base: Path, tmp_path: Path
) -> None:
    folder = write_head(made(1, {}, {}), tmp_path / "head", STATES, changes=changes)
    with pytest.raises(CheckpointError, match=said) as caught:
        export_checkpoint(base, tmp_path / "model", draft=folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


OF_LAYERS: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "qwen3"}, "transformer_layer_config.model_type is 'qwen3', expected 'llama'"),
    ({"attention_bias": True}, "transformer_layer_config.attention_bias is True, expected False"),
    ({"sliding_window": 128}, "transformer_layer_config.sliding_window is 128, expected None"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
    ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters is .* expected of type 'default' or 'llama3'"),
    ({"rope_scaling": 8}, "rope_scaling is 8, expected"),
    ({"layer_types": 8}, "layer_types is 8, expected 'full_attention' alone"),
    ({"mystery": 1}, "'mystery' is a field of a draft that is not known"),
]


@pytest.mark.parametrize(("changes", "said"), OF_LAYERS)
def test_layers_of_other_kinds_are_refused_by_name(
    changes: dict[str, Any], said: str, base: Path, tmp_path: Path
) -> None:
    folder = write_head(made(1, {}, {}), tmp_path / "head", STATES)
    config = json.loads((folder / "config.json").read_text())
    config["transformer_layer_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=said):
        export_checkpoint(base, tmp_path / "model", draft=folder)


EAGLE: list[tuple[dict[str, Any], str]] = [
    ({"use_aux_hidden_state": False}, "eagle_config.use_aux_hidden_state is False, expected True"),
    ({"use_mtp_layernorm": True}, "eagle_config.use_mtp_layernorm is True, expected False"),
    ({"parallel_draft_step": 4}, "eagle_config.parallel_draft_step is 4"),
    ({"other": 4}, "eagle_config.'other' is a field of a draft that is not known"),
]


@pytest.mark.parametrize(("inner", "said"), EAGLE)
def test_nvidias_fields_are_refused_where_they_change_a_head(
    inner: dict[str, Any], said: str, base: Path, tmp_path: Path
) -> None:
    changes = {"eagle_config": inner}
    folder = write_head(made(1, {}, {}), tmp_path / "head", STATES, form="eagle", changes=changes)
    with pytest.raises(CheckpointError, match=said):
        open_head(folder, read_spec(export_checkpoint(base, tmp_path / "model")).model)


def test_a_head_that_names_no_states_reads_the_usual_ones(base: Path, tmp_path: Path) -> None:
    model = read_spec(export_checkpoint(base, tmp_path / "model")).model
    config = {"architectures": ["LlamaForCausalLMEagle3"], "hidden_size": 32, "num_attention_heads": 4}
    longer = arriero.spec.ModelSpec.from_fields(json.loads(json.dumps(_fields(model, 12))))
    assert draft_spec(config, longer, "bfloat16").states == (2, 6, 9)


def _fields(model: Any, layers: int) -> dict[str, Any]:
    """The fields of a geometry with so many layers."""
    import dataclasses

    fields = dataclasses.asdict(model)
    return {**fields, "layers": [fields["layers"][0]] * layers}


@pytest.mark.parametrize("tokens", [[*range(39), 97], [*range(39), 5], [*range(39), -1]])
def test_tables_that_name_no_tokens_of_the_model_are_refused(tokens: list[int], base: Path, tmp_path: Path) -> None:
    head = made(1, {}, {"vocabulary": 40})
    folder = write_head(head, tmp_path / "head", STATES, tokens=list(range(40)))
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["d2t"] = torch.tensor(tokens) - torch.arange(40)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="tensor 'd2t' names no 40 tokens of the model"):
        export_checkpoint(base, tmp_path / "model", draft=folder)


def test_ranks_take_no_draft(base: Path, tmp_path: Path) -> None:
    folder = write_head(made(1, {}, {}), tmp_path / "head", STATES)
    with pytest.raises(ExportError, match="takes no draft: leave --draft out"):
        export_checkpoint(base, tmp_path / "model", draft=folder, tp=2)
    model = export_checkpoint(base, tmp_path / "model", draft=folder)
    with pytest.raises(ExportError, match="has a draft, which ranks do not run: export its checkpoint without --draft"):
        export_checkpoint(model, tmp_path / "group", tp=2)
    assert not (tmp_path / "group").exists()


HOSTILE: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda draft: draft.update(format="int8"), "no weight is int8, as spec.json's draft is"),
    (lambda draft: draft.update(graph="../decoder.onnx"), "expected a plain file name"),
    (lambda draft: draft.update(session={"session.optimized_model_filepath": "/x"}), "which no graph needs"),
    (lambda draft: draft["spec"].update(states=[1, 2, 9]), "states behind layer 9 of 4"),
    (lambda draft: draft["spec"].update(states=[]), "the draft's states are"),
    (lambda draft: draft["spec"].update(states=[1, 2]), "draft_states of .*96.*, expected 64 each"),
    (lambda draft: draft["spec"].update(vocab_size=96), r"draft.* expected 96 each"),
    (lambda draft: draft["spec"].update(vocab_size=98), "guesses 98 tokens, the model has 97"),
    (lambda draft: draft["spec"].update(hidden_size=48), "expected 48 each"),
    (lambda draft: draft["spec"].update(heads=8), "layer 0 has heads 4, spec.json 8"),
    (lambda draft: draft["spec"].update(kv_heads=1), "expected 1 heads of 16"),
    (lambda draft: draft["spec"].update(layers=2), "1 layers of caches, spec.json has 2"),
    (lambda draft: draft["spec"].update(layers=0), "layers is 0, expected 1 to"),
    (lambda draft: draft["spec"].update(unknown=0), "unknown field 'unknown' in DraftSpec"),
]


@pytest.mark.parametrize(("change", "said"), HOSTILE)
def test_folders_whose_spec_says_another_draft_are_refused(
    change: Callable[[dict[str, Any]], object], said: str, base: Path, tmp_path: Path
) -> None:
    folder = write_head(made(1, {}, {}), tmp_path / "head", STATES)
    model = export_checkpoint(base, tmp_path / "model", draft=folder)
    fields = json.loads((model / "spec.json").read_text())
    change(fields["draft"])
    (model / "spec.json").write_text(json.dumps(fields))
    with pytest.raises(FolderError, match=said):
        arriero.load(model)


def test_a_damaged_table_of_tokens_is_refused(base: Path, tmp_path: Path) -> None:
    head = write_head(made(1, {}, {"vocabulary": 40}), tmp_path / "head", STATES, tokens=list(range(40)))
    model = export_checkpoint(base, tmp_path / "model", draft=head)
    path = model / DRAFT_TOKENS
    good = path.read_bytes()
    for content, said in (
        (good[:-8] + (97).to_bytes(8, "little"), "names the token 97 of 97"),
        (good[:-8] + (3).to_bytes(8, "little"), "names a token twice"),
        (good[:-8], "truncated"),
        (good.replace(b'"tokens"', b'"others"'), "does not hold 40 tokens"),
    ):
        path.write_bytes(content)
        with pytest.raises(FolderError, match=said):
            arriero.load(model)
    path.unlink()
    with pytest.raises(FolderError, match="No such file"):
        arriero.load(model)


def test_a_draft_reads_the_embedding_where_the_checkpoint_has_it(base: Path, tmp_path: Path) -> None:
    reference = made(1, {}, {})
    folder = write_head(reference, tmp_path / "head", STATES, has_embedding=False)
    model = export_checkpoint(base, tmp_path / "model", draft=folder)
    spec = read_spec(model)
    assert spec.draft is not None
    _, weights, _ = cpu_draft_graph(model, spec, spec.draft)
    files = {weight.name.partition(":")[0]: weight.file for weight in weights}
    assert files.pop("model.embed_tokens.weight") == "model.safetensors"
    assert set(files.values()) == {"draft-model.safetensors"}
