"""Checkpoints in the forms that other tools write: each gives the logits that `transformers` has for it."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Llama4ForCausalLM

import arriero
from arriero.accuracy import check
from arriero.calibration import calibrate_model
from arriero.engine import build_bundle
from arriero.errors import CheckpointError, ExportError
from arriero.export import export_checkpoint
from arriero.export.checkpoint import open_checkpoint

Tensors = dict[str, torch.Tensor]
IDS = np.arange(40).reshape(2, 20) * 7 % 97
NORM, Q = "model.norm.weight", "model.layers.1.self_attn.q_proj.weight"


def rewrite(folder: Path, change: Callable[[Tensors], object], **config: Any) -> Path:
    """Changes the tensors of a checkpoint of one file, and fields of its configuration."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


def unstack(tensors: Tensors, *, layers: tuple[str, ...] = ("",)) -> None:
    """Stores experts one by one in the layers whose names hold one of those texts."""
    for name in [name for name in tensors if name.endswith("experts.gate_up_proj") and any(x in name for x in layers)]:
        unit = name.removesuffix(".gate_up_proj")
        gate, up = tensors.pop(name).transpose(1, 2).chunk(2, dim=1)
        down = tensors.pop(f"{unit}.down_proj").transpose(1, 2)
        for part, weights in (("gate", gate), ("up", up), ("down", down)):
            for index, weight in enumerate(weights):
                tensors[f"{unit}.{index}.{part}_proj.weight"] = weight.clone()


@torch.no_grad()
def oracle(folder: Path) -> np.ndarray:
    """The logits of `transformers` in float32, its weights in the type that it loads a checkpoint in."""
    model = Llama4ForCausalLM.from_pretrained(folder, dtype="auto").eval().float()
    return model(torch.from_numpy(IDS)).logits.numpy()


def ours(model: Path) -> np.ndarray:
    return arriero.load(model).logits(IDS)


@pytest.fixture
def single(make_llama4: Callable[..., Any], tmp_path: Path) -> Path:
    """A checkpoint of one file."""
    make_llama4(num_hidden_layers=2).save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_experts_one_by_one_go_through_every_verb(single: Path, tmp_path: Path) -> None:
    expected, text = oracle(single), tmp_path / "ids"
    rewrite(single, unstack)
    said: list[str] = []
    model = export_checkpoint(single, tmp_path / "model", notice=said.append)
    said = [line for line in said if "no tokenizer.json" not in line]
    assert said == ["The experts are stored one by one: 0.1 MB of them are written stacked, beside the graph."]
    assert sorted(path.name for path in model.glob("*.safetensors")) == [
        "experts-00000.safetensors",
        "experts-00001.safetensors",
    ]
    assert np.abs(ours(model) - expected).max() < 1e-4
    assert not text.exists()
    quantised = calibrate_model(model, tmp_path / "int8", recipe="int8", data=IDS, floor=0)
    bundle = build_bundle(quantised, tmp_path / "bundle")
    assert np.array_equal(ours(bundle), ours(quantised))
    assert np.abs(ours(bundle) - expected).max() < 0.2 * np.abs(expected).max()
    moved = single.rename(tmp_path / "moved")  # the stacks stay with the graph
    assert np.abs(arriero.load(model, weights=moved).logits(IDS) - expected).max() < 1e-4


def test_a_checkpoint_of_single_experts_is_checked_as_it_lies(
    tiny: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("*.py", "model*"))
    tensors = {name: x for path in sorted(tiny.glob("model*.safetensors")) for name, x in load_file(path).items()}
    unstack(tensors)
    save_file({name: x.contiguous() for name, x in tensors.items()}, folder / "model.safetensors")
    model = export_checkpoint(folder, tmp_path / "model")
    assert check(model, folder, data=[texts[0]], samples=2).metrics["kl"].value < 1e-6


def test_layers_may_differ_in_how_experts_are_stored(single: Path, tmp_path: Path) -> None:
    expected = oracle(single)
    rewrite(single, lambda tensors: unstack(tensors, layers=("layers.1.",)))
    said: list[str] = []
    model = export_checkpoint(single, tmp_path / "model", notice=said.append)
    assert [path.name for path in model.glob("*.safetensors")] == ["experts-00001.safetensors"]
    assert np.abs(ours(model) - expected).max() < 1e-4


