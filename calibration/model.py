"""A model folder quantised: text in, another model folder out.

Layer by layer: the text's hidden states go through the unquantised layer, the quantised layer is written, both are let
go. Peak memory is one expert, one layer's quantised weights and what the system keeps of the hidden states, which lie
in mapped files; it does not grow with depth. A run that was killed goes on at the layer it had reached.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from .. import __version__
from ..errors import CalibrationError, FolderError
from ..export.choice import choose, units
from ..export.llama4 import rms_norm
from ..export.quantised import quantise_graph
from ..export.walk import TOKENS, Hidden, Weights, embed
from ..export.windows import read_windows
from ..folder import SPEC, carry_files, check_apart, check_free, find_files, read_spec, resumed_folder
from ..geometry import ModelSpec
from ..shards import identity, open_shard
from ..spec import FolderSpec, Recipe, WeightFile
from .layer import FLOOR, LayerQuantiser, Limits, emit_product
from .product import Input, Record, quantise_product
from .recipe import check_recipe, parse_recipe
from .report import LayerReport, Report, write_report
from .shard import write_shard
from .statistics import Statistics

Progress = Callable[[str, int, int], None]
"""Told the phase, the tokens done (each once a layer), and the tokens in all."""

PROGRESS = "progress.json"


def calibrate_model(
    model: str | Path,
    out: str | Path,
    *,
    recipe: Recipe | str,
    data: Sequence[str | Path] | NDArray[np.int64],
    samples: int = 128,
    window: int | None = None,
    floor: int = FLOOR,
    all_experts: bool = False,
    weights: str | Path | None = None,
    force: bool = False,
    progress: Progress = lambda phase, done, total: None,
    notice: Callable[[str], None] = lambda line: None,
) -> Path:
    """Quantises a model.

    Args:
        model: A model folder that is not quantised; only read.
        out: The model folder to write.
        recipe: A recipe, or the name of a preset: `int8`, `fp8` or `int4`.
        data: Text files, or token ids [W, S].
        samples: Windows of text at most.
        window: Tokens of a window; None is a chunk and a quarter of the model's attention.
        floor: Tokens that every expert must have seen.
        all_experts: Whether every expert is measured over every token.
        weights: Folder of the weight files, where they have moved.
        force: Whether an existing model folder at `out` is replaced.
        progress: Told how far the work is.
        notice: Told what a person should know, a line each.

    Returns:
        The model folder.

    Raises:
        CalibrationError: The recipe does not fit, an expert starves, or an activation is not finite.
        DataError: The text cannot be read, or is too little.
        FolderError: `model` is no model folder, or `out` exists or cannot be written.
    """
    source, target = Path(model).absolute(), Path(out).absolute()
    spec = read_spec(source)
    if spec.kind != "model":
        raise FolderError(f"{source} is a {spec.kind}: give the model folder it was built from")
    if spec.recipe is not None:
        raise CalibrationError(f"{source} is quantised already ({spec.recipe.format}): give the model it came from")
    if isinstance(recipe, str):
        recipe = parse_recipe(recipe, {}, ())
    check_recipe(recipe, spec.model)
    check_apart(source, target)
    check_free(target, force=force)
    files = find_files(source, spec.weight_files, None if weights is None else Path(weights))
    ids_WS = data if isinstance(data, np.ndarray) else read_windows(source, data, spec.model, samples, window).ids_WS
    limits = Limits(floor=floor, all_experts=all_experts)
    job = _job(spec, recipe, limits, ids_WS)
    with resumed_folder(target, job, force=force) as (folder, scratch):
        work = _Work(spec.model, recipe, limits, Weights(files), ids_WS, folder, scratch)
        report = work.run(progress, notice)
        _finish(source, spec, recipe, folder, report)
    return target


def _job(spec: FolderSpec, recipe: Recipe, limits: Limits, ids_WS: NDArray[np.int64]) -> str:
    """A fingerprint of everything that the result depends on."""
    files = [(file.name, file.identity) for file in spec.weight_files]
    settings = dataclasses.asdict(recipe), dataclasses.asdict(limits), files, __version__, ids_WS.shape
    return hashlib.sha256(json.dumps(settings).encode() + ids_WS.tobytes()).hexdigest()


@dataclass(slots=True)
class _Work:
    """The walk over all layers, and what of it survives a kill.

    The scratch folder holds the hidden states in front of the layer that is next, those behind it, those between its
    attention and its feed-forward, and `progress.json`, which is replaced when a layer's shard is on the disk.
    """

    spec: ModelSpec
    recipe: Recipe
    limits: Limits
    weights: Weights
    ids_WS: NDArray[np.int64]
    folder: Path
    scratch: Path

    def run(self, progress: Progress, notice: Callable[[str], None]) -> Report:
        """Quantises the layers that are not yet, and writes the rest."""
        layers = self._read_progress()
        done, count = len(layers), len(self.spec.layers)
        if done:
            notice(f"Going on at layer {done} of {count}, where the last run had come to.")
        else:
            embed(self.weights, self.ids_WS, self._hidden(0))
        tokens = self.ids_WS.size
        for index in range(done, count):
            quantiser = LayerQuantiser(self.spec, index, self.weights, self.recipe, self.limits)
            hidden = self._hidden(index), self._hidden("attended"), self._hidden(index + 1)

            def report(share: float, at: int = index) -> None:
                progress(f"layer {at}", int((at + share) * tokens), count * tokens)

            quantiser.quantise(*hidden, report)
            write_shard(self.folder / f"layer-{index:05}.safetensors", quantiser.tensors)
            layers.append(LayerReport(records=tuple(quantiser.records), expert_tokens=tuple(quantiser.expert_tokens)))
            hidden[-1].flush()
            self._write_progress(layers)
            self.weights.release()
        head = self._write_rest()
        kept = [name for name, _ in units(self.spec) if choose(self.recipe, name).format == "none"]
        return Report(
            recipe=self.recipe,
            windows=self.ids_WS.shape[0],
            tokens=tokens,
            layers=tuple(layers),
            head=tuple(head),
            kept=dict.fromkeys(["embed_tokens", "norms", *kept], self.spec.dtype),
        )

    def _hidden(self, name: int | str) -> Any:
        """Hidden states [W, S, H] in a mapped file; a layer's input and output take turns in two files."""
        path = self.scratch / f"{name % 2 if isinstance(name, int) else name}.f32"
        shape = (*self.ids_WS.shape, self.spec.hidden_size)
        size = int(np.prod(shape)) * 4
        if not path.exists() or path.stat().st_size != size:
            with path.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, size)  # a full disk is an error here, not a fault when it is used
        return np.memmap(path, np.float32, "r+", shape=shape)

    def _read_progress(self) -> list[LayerReport]:
        path = self.scratch / PROGRESS
        return [LayerReport.from_fields(fields) for fields in json.loads(path.read_text())] if path.exists() else []

    def _write_progress(self, layers: Sequence[LayerReport]) -> None:
        temporary = self.scratch / f"{PROGRESS}.new"
        temporary.write_text(json.dumps([dataclasses.asdict(layer) for layer in layers]))
        temporary.replace(self.scratch / PROGRESS)

    def _write_rest(self) -> list[Record]:
        """Embedding, last norm and LM head, the head quantised where the recipe asks for it."""
        names = [name for name in self.weights.regions if not name.startswith("layers.")]
        tensors = {self.weights.full_names[name]: self.weights.stored(name) for name in names if is_text(name)}
        choice = choose(self.recipe, "lm_head")
        records = []
        if choice.format != "none":
            source = Input(Statistics("lm_head: its input", self.spec.hidden_size), self.recipe)
            norm = self.weights.wide("norm.weight")
            last: Hidden = self._hidden(len(self.spec.layers)).reshape(-1, self.spec.hidden_size)
            for start in range(0, len(last), TOKENS):
                rows_NH = torch.from_numpy(np.ascontiguousarray(last[start : start + TOKENS]))
                source.statistics.update(rms_norm(rows_NH, norm, self.spec.norm_eps))
            full = self.weights.full_names["lm_head.weight"]
            dtype = tensors.pop(full).dtype
            product, record = quantise_product("lm_head", self.weights.wide("lm_head.weight"), source, choice, dtype)
            prefix = full.removesuffix("lm_head.weight")
            emit_product(
                lambda name, tensor: tensors.update({prefix + name: tensor}), "lm_head", product, choice, dtype
            )
            records.append(record)
        write_shard(self.folder / "rest.safetensors", tensors)
        return records


