"""A model split over ranks: what each has, what is refused, and that all of them together are the model."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from merged_ranks import merge_ranks
from safetensors import safe_open

import arriero
from arriero.engine import build_bundle
from arriero.errors import ExportError, FolderError
from arriero.export import export_checkpoint
from arriero.export.checkpoint import expected_tensors, open_checkpoint
from arriero.export.portions import take
from arriero.export.split import Split, split_model
from arriero.files.folders import read_spec
from arriero.files.output import check_free
from arriero.measuring.summary import summarise

WIDE = {"num_attention_heads": 8, "num_key_value_heads": 4, "num_local_experts": 8}
IDS = [[5, 3, 90, 41, 7, 7, 12, 60, 33, 2, 1, 8, 96, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23]]
LAYOUTS = [(2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]


@pytest.fixture(scope="module")
def scout(make_llama4: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "scout"
    make_llama4(**WIDE).save_pretrained(folder, max_shard_size="200KB")
    return folder


@pytest.fixture(scope="module")
def maverick(
    make_llama4: Callable[..., Any], maverick_like: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "maverick"
    make_llama4(**{**WIDE, **maverick_like, "num_experts_per_tok": 2}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def exported(scout: Path, maverick: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int, int], Path]:
    """Exports a checkpoint in a layout, once each."""
    folder = tmp_path_factory.mktemp("exported")

    def export(kind: str, tp: int, ep: int) -> Path:
        out = folder / f"{kind}-{tp}-{ep}"
        return (
            out if out.exists() else export_checkpoint({"scout": scout, "maverick": maverick}[kind], out, tp=tp, ep=ep)
        )

    return export


def differences(whole: arriero.runtime.Session, merged: arriero.runtime.Session) -> list[float]:
    """The largest differences of logits: of a sequence over a chunk's end, and of steps over ragged caches."""
    found = [np.abs(merged.logits(IDS) - whole.logits(IDS)).max()]
    states = [session.start(batch=2) for session in (whole, merged)]
    prompts = [IDS[0][:14], IDS[0][3:9]]
    steps = [session.prefill(state, prompts) for session, state in zip((whole, merged), states, strict=True)]
    found.append(np.abs(steps[1] - steps[0]).max())
    for tokens in ([7, 8], [9, 10], [11, 12]):
        steps = [session.decode(state, tokens) for session, state in zip((whole, merged), states, strict=True)]
        found.append(np.abs(steps[1] - steps[0]).max())
    return found


@pytest.mark.usefixtures("unheld_graphs")
@pytest.mark.parametrize(("kind", "layouts"), [("scout", [(2, 2), (4, 2)]), ("maverick", [(4, 1), (4, 4)])])
def test_the_ranks_together_give_the_logits_of_the_whole(
    kind: str, layouts: list[tuple[int, int]], exported: Callable[..., Path], tmp_path: Path
) -> None:
    whole = arriero.load(exported(kind, 1, 1))
    for tp, ep in layouts:
        merged = arriero.load(merge_ranks(exported(kind, tp, ep), tmp_path / f"{tp}-{ep}"))
        assert max(differences(whole, merged)) < 1e-5, (tp, ep)


@pytest.mark.usefixtures("unheld_graphs")
def test_the_ranks_graphs_mean_the_same_in_standard_operators(
    scout: Path, exported: Callable[..., Path], tmp_path: Path
) -> None:
    group = exported("scout", 2, 2)
    merged = merge_ranks(group, tmp_path / "merged")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    graph = ort.InferenceSession(str(merged / "decoder.onnx"), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in graph.get_inputs() if value.name.startswith("past.")]
    caches = {name: np.zeros((1, 2, 32, 16), np.float32) for name in names}
    expected = arriero.load(exported("scout", 1, 1)).logits([IDS[0][:14]])
    for start, end in ((0, 12), (12, 13), (13, 14)):
        positions = np.arange(end - start)[None]
        feed = {"input_ids": np.array(IDS)[:, start:end], "logit_positions": positions}
        logits, *present = graph.run(None, {**feed, "past_lengths": np.array([start], np.int32), **caches})
        caches = dict(zip(caches, present, strict=True))
        assert np.abs(logits - expected[:, start:end]).max() < 1e-5


