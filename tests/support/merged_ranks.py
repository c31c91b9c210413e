"""The graphs of a split model's ranks joined into one, so that one processor computes what several devices would.

Each `AllReduce` becomes the sum of what the ranks bring. The ranks' caches stand for more layers of a model with
fewer heads, so the merged folder loads as any model does.
"""

import dataclasses
from pathlib import Path

import onnx

from arriero.files.folders import SPEC, carry_files, read_spec
from arriero.files.safetensors import encode_header, identity
from arriero.spec.stored_weights import WeightFile
from arriero.spec.types import CODES, MODEL_TYPES, TYPES

SHARED = ("input_ids", "past_lengths", "logit_positions")


def merge_ranks(group: Path, out: Path) -> Path:
    """Writes a model folder of a group's graphs, with the ranks' weights in one file."""
    spec = read_spec(group)
    folders = [group / f"rank-{rank}" for rank in range(spec.ranks)]
    ranks = [onnx.load(folder / "decoder.onnx", load_external_data=False) for folder in folders]
    for rank, model in enumerate(ranks):
        _rename(model, rank, spec.ranks)
    merged = onnx.ModelProto()
    merged.CopyFrom(ranks[0])
    graph = merged.graph
    del graph.node[:]
    pending = [list(model.graph.node) for model in ranks]
    while any(pending):
        sums = []
        for nodes in pending:
            while nodes and nodes[0].op_type != "AllReduce":
                graph.node.append(nodes.pop(0))
            sums += [nodes.pop(0)] if nodes else []
        assert len(sums) in (0, spec.ranks)
        for node in sums:
            total = sums[0].input[0]
            for rank, each in enumerate(sums[1:], start=1):
                name = node.output[0] if rank == spec.ranks - 1 else f"{node.name}/{rank}"
                graph.node.append(
                    onnx.helper.make_node("Add", [total, each.input[0]], [name], name=f"{node.name}/{rank}")
                )
                total = name
    for model in ranks[1:]:
        graph.input.extend(value for value in model.graph.input if value.name not in SHARED)
        graph.output.extend(list(model.graph.output)[1:])
        graph.initializer.extend(model.graph.initializer)
        merged.functions.extend(model.functions)
    out.mkdir()
    files = {
        file.name: Path(file.path or folder / file.name)
        for folder in folders
        for file in read_spec(folder).weight_files
    }
    weights = _write_weights(merged.graph, files, out / "merged.safetensors")
    onnx.save(merged, out / "decoder.onnx")
    carry_files(group, out)
    geometry = dataclasses.replace(
        spec.model,
        layers=tuple(layer for layer in spec.model.layers for _ in range(spec.ranks)),
        heads=spec.model.heads // spec.parts,
        kv_heads=spec.model.kv_heads // spec.parts,
    )
    record = dataclasses.replace(
        spec, kind="model", model=geometry, graph="decoder.onnx", ranks=1, expert_groups=1, experts_only=False,
        weight_files=(weights,),
    )  # fmt: skip
    (out / SPEC).write_text(record.to_json())
    return out


def _write_weights(graph: onnx.GraphProto, files: dict[str, Path], out: Path) -> WeightFile:
    """Writes the ranks' portions into one file, by their new names, and points the graph there."""
    outside = [tensor for tensor in graph.initializer if tensor.external_data]
    codes = {TYPES[name].onnx: CODES[name] for name in MODEL_TYPES}
    shapes = {}
    for tensor in outside:
        dims = list(tensor.dims)
        if tensor.data_type == TYPES["int4"].onnx:
            dims[-1] //= 2
        shapes[tensor.name] = codes[tensor.data_type], tuple(dims)
    with out.open("wb") as file:
        file.write(encode_header(shapes))
        for tensor in outside:
            about = {entry.key: entry.value for entry in tensor.external_data}
            with files[about["location"]].open("rb") as source:
                source.seek(int(about["offset"]))
                data = source.read(int(about["length"]))
            for entry in tensor.external_data:
                entry.value = {"location": out.name, "offset": str(file.tell())}.get(entry.key, entry.value)
            file.write(data)
    return WeightFile(name=out.name, path="", size=out.stat().st_size, identity=identity(out))


def _rename(model: onnx.ModelProto, rank: int, ranks: int) -> None:
    """Gives every value, node, initializer and function of a rank names of its own; rank 0 has the logits."""

    def new(name: str) -> str:
        kind, _, rest = name.partition(".")
        if kind in ("past", "present") and rest.endswith((".key", ".value")):
            index, _, which = rest.partition(".")
            return f"{kind}.{int(index) * ranks + rank}.{which}"
        return name if not name or name in SHARED or (name == "logits" and not rank) else f"rank-{rank}/{name}"

    graph = model.graph
    for node in graph.node:
        node.name = new(node.name)
        node.input[:] = map(new, node.input)
        node.output[:] = map(new, node.output)
        if node.domain == "arriero":
            node.overload = f"{node.overload}.{rank}"
    for value in [*graph.input, *graph.output, *graph.initializer]:
        value.name = new(value.name)
    for function in model.functions:
        function.overload = f"{function.overload}.{rank}"
    del graph.value_info[:]
