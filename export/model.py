"""A checkpoint as a model folder: the canonical graph, its spec and the tokenizer, with the weights left in place.

The checkpoint is only read. Weights move when asked to (`copy_weights`) or when they must change type (`dtype`); then
they are safetensors files of the same names beside the graph.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir

from .. import __version__
from ..errors import ExportError
from ..folder import SPEC, carry_files, check_apart, check_free, copy_sparse, new_folder
from ..shards import Region, Shard, identity, open_shard
from ..spec import DType, FolderSpec, WeightFile
from .checkpoint import DTYPE_NAMES, Checkpoint, open_checkpoint, read_json
from .config import DTYPES, text_config
from .convert import convert_shard
from .stitch import Progress, stitch_decoder

GRAPH = "decoder.onnx"


def export_checkpoint(
    checkpoint: str | Path,
    out: str | Path,
    *,
    dtype: DType | None = None,
    copy_weights: bool = False,
    force: bool = False,
    progress: Progress = lambda phase, done, total: None,
    notice: Callable[[str], None] = lambda line: None,
) -> Path:
    """Exports a Llama 4 checkpoint's text decoder.

    Args:
        checkpoint: Folder in Hugging Face layout; only read.
        out: The model folder to write.
        dtype: Type of the graph and its weights; None keeps the checkpoint's. Another type writes converted weights.
        copy_weights: Whether the weights are copied into the folder, so that it stands alone.
        force: Whether an existing model folder at `out` is replaced.
        progress: Told the phase, the steps done and the steps in all.
        notice: Told what a person should know, a line each.

    Returns:
        The model folder.

    Raises:
        CheckpointError: The checkpoint is damaged or no Llama 4.
        ExportError: `dtype` is unknown or too narrow for a weight, or a file changed meanwhile.
        FolderError: `out` exists, or cannot be written.
    """
    source, target = Path(checkpoint).absolute(), Path(out).absolute()
    if dtype is not None and dtype not in DTYPES:
        raise ExportError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    check_apart(source, target)
    check_free(target, force=force)
    opened = open_checkpoint(source, any_dtype=dtype is not None)
    if opened.vision_tensors:
        notice(f"The {opened.vision_tensors} tensors of the vision tower are left out: the text decoder is exported.")
    with new_folder(target, force=force) as folder:
        weight_files, places = _place_weights(opened, folder, dtype, copy_weights, progress)
        spec = opened.spec if dtype is None else dataclasses.replace(opened.spec, dtype=dtype)
        model = stitch_decoder(spec, opened.prefix, places.__getitem__, progress)
        ir.save(model, folder / GRAPH)
        carry_files(source, folder)
        _write_generation_config(source, folder)
        record = FolderSpec(
            kind="model",
            version=__version__,
            model=spec,
            graph=GRAPH,
            source=str(source),
            source_hashes=_hashes(source),
            weight_files=tuple(weight_files),
            tools={name: importlib.metadata.version(name) for name in ("torch", "onnx", "onnx-ir", "onnxscript")},
        )
        (folder / SPEC).write_text(record.to_json(), "utf-8")
    return target


def _place_weights(
    checkpoint: Checkpoint, folder: Path, dtype: DType | None, copy_weights: bool, progress: Progress
) -> tuple[list[WeightFile], dict[str, tuple[str, Region]]]:
    """Leaves, copies or converts each shard. Returns the weight files and where each tensor now lies."""
    files, places = [], {}
    for index, shard in enumerate(checkpoint.shards):
        name, path = shard.path.name, shard.path
        converts = dtype is not None and _stored_dtypes(shard, checkpoint) != {dtype}
        if converts or copy_weights:
            progress("weights", index, len(checkpoint.shards))
            path = folder / name
            if converts and dtype is not None:
                convert_shard(shard, path, checkpoint.tensors, dtype)
                shard = open_shard(path)
            else:
                copy_sparse(shard.path, path)
        fingerprint = identity(path)
        if copy_weights and not converts and fingerprint != identity(shard.path):
            raise ExportError(f"{shard.path}: its copy differs, the file changed meanwhile: export again")
        files.append(
            WeightFile(
                name=name, path="" if path.parent == folder else str(path), size=shard.size, identity=fingerprint
            )
        )
        places.update(
            {tensor: (name, region) for tensor, region in shard.tensors.items() if tensor in checkpoint.tensors}
        )
    return files, places


def _stored_dtypes(shard: Shard, checkpoint: Checkpoint) -> set[DType]:
    return {DTYPE_NAMES[region.dtype] for name, region in shard.tensors.items() if name in checkpoint.tensors}


def _write_generation_config(source: Path, folder: Path) -> None:
    """Where a checkpoint has no generation config, its end-of-sequence tokens stand in `config.json`."""
    if not (folder / "generation_config.json").exists():
        config = text_config(read_json(source / "config.json"))
        ids = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in config}
        (folder / "generation_config.json").write_text(json.dumps(ids, indent=1) + "\n", "utf-8")


def _hashes(source: Path) -> dict[str, str]:
    """SHA-256 of the checkpoint's small files that decide what is exported."""
    names = ("config.json", "tokenizer.json", "model.safetensors.index.json")
    return {
        name: hashlib.sha256((source / name).read_bytes()).hexdigest() for name in names if (source / name).is_file()
    }