@pytest.fixture(scope="module")
def tied(make_llama4: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint in bf16 whose LM head is the embedding, and its model."""
    folder = tmp_path_factory.mktemp("tied")
    model = make_llama4(**WIDE, num_hidden_layers=1, tie_word_embeddings=True).bfloat16()
    model.save_pretrained(folder / "checkpoint")
    return folder / "checkpoint", export_checkpoint(folder / "checkpoint", folder / "whole")


@pytest.mark.usefixtures("unheld_graphs")
def test_a_split_of_the_experts_alone_is_the_whole_to_the_bit(
    exported: Callable[..., Path], maverick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("arriero.loading.check_decoder", lambda *_: None)  # the merged graph's layers are out of order
    whole = exported("maverick", 1, 1)  # with two experts a token, which may lie on two ranks
    for source in (maverick, whole):
        group = export_checkpoint(source, tmp_path / f"group-of-{source.name}", tp=1, ep=4)
        merged = arriero.load(merge_ranks(group, tmp_path / f"merged-{source.name}"))
        assert max(differences(arriero.load(whole), merged)) == 0
        sums = [node.name for node in onnx.load(group / "rank-3/decoder.onnx", load_external_data=False).graph.node
                if node.op_type == "AllReduce"]  # fmt: skip
        assert sums == [f"layers.{index}/MoeDispatch/AllReduce" for index in (1, 3)]
        assert summarise(group)["ranks"]["sums"] == {"a_step": 2, "bytes_per_token": 2 * 32 * 4, "bytes_per_logits": 0}


def test_a_model_folder_is_split_as_its_checkpoint_is(exported: Callable[..., Path], tmp_path: Path) -> None:
    for kind, tp, ep in (("scout", 2, 2), ("maverick", 4, 1)):
        found = export_checkpoint(exported(kind, 1, 1), tmp_path / kind, tp=tp, ep=ep)
        for rank in range(tp):
            paths = [group / f"rank-{rank}" / "decoder.onnx" for group in (exported(kind, tp, ep), found)]
            assert paths[0].read_bytes() == paths[1].read_bytes()


def test_weights_that_moved_are_a_models_alone(scout: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="a checkpoint's weights lie in its own folder, leave --weights out"):
        export_checkpoint(scout, tmp_path / "out", weights=tmp_path)


def test_a_model_is_not_exported_again_or_converted(exported: Callable[..., Path], tmp_path: Path) -> None:
    whole = exported("scout", 1, 1)
    with pytest.raises(ExportError, match="is exported already: give --tp or --ep"):
        export_checkpoint(whole, tmp_path / "out")
    with pytest.raises(ExportError, match="is exported already: export its checkpoint with --dtype"):
        export_checkpoint(whole, tmp_path / "out", tp=2, dtype="float16")


@pytest.mark.usefixtures("unheld_graphs")
@pytest.mark.parametrize("options", [{}, {"dtype": "float32"}, {"copy_weights": True}], ids=str)
def test_weights_that_are_converted_or_copied_are_split_alike(
    tied: tuple[Path, Path], tmp_path: Path, options: dict[str, Any]
) -> None:
    checkpoint, whole = tied
    group = export_checkpoint(checkpoint, tmp_path / "group", tp=4, ep=2, **options)
    merged = arriero.load(merge_ranks(group, tmp_path / "merged"))
    assert max(differences(arriero.load(whole), merged)) < 1e-5
    for rank in range(4):
        places = {bool(file.path) for file in read_spec(group / f"rank-{rank}").weight_files}
        assert places == ({False} if options else {True, False})


def test_only_scattered_portions_are_copied(exported: Callable[..., Path]) -> None:
    copied = {}
    for kind, tp, ep in (("scout", 2, 2), ("maverick", 4, 1)):
        copied[kind] = {
            re.sub(r".*layers\.\d+\.", "", name)
            for path in exported(kind, tp, ep).glob("rank-*/*.safetensors")
            for name in safe_open(path, "np").keys()  # noqa: SIM118
        }
    assert copied["scout"] == {"self_attn.o_proj.weight", "feed_forward.shared_expert.down_proj.weight"}
    assert copied["maverick"] - copied["scout"] == {
        "feed_forward.down_proj.weight",  # a dense layer's
        "feed_forward.experts.gate_up_proj",
        "feed_forward.experts.down_proj",
    }


@pytest.mark.parametrize(("tp", "ep"), LAYOUTS)
def test_the_portions_hold_each_element_of_a_tensor(maverick: Path, tp: int, ep: int) -> None:
    checkpoint, split = open_checkpoint(maverick), Split(ranks=tp, expert_groups=ep)
    whole_on_each = 0
    for name, shape in expected_tensors(checkpoint.spec).items():
        numbers = np.arange(np.prod(shape)).reshape(shape)
        matrix = numbers.reshape(-1, shape[-1])
        taken = []
        for rank in range(tp):
            portion = split.portion(name, shape, rank)
            pieces = [take(portion, row, matrix[row : row + 5]) for row in range(0, len(matrix), 5)]
            taken.append(np.concatenate(pieces))
            assert np.prod(portion.shape) == taken[-1].size
            region = portion.region(checkpoint.tensors[name].region)
            if region is not None:
                first = (region.offset - checkpoint.tensors[name].region.offset) // 4
                assert np.array_equal(taken[-1].ravel(), np.arange(first, first + region.size // 4))
        counts = np.bincount(np.concatenate([part.ravel() for part in taken]), minlength=numbers.size)
        assert counts.min() == counts.max()
        assert counts.max() in (1, tp)
        whole_on_each += counts.max() > 1
    assert whole_on_each == 1 + 2 * 4 + 2 + 1  # embedding, norms of the layers, routers, last norm


def test_a_rank_has_a_part_of_the_cache_and_its_own_experts(exported: Callable[..., Path]) -> None:
    group = exported("scout", 4, 2)
    for rank in range(4):
        graph = onnx.load(group / f"rank-{rank}" / "decoder.onnx", load_external_data=False).graph
        dims = {value.name: [d.dim_value for d in value.type.tensor_type.shape.dim] for value in graph.input}
        assert dims["past.0.key"][1] == 1
        shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
        assert shapes["model.layers.0.feed_forward.experts.gate_up_proj"] == [4, 32, 48]
        assert shapes["model.layers.0.feed_forward.experts.down_proj"] == [4, 24, 32]
        assert shapes["model.layers.0.feed_forward.router.weight"] == [8, 32]
        dispatch = next(node for node in graph.node if node.op_type == "MoeDispatch")
        first = {attribute.name: attribute.i for attribute in dispatch.attribute}.get("first_expert", 0)
        assert first == (0, 0, 4, 4)[rank]
        sums = sum(node.op_type == "AllReduce" for node in graph.node)
        assert sums == summarise(group)["ranks"]["sums"]["a_step"] == 2 * 4 + 1
        assert len({node.name for node in graph.node}) == len(graph.node)
    assert (read_spec(group).kind, read_spec(group).ranks, read_spec(group).expert_groups) == ("group", 4, 2)


def test_a_rank_is_not_run_alone(exported: Callable[..., Path], tmp_path: Path) -> None:
    group = exported("scout", 2, 2)
    for do in (arriero.load, lambda folder: build_bundle(folder, tmp_path / "bundle")):
        with pytest.raises(FolderError, match=f"is rank 1 of 2, which does not run alone: give .* folder, {group}"):
            do(group / "rank-1")
    with pytest.raises(FolderError, match="is a group: give a model folder that is whole"):
        export_checkpoint(group, tmp_path / "again", tp=2)
    check_free(group, force=True)  # it is a folder of Arriero's, so that it may be replaced


@pytest.mark.parametrize(
    ("overrides", "tp", "ep", "said"),
    [
        ({}, 0, None, "tp is 0, expected a whole number from 1 up"),
        ({}, 2, -1, "ep is -1, expected a whole number from 1 up"),
        ({}, 3, None, "tp is 3, which does not divide the 4 kv heads: choose one of 1, 2, 4"),
        ({}, 8, None, "tp is 8, which does not divide the 4 kv heads: choose one of 1, 2, 4"),
        ({"expert_size": 6}, 4, None, "tp is 4, which does not divide the 6 columns of an expert: choose one of 1, 2"),
        ({"dense_size": 6}, 4, None, "tp is 4, which does not divide the 6 columns of a dense MLP: choose one of 1, 2"),
        ({}, 2, 4, "ep is 4, which does not divide tp (2): choose one of 1, 2 for ep"),
        ({}, 1, 3, "ep is 3, which does not divide the 8 experts: choose one of 1, 2, 4, 8"),
        ({"experts": 6}, 4, None, "ep is 4, as tp, which does not divide the 6 experts: choose one of 1, 2 for ep"),
        ({"experts": 6}, 4, 4, "ep is 4, which does not divide the 6 experts: choose one of 1, 2 for ep"),
    ],
)
def test_a_split_that_does_not_divide_is_one_line(
    maverick: Path, overrides: dict[str, Any], tp: int, ep: int | None, said: str
) -> None:
    spec = dataclasses.replace(open_checkpoint(maverick).spec, **overrides)
    with pytest.raises(ExportError) as error:
        split_model(spec, tp, ep)
    assert said in str(error.value)


def test_a_wrong_split_is_refused_before_anything_is_written(scout: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="tp is 3"):
        export_checkpoint(scout, tmp_path / "out" / "group", tp=3)
    assert not (tmp_path / "out").exists()