def test_single_experts_of_a_multimodal_checkpoint_are_split_and_converted(
    make_multimodal: Callable[..., Any], tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint"
    make_multimodal(num_hidden_layers=2, vision={"num_hidden_layers": 1}).save_pretrained(folder)
    stacked = load_file(folder / "model.safetensors")
    whole = export_checkpoint(folder, tmp_path / "stacked", dtype="bfloat16")
    ranks = export_checkpoint(folder, tmp_path / "stacked-ranks", tp=2)
    rewrite(folder, unstack)
    assert np.array_equal(ours(export_checkpoint(folder, tmp_path / "model", dtype="bfloat16")), ours(whole))
    copied = export_checkpoint(folder, tmp_path / "copied", copy_weights=True)
    found = export_checkpoint(folder, tmp_path / "ranks", tp=2)
    assert sorted(path.name for path in found.iterdir()) == ["rank-0", "rank-1", "spec.json"]
    for rank in ("rank-0", "rank-1"):
        tensors = [
            {name: x for path in sorted((each / rank).glob("*.safetensors")) for name, x in load_file(path).items()}
            for each in (ranks, found)
        ]
        same = tensors[0].keys() & tensors[1].keys()
        assert same
        assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in same)
        stacks = {name: x for name, x in tensors[1].items() if ".experts." in name}
        assert len(stacks) == 4  # of stacked experts a rank reads its own in place
        for name, stack_EXX in stacks.items():
            (stored,) = (x for other, x in stacked.items() if other.endswith(name.partition("layers.")[2]))
            assert torch.equal(stack_EXX, stored.chunk(2)[int(rank[-1])])
    shutil.rmtree(folder)
    assert ours(copied).shape == (2, 20, 97)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda t: t.pop("model.layers.0.feed_forward.experts.2.up_proj.weight"),
            "experts.2.up_proj.weight' is missing",
        ),
        (
            lambda t: t.pop("model.layers.0.feed_forward.experts.0.gate_proj.weight"),
            "experts.0.gate_proj.weight' is mis",
        ),
        (
            lambda t: t.update({"model.layers.0.feed_forward.experts.4.up_proj.weight": torch.zeros(48, 32)}),
            "unexpected tensor 'model.layers.0.feed_forward.experts.4.up_proj.weight'",
        ),
        (
            lambda t: t.update({"model.layers.0.feed_forward.experts.3.down_proj.weight": torch.zeros(48, 32)}),
            r"has shape \[48, 32\], config.json makes it \[32, 48\]",
        ),
        (
            lambda t: t.update({"model.layers.0.feed_forward.experts.down_proj": torch.zeros(4, 48, 32)}),
            "hold the same experts: remove one of the two",
        ),
        (
            lambda t: t.update({"model.layers.0.feed_forward.experts.3.down_proj.weight": torch.zeros(32, 48).char()}),
            "is I8, expected a float",
        ),
    ],
)
def test_single_experts_that_do_not_fit_are_named(single: Path, change: Callable[[Tensors], Any], said: str) -> None:
    rewrite(single, unstack)
    rewrite(single, change)
    with pytest.raises(CheckpointError, match=said):
        open_checkpoint(single)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("stored", [True, False])
def test_a_stored_head_counts_whatever_the_configuration_says(
    single: Path, tmp_path: Path, *, tied: bool, stored: bool
) -> None:
    rewrite(single, lambda t: None if stored else t.pop("lm_head.weight"), tie_word_embeddings=tied)
    if not tied and not stored:
        with pytest.raises(
            CheckpointError, match=r"'lm_head.weight' is missing: .* set tie_word_embeddings to true in"
        ):
            open_checkpoint(single)
        rewrite(single, lambda t: None, tie_word_embeddings=True)  # as the message says
    model = export_checkpoint(single, tmp_path / "model")
    assert np.abs(ours(model) - oracle(single)).max() < 1e-4


