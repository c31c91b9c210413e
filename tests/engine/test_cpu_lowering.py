from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import arriero
from arriero.engine import build_bundle
from arriero.engine.cpu_lowering import lower_for_cpu
from arriero.errors import BuildError, FolderError, SessionError
from arriero.export import export_checkpoint
from arriero.files.folders import read_spec
from arriero.measuring.summary import summarise
from arriero.runtime.backends.onnxruntime_graph import open_graph

RTX = "tensorrt-rtx:sm89"


def test_the_lowered_graph_uses_the_forms_chosen_for_the_cpu(tiny_model: Path) -> None:
    graph = onnx.ModelProto.FromString(lower_for_cpu(tiny_model, read_spec(tiny_model)).graph).graph
    count = Counter((node.domain, node.op_type) for node in graph.node)
    assert count["arriero.cpu", "GroupedQueryAttention"] == 8
    assert count["arriero.cpu", "PlainMoeDispatch"] == 4  # in every second layer
    assert count["arriero.cpu", "PlainLinear"] == 8 * 4 + 8 * 3 + 4 + 1  # attention, MLPs, routers, head
    assert not {"arriero"} & {domain for domain, _ in count}
    assert count["", "Attention"] == count["", "TensorScatter"] == 0


def test_every_weight_of_the_checkpoint_is_supplied_once(tiny: Path, tiny_model: Path) -> None:
    spec = read_spec(tiny_model)
    weights = lower_for_cpu(tiny_model, spec).weights
    regions = sorted((weight.file, weight.offset, size(weight)) for weight in weights)
    covered = Counter[str]()
    for (file, offset, length), following in zip(regions, [*regions[1:], None], strict=True):
        covered[file] += length
        if following is not None and following[0] == file:
            assert offset + length <= following[1]
    data = {path.name: path.stat().st_size for path in tiny.glob("*.safetensors")}
    for file, stored in data.items():
        header = 8 + int.from_bytes((tiny / file).read_bytes()[:8], "little")
        assert covered[file] == stored - header


def size(weight: Any) -> int:
    elements = 1
    for dim in weight.shape:
        elements *= dim
    return elements * (4 if weight.dtype == "float32" else 2)


def test_only_norms_are_widened(tiny_model: Path) -> None:
    weights = lower_for_cpu(tiny_model, read_spec(tiny_model)).weights
    widened = {weight.name for weight in weights if weight.is_converted}
    assert widened == {weight.name for weight in weights if len(weight.shape) == 1}
    assert len(weights) - len(widened) == 8 * 4 + 8 * 3 + 4 + 2 + 4 * 2  # attention, MLPs, routers, both ends, experts


def test_a_head_dim_that_fits_no_vector_is_computed_all_the_same(
    make_llama4: Callable[..., Any], tmp_path: Path
) -> None:
    reference = make_llama4(num_hidden_layers=1, head_dim=12)
    reference.save_pretrained(tmp_path / "checkpoint")
    session = arriero.load(export_checkpoint(tmp_path / "checkpoint", tmp_path / "model"))
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        expected = reference(ids).logits.numpy()
    assert np.abs(session.logits(ids.numpy()) - expected).max() < 1e-5


@pytest.mark.parametrize(("kv_cache", "far"), [("int8", 0.05), ("int4", 0.6)])
def test_caches_of_groups_are_smaller_and_near(tiny_model: Path, tmp_path: Path, kv_cache: Any, far: float) -> None:
    bundle = build_bundle(tiny_model, tmp_path / "bundle", kv_cache=kv_cache)
    session, exact = arriero.load(bundle, max_seq=300), arriero.load(tiny_model, max_seq=300)
    ids = np.array([exact.text.encode("The list type is a mutable sequence. " * 20)[:200]])
    whole = session.logits(ids)
    assert 1e-4 < np.sqrt(np.mean((whole - exact.logits(ids)) ** 2)) < far
    state = session.start(1, 300)
    session.prefill(state, [ids[0, :150].tolist()])
    steps = [session.decode(state, [token])[0] for token in ids[0, 150:].tolist()]
    assert np.abs(np.array(steps) - whole[0, 150:]).max() < 0.05
    told = [summarise(folder)["kv_cache"]["bytes_per_token"] for folder in (bundle, tiny_model)]
    assert told[0] == sum(buffer[0, :, 0].nbytes for buffer in session.start(1, 1).caches.buffers.values())
    assert told[0] < told[1]