def is_text(name: str) -> bool:
    """Whether a tensor outside the layers is the text decoder's."""
    return name in ("embed_tokens.weight", "norm.weight", "lm_head.weight")


def _finish(source: Path, spec: FolderSpec, recipe: Recipe, folder: Path, report: Report) -> None:
    """Writes the graph, the report, the tokenizer and, last, the spec."""
    shards = [open_shard(path) for path in sorted(folder.glob("*.safetensors"))]
    places = {name: (shard.path.name, region) for shard in shards for name, region in shard.tensors.items()}
    graph = ir.from_proto(onnx.load(source / spec.graph, load_external_data=False))
    quantise_graph(graph, spec.model, recipe, places, folder)
    ir.save(graph, folder / spec.graph)
    carry_files(source, folder)
    write_report(folder, report)
    record = dataclasses.replace(
        spec,
        version=__version__,
        source=str(source),
        source_hashes={spec.graph: hashlib.sha256((source / spec.graph).read_bytes()).hexdigest()},
        weight_files=tuple(
            WeightFile(name=shard.path.name, path="", size=shard.size, identity=identity(shard.path))
            for shard in shards
        ),
        recipe=recipe,
        tools={name: importlib.metadata.version(name) for name in ("torch", "onnx", "onnx-ir")},
    )
    (folder / SPEC).write_text(record.to_json(), "utf-8")
