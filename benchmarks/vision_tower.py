"""The vision tower on a CPU: Arriero's, on ONNX Runtime, beside `transformers`' in PyTorch, in one process.

The width is Scout's (hidden 1408, 577 positions a tile), the depth less: a layer costs the same wherever it stands.
Weights are random and the same in both, arithmetic is float32. Runs alternate, each with the same threads; a row is the
median of each and the median of the ratios of neighbouring runs. That the features are equal is checked on the way.

    python benchmarks/vision_tower.py [--layers 4] [--threads 2] [--runs 7] [--tiles 1,5] [--dtype float32]
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from support.sparse import SCOUT, VISION, multimodal
from transformers import Llama4Config, Llama4ForConditionalGeneration

from arriero.export import export_checkpoint
from arriero.files.folders import find_files, read_spec
from arriero.loading import cpu_tower_graph
from arriero.runtime.backends.mapped_weights import map_weights
from arriero.runtime.backends.onnxruntime_tower import OnnxRuntimeTower

TEXT = {**SCOUT, "num_hidden_layers": 1, "vocab_size": 128, "num_local_experts": 1, "intermediate_size_mlp": 16}
TEXT |= {"intermediate_size": 16, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def make(folder: Path, layers: int, dtype: str) -> tuple[Llama4ForConditionalGeneration, Path]:
    """A checkpoint of Scout's tower with few layers, in front of next to no decoder; and its export."""
    torch.manual_seed(0)
    config = Llama4Config(**multimodal(TEXT, num_hidden_layers=layers))
    model = Llama4ForConditionalGeneration(config).eval()
    if dtype == "bfloat16":
        model = model.bfloat16()
    model.save_pretrained(folder / "checkpoint")
    path = folder / "checkpoint" / "config.json"
    fields = json.loads(path.read_text())
    fields["text_config"]["dtype"] = dtype
    path.write_text(json.dumps(fields))
    return model.float(), export_checkpoint(folder / "checkpoint", folder / "model")


def open_tower(model: Path, threads: int) -> OnnxRuntimeTower:
    spec = read_spec(model)
    assert spec.vision is not None
    graph, regions, flags = cpu_tower_graph(model, spec, spec.vision)
    return OnnxRuntimeTower(graph, map_weights(regions, find_files(model, spec.weight_files)), model, flags, threads)


def timed(work: Callable[[Any], object], pixels: Any) -> float:
    started = time.perf_counter()
    work(pixels)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description="The vision tower on a CPU.")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--tiles", default="1,5")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="Type of the stored weights."
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    table = Table("tiles", "transformers, ms", "Arriero, ms", "theirs / ours")
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        reference, model = make(Path(folder), arguments.layers, arguments.dtype)
        tower = open_tower(model, arguments.threads)

        def theirs(pixels: torch.Tensor) -> torch.Tensor:
            features = reference.vision_model(pixels).last_hidden_state
            return reference.multi_modal_projector(features).flatten(0, 1)

        for tiles in map(int, arguments.tiles.split(",")):
            side = VISION["image_size"]
            pixels = np.random.default_rng(0).uniform(-1, 1, (tiles, 3, side, side)).astype(np.float32)
            expected, found = theirs(torch.from_numpy(pixels)).numpy(), tower.encode(pixels)
            assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
            pairs = [
                (timed(theirs, torch.from_numpy(pixels)), timed(tower.encode, pixels)) for _ in range(arguments.runs)
            ]
            medians = [1e3 * statistics.median(column) for column in zip(*pairs, strict=True)]
            ratio = statistics.median(one / other for one, other in pairs)
            table.add_row(str(tiles), *(f"{each:.0f}" for each in medians), f"{ratio:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