@pytest.mark.parametrize(
    ("target", "kv_cache", "said"), [("cpu", "int3", "expected int8 or int4"), (RTX, "int8", "cpu")]
)
def test_a_cache_that_cannot_be_is_refused(
    tiny_model: Path, tmp_path: Path, target: str, kv_cache: Any, said: str
) -> None:
    with pytest.raises(BuildError, match=said):
        build_bundle(tiny_model, tmp_path / "bundle", target=target, kv_cache=kv_cache)
    assert not list(tmp_path.iterdir())


def test_kernels_that_were_not_compiled_are_missed_by_name(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("arriero.plugins.cpu.library.EXTENSION_SUFFIXES", [".nowhere"])
    with pytest.raises(SessionError, match=r"were not compiled: install a C\+\+ compiler"):
        arriero.load(tiny_model)


def test_a_damaged_or_missing_graph_is_named(checkpoint: Path, tmp_path: Path) -> None:
    model = export_checkpoint(checkpoint, tmp_path / "model")
    graph = (model / "decoder.onnx").read_bytes()
    (model / "decoder.onnx").write_bytes(graph[:-7])
    with pytest.raises(BuildError, match="damaged graph"):
        arriero.load(model)
    (model / "decoder.onnx").unlink()
    with pytest.raises(BuildError, match=r"decoder\.onnx: No such file or directory: export the model again"):
        arriero.load(model)


def test_an_op_without_a_lowering_is_named(checkpoint: Path, tmp_path: Path) -> None:
    model = export_checkpoint(checkpoint, tmp_path / "model")
    proto = onnx.load(model / "decoder.onnx", load_external_data=False)
    node = next(node for node in proto.graph.node if node.op_type == "MoeDispatch")
    node.op_type = "MoeTeleport"
    onnx.save(proto, model / "decoder.onnx")
    with pytest.raises(BuildError, match=r"layers\.0/MoeDispatch: arriero\.MoeTeleport has no lowering for the CPU"):
        arriero.load(model)


def test_a_damaged_bundle_is_named(checkpoint: Path, tmp_path: Path) -> None:
    bundle = build_bundle(export_checkpoint(checkpoint, tmp_path / "model"), tmp_path / "bundle")
    with pytest.raises(FolderError, match="is built already: give the model it was built of"):
        build_bundle(bundle, tmp_path / "again")
    (bundle / "decoder.onnx").write_bytes(b"no graph")
    with pytest.raises(FolderError, match="the graph's file is damaged"):
        arriero.load(bundle)
    (bundle / "decoder.onnx").unlink()
    with pytest.raises(FolderError, match="build the bundle again"):
        arriero.load(bundle)


def test_a_bundle_of_a_self_contained_model_stands_alone(checkpoint: Path, tmp_path: Path) -> None:
    model = export_checkpoint(checkpoint, tmp_path / "model", copy_weights=True)
    bundle = build_bundle(model, tmp_path / "bundle").rename(tmp_path / "moved")
    expected = arriero.load(model).logits([[5, 6, 7]])
    for folder in (model, checkpoint):
        folder.rename(folder.with_name(f"{folder.name}-gone"))
    assert (arriero.load(bundle).logits([[5, 6, 7]]) == expected).all()


def test_kernels_of_another_version_are_told_from_a_graph_that_is_wrong(tiny_model: Path) -> None:
    graph = lower_for_cpu(tiny_model, read_spec(tiny_model)).graph.replace(
        b"GroupedQueryAttention", b"GroupedQueryAttentive"
    )
    with pytest.raises(SessionError, match=r"kernels are of another version .*: install a C\+\+ compiler"):
        open_graph(graph, {}, tiny_model, {})
