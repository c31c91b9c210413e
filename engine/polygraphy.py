"""Functions that NVIDIA's Polygraphy calls from a script: a model's inputs, its TensorRT network, its build.

Enters: a model folder, whose decoder it is. Leaves: the functions that Polygraphy calls by name from a script such as

    from arriero.engine.polygraphy import Scripts

    scripts = Scripts("scout", target="tensorrt-rtx:sm89")
    load_data, load_network, load_config = scripts.load_data, scripts.load_network, scripts.load_config

Invariant: network and configuration are those of `arriero build`, with the plugins registered.
"""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ..errors import BuildError, FolderError, shortened
from ..files.folders import check_whole, find_files, read_spec
from ..plugins.canonical_graph import read_graph
from ..spec.folder import FolderSpec
from .builder import configure, define
from .model_agreement import check_model
from .target import parse_target
from .tensorrt_bundle import Options, Prepared, prepare

BATCH, LENGTH, SLOTS = 2, 16, 64
"""Rows, tokens of a row's piece, and positions that a full layer's cache holds, in the inputs."""

RTX = "POLYGRAPHY_USE_TENSORRT_RTX"
"""The environment variable that makes Polygraphy import TensorRT-RTX, not TensorRT."""

DRAWN = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.INT8)
"""Types of caches and image features that both numpy and ONNX Runtime hold."""


@dataclass(frozen=True, slots=True)
class Scripts:
    """Polygraphy's functions for one model folder.

    Args:
        model: The folder.
        target: The TensorRT to build for, as in `tensorrt-rtx:sm89`.
        options: The options of `arriero build`.
        seed: Seed of the inputs.
    """

    model: str | Path
    target: str = "tensorrt-rtx:sm89"
    options: Options = field(default_factory=Options)
    seed: int = 0

    def load_data(self) -> Iterator[dict[str, NDArray[Any]]]:
        """Inputs of the model's own graph: a piece of each row over empty caches, then a token over filled ones.

        Where the model takes images, every other token of the piece is of one.

        Raises:
            BuildError: The caches or the image features have a type that ONNX Runtime's CPU does not take from numpy.
            FolderError: The folder is not as it must be, or its graph is not the one that its spec describes.
        """
        folder, spec = self._read()
        check_model(folder, spec, find_files(folder, spec.weight_files, self.options.weights_from))
        graph = read_graph(folder / spec.graph).graph
        rng = np.random.default_rng(self.seed)
        chunk_slots = min(spec.model.chunk or SLOTS, SLOTS)
        length = min(LENGTH, chunk_slots // 2)
        for sequence, past in ((length, 0), (1, length)):
            sizes = {"batch": BATCH, "slots": SLOTS, "chunk_slots": chunk_slots}
            sizes |= {"sequence": sequence, "logit_positions": sequence, "features": max(BATCH * (sequence // 2), 1)}
            inputs: dict[str, NDArray[Any]] = {
                "input_ids": rng.integers(0, spec.model.vocab_size, (BATCH, sequence)),
                "past_lengths": np.full(BATCH, past, dtype=np.int32),
                "logit_positions": np.tile(np.arange(sequence), (BATCH, 1)),
            }
            for value in graph.inputs[len(inputs) :]:
                inputs[f"{value.name}"] = _draw(value, _shape(value, sizes, spec.model.hidden_size), past, rng)
            if spec.vision is not None:
                inputs["input_ids"][:, 1::2] = spec.vision.spec.image_token
            yield inputs

    def load_network(self) -> tuple[Any, Any, Any]:
        """TensorRT's builder, the network, and its parser.

        Raises:
            BuildError: The target cannot run the model, or Polygraphy uses another TensorRT.
            FolderError: The folder or a weight file is not as it must be.
        """
        from polygraphy.backend.trt import get_trt_logger

        prepared = self._prepare()
        # Polygraphy's `inspect` asks for `tensorrt` by that name, whatever the switch says.
        sys.modules.setdefault("tensorrt", prepared.trt)
        builder = prepared.trt.Builder(get_trt_logger())
        with prepared.weights() as weights:
            definition, parser = define(prepared.trt, builder, prepared.network, weights, get_trt_logger())
        return builder, definition, parser

    def load_config(self, builder: Any, network: Any) -> Any:
        """TensorRT's configuration: GPUs, profiles, caches updated in place."""
        prepared = self._prepare()
        return configure(prepared.trt, builder, prepared.target, prepared.shapes)

    def _prepare(self) -> Prepared:
        target = parse_target(self.target)
        if target.flavour == "cpu":
            raise BuildError("target is cpu: give a TensorRT, as in tensorrt-rtx:sm89")
        if (os.environ.get(RTX, "0") != "0") != (target.flavour == "tensorrt-rtx"):
            value = int(target.flavour == "tensorrt-rtx")
            raise BuildError(f"Polygraphy uses another TensorRT than {target}: set {RTX}={value}")
        folder, spec = self._read()
        return prepare(folder, spec, target, self.options)

    def _read(self) -> tuple[Path, FolderSpec]:
        folder = Path(self.model)
        spec = read_spec(folder)
        check_whole(folder, spec)
        return folder, spec


def _shape(value: ir.Value, sizes: dict[str, int], hidden: int) -> list[int]:
    """The shape of caches, whose heads and sizes are known to be right, or of image features.

    Raises:
        FolderError: It is another than Arriero writes.
    """
    dims = [size if isinstance(size, int) else size.value for size in value.shape or ()]
    found = [size if isinstance(size, int) else sizes.get(size or "") for size in dims]
    if any(type(size) is not str for size in dims[::2]) or None in found or (len(dims) == 2 and dims[1] != hidden):
        raise FolderError(f"{value.name} is {shortened(dims)}, no shape that Arriero writes: write the folder again")
    return [size for size in found if size is not None]


def _draw(value: ir.Value, shape: list[int], past: int, rng: np.random.Generator) -> NDArray[Any]:
    """Image features [M, H], or a cache [B, K, C, D]: zeros, but random where tokens have been."""
    if value.dtype not in DRAWN:
        raise BuildError(
            f"{value.name} is {value.dtype}, which ONNX Runtime's CPU does not take: export with --dtype float32"
        )
    dtype = value.dtype.numpy()
    if len(shape) == 2:
        return rng.standard_normal(shape).astype(dtype)
    cache = np.zeros(shape, dtype=dtype)
    filled = rng.standard_normal((*shape[:2], past, shape[3]))
    cache[:, :, :past] = filled * 40 if value.dtype == ir.DataType.INT8 else filled
    return cache