def test_of_a_tensor_in_two_shards_the_index_decides(checkpoint: Path, tmp_path: Path) -> None:
    expected = oracle(checkpoint)
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
    files = sorted(set(index.values()))
    for number, file in enumerate(files):
        tensors = load_file(checkpoint / file)
        others = [name for name, home in index.items() if home == files[number - 1]]
        tensors |= {name: torch.full((3, 5) if at % 2 else (2,), float("nan")) for at, name in enumerate(others)}
        save_file(tensors, checkpoint / file)
    save_file({NORM: torch.zeros(7)}, checkpoint / "model-99999-of-99999.safetensors")  # that no index lists
    for name, options in (("model", {}), ("copied", {"copy_weights": True})):
        model = export_checkpoint(checkpoint, tmp_path / name, **options)
        assert np.abs(ours(model) - expected).max() < 1e-4
    quantised = calibrate_model(model, tmp_path / "int8", recipe="int8", data=IDS, floor=0)
    assert np.isfinite(ours(quantised)).all()


def mixed() -> Iterator[tuple[str, str | None, Callable[[str, torch.Tensor], torch.Tensor]]]:
    """Mixtures of types: the configuration's, and the type of each tensor."""

    def is_small(name: str) -> bool:
        return "norm" in name or "router" in name

    yield "norms and routers", "bfloat16", lambda name, x: x if is_small(name) else x.bfloat16()
    yield "half in bfloat16", "bfloat16", lambda name, x: x.half() if "o_proj" in name else x.bfloat16()
    yield "whole shard", "float32", lambda name, x: x.bfloat16()
    yield "no type named", None, lambda name, x: x if is_small(name) else x.bfloat16()
    yield "the first is float32", None, lambda name, x: x if name == "lm_head.weight" else x.bfloat16()


@pytest.mark.parametrize(("title", "dtype", "cast"), mixed(), ids=[title for title, *_ in mixed()])
def test_mixed_types_become_the_type_that_transformers_loads(
    single: Path, tmp_path: Path, title: str, dtype: str | None, cast: Callable[[str, torch.Tensor], torch.Tensor]
) -> None:
    rewrite(single, lambda t: t.update({name: cast(name, x) for name, x in t.items()}), dtype=dtype)
    said: list[str] = []
    model = export_checkpoint(single, tmp_path / "model", notice=said.append)
    spec = json.loads((model / "spec.json").read_text())
    assert spec["model"]["dtype"] == str(Llama4ForCausalLM.from_pretrained(single, dtype="auto").dtype)[6:]
    said = [line for line in said if "no tokenizer.json" not in line]
    assert len(said) == 1
    assert "of the tensors are not" in said[0]
    if title != "whole shard":
        assert {bool(file["path"]) for file in spec["weight_files"]} == {True, False}  # the others stay in place
    assert np.abs(ours(model) - oracle(single)).max() < 1e-4
    copied = export_checkpoint(single, tmp_path / "copied", copy_weights=True)
    shutil.rmtree(single)
    assert np.array_equal(ours(copied), arriero.load(copied).logits(IDS))
    assert np.array_equal(ours(copied), ours(copied))


def test_a_mixed_checkpoint_is_calibrated_and_checked(single: Path, tmp_path: Path) -> None:
    rewrite(single, lambda t: t.update({n: x if "norm" in n else x.bfloat16() for n, x in t.items()}), dtype="bfloat16")
    expected = oracle(single)
    model = export_checkpoint(single, tmp_path / "model")
    quantised = calibrate_model(model, tmp_path / "int8", recipe="int8", data=IDS, floor=0)
    assert np.abs(ours(quantised) - expected).max() < 0.2 * np.abs(expected).max()
    ranks = export_checkpoint(single, tmp_path / "ranks", tp=2)
    assert {str(x.dtype) for x in load_file(next((ranks / "rank-0").glob("*.safetensors"))).values()} == {
        "torch.bfloat16"
    }


def test_a_value_that_does_not_fit_names_a_type_that_takes_it(single: Path, tmp_path: Path) -> None:
    rewrite(single, lambda t: t[NORM].fill_(1e6), dtype="float16")
    with pytest.raises(ExportError, match=r"holds 1000000.0, which does not fit float16: export with --dtype bfloat16"):
        export_checkpoint(single, tmp_path / "model")
    assert ours(export_checkpoint(single, tmp_path / "model", dtype="bfloat16")).shape == (2, 20, 97)


def test_what_is_written_anew_is_checked(single: Path, tmp_path: Path) -> None:
    rewrite(single, lambda t: t[Q].view(-1)[5:6].fill_(float("nan")))
    with pytest.raises(ExportError, match=f"tensor '{Q}' holds NaN or infinity"):
        export_checkpoint(single, tmp_path / "model", dtype="bfloat16")
