"""A recorded reference: all that the metrics need of it, and no more.

Enters: a side and token ids. Leaves: a `Golden`, which a check compares the candidate with, at once or later from a
file; both are the same comparison. Of each next token's distribution the likeliest tokens are kept with their
log-probabilities, and of all others together what is left for them.

The file is safetensors: the arrays below by their names, and in its metadata what the reference was.
"""

import dataclasses
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..errors import AccuracyError, CheckpointError, printable
from ..files.output import reason, remove_leftovers, unwritable
from ..files.reading import open_regular
from ..files.safetensors import PointerError, encode_header, open_shard
from ..spec.fields import decode
from ..spec.geometry import ModelSpec, VisionSpec
from ..spec.json_text import parse_json
from ..spec.types import Progress
from ..walk.windows import SHORTEST_WINDOW, Windows, read_windows
from .golden_checks import check_golden
from .probabilities import likeliest_of, log_sum, next_of, predicting, rest_of
from .recorded import CONTINUED, Golden, beginnings, decoded_tokens
from .sides import check_device, open_side, tokenizer_of
from .sides.side import Block, Experts, Side

VERSION = "1"
LARGEST = 1 << 33
"""Bytes of a golden file at most."""
TOP = 64
"""Tokens whose probabilities are kept one by one."""

MARK = b'{"__metadata__": {"golden": '
"""Beginning of a file's header, behind the header's length."""

DTYPES = {"int32": "I32", "int16": "I16", "float32": "F32", "float16": "F16", "bool": "BOOL"}
OPTIONAL = ("experts_LWSK", "continued_PC", "is_image_WS", "tiles_W", "pixels_N3PP")
"""Arrays that not every golden file has."""


def window_of(spec: ModelSpec) -> int:
    """Tokens of a window: two chunks and a quarter, so that two boundaries are crossed, within the context."""
    return min(spec.max_positions, max(SHORTEST_WINDOW, 2 * spec.chunk + spec.chunk // 4))


def record_golden(
    reference: str | Path,
    out: str | Path,
    *,
    data: Sequence[str | Path],
    samples: int = 24,
    window: int | None = None,
    weights: str | Path | None = None,
    threads: int | None = None,
    device: str = "cpu",
    force: bool = False,
    progress: Progress = lambda phase, done, total: None,
) -> Path:
    """Records a reference once, so that it need not run again.

    Args:
        reference: A checkpoint, a model, or a bundle.
        out: The file to write.
        data: Text files.
        samples: Windows of text at most.
        window: Tokens of a window; None is two chunks and a quarter of the model's attention.
        weights: Folder of the reference's weight files, where they have moved.
        threads: Threads of one operator on the CPU.
        device: Where PyTorch computes a checkpoint: `cpu`, `cuda`, `cuda:1`, or `auto`: a GPU where it finds one.
        force: Whether an existing golden file is replaced.
        progress: Called with the tokens done.

    Returns:
        The file.

    Raises:
        AccuracyError: `reference` cannot be run, or `out` exists or cannot be written.
        DataError: The text cannot be read, or is too little.
        DeviceError: There is no such device, or it has too little memory.
    """
    target = Path(out).absolute()
    check_replaceable(target, force)
    check_device(device, reference)
    side = open_side(reference, weights, threads, device=device)
    windows = read_windows(
        side.path, data, side.spec, samples, window_of(side.spec) if window is None else window, side.vision
    )
    write_golden(record(side, windows, progress, tokenizer_of(side.path)), target)
    return target


def record(side: Side, data: Windows, progress: Progress, tokenizer: str) -> Golden:
    """Runs the reference, over what a tokenizer made: its fingerprint, see `tokenizer_of`.

    Raises:
        AccuracyError: Its logits are not finite.
    """
    spec, ids_WS = side.spec, data.ids_WS
    windows, length = ids_WS.shape
    top = min(TOP, spec.vocab_size)
    logs = {name: np.zeros((windows, length - 1), np.float32) for name in ("rest", "next")}
    top_ids = np.zeros((windows, length - 1, top), np.int32)
    top_logs = np.zeros((windows, length - 1, top), np.float32)
    experts: Experts | None = None
    for block in side.score(data, decoded_tokens(length), progress):
        part, logits_NV = predicting(block, length, side.path)
        experts = with_experts(experts, block, windows, length)
        if not len(logits_NV):
            continue
        total_N1 = log_sum(logits_NV)
        ids_NK, values_NK = likeliest_of(logits_NV, top)
        top_ids[block.row, part], top_logs[block.row, part] = ids_NK, values_NK - total_N1
        logs["rest"][block.row, part] = rest_of(logits_NV, ids_NK) - total_N1[:, 0]
        logs["next"][block.row, part] = next_of(logits_NV, ids_WS, block, total_N1)
    has_images, (prompt, begun) = bool(data.tiles_W.any()), beginnings(data.is_image_WS)
    continued = [
        [*ids_WS[window, :prompt].tolist(), *more]
        for window in begun
        if (more := side.generate(data, window, prompt, CONTINUED)) is not None
    ]
    side.close()
    return Golden(
        source=printable(str(side.path)),
        spec=spec,
        tokenizer=tokenizer,
        format="none" if side.recipe is None else side.recipe.format,
        ids_WS=ids_WS.astype(np.int32),
        is_image_WS=data.is_image_WS if has_images else None,
        tiles_W=data.tiles_W.astype(np.int32) if has_images else None,
        pixels_N3PP=data.pixels_N3PP if has_images else None,
        vision=data.vision if has_images else None,
        top_ids_WNK=top_ids,
        top_logs_WNK=top_logs,
        rest_logs_WN=logs["rest"],
        next_logs_WN=logs["next"],
        experts_LWSK=experts,
        continued_PC=np.array(continued, np.int32) if continued else None,
    )


def with_experts(kept_LWSK: Experts | None, block: Block, windows: int, length: int) -> Experts | None:
    """Puts a block's choice of experts into those of all windows, which begin with the first block's."""
    if block.experts_LNK is None:
        return kept_LWSK
    layers, tokens, count = block.experts_LNK.shape
    if kept_LWSK is None:
        kept_LWSK = np.zeros((layers, windows, length, count), np.int16)
    kept_LWSK[:, block.row, block.start : block.start + tokens] = block.experts_LNK
    return kept_LWSK


def check_replaceable(path: Path, force: bool) -> None:
    """Refuses to write over a file, unless it is a golden one and `force` allows it.

    Raises:
        AccuracyError: Something else is there, or nothing can be written there.
    """
    if (why := unwritable(path.absolute().parent)) is not None:
        raise AccuracyError(f"{path}: cannot be written ({why}): choose another output")
    if not os.path.lexists(path):
        return
    if not _begins_as_golden(path):
        raise AccuracyError(f"{path} exists and is no golden file: it is not replaced, choose another output")
    if not force:
        raise AccuracyError(f"{path} exists: choose another output, or --force to replace it")


def _begins_as_golden(path: Path) -> bool:
    """Whether a file was a golden one, of any version: it may be damaged or cut short since."""
    try:
        with open_regular(path) as file:
            start = file.read(8 + len(MARK))
    except OSError:
        return False
    return start[8:] == MARK


def write_golden(golden: Golden, path: Path) -> None:
    """Writes a file, complete or not there.

    Raises:
        AccuracyError: It cannot be written.
    """
    arrays = {
        field.name: value
        for field in dataclasses.fields(Golden)
        if isinstance(value := getattr(golden, field.name), np.ndarray)
    }
    about = {
        "golden": VERSION,
        "arriero": __version__,
        "source": golden.source,
        "tokenizer": golden.tokenizer,
        "format": golden.format,
        "model": json.dumps(dataclasses.asdict(golden.spec)),
    }
    if golden.vision is not None:
        about["vision"] = json.dumps(dataclasses.asdict(golden.vision))
    header = encode_header({name: (DTYPES[str(a.dtype)], a.shape) for name, a in arrays.items()}, about)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        mark = f".{path.name}.{os.getpid()}."
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=mark, suffix=".partial") as folder:
            temporary = Path(folder) / path.name
            with temporary.open("wb") as file:
                file.write(header)
                for array in arrays.values():
                    file.write(np.ascontiguousarray(array).data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
    except OSError as error:
        raise AccuracyError(
            f"{path}: cannot be written ({reason(error, path.parent)}): choose another output"
        ) from error


def read_golden(path: Path) -> Golden:
    """Reads a golden file.

    Raises:
        AccuracyError: It is none, damaged, or of another version.
    """
    try:
        shard = open_shard(path)
    except PointerError as error:  # whose remedy is its own
        raise AccuracyError(str(error)) from error
    except CheckpointError as error:
        raise AccuracyError(f"{path} is no golden file ({error}): record one with `arriero golden`") from error
    about = shard.metadata
    if about.get("golden") != VERSION:
        found = f"version {about['golden']}" if "golden" in about else "no golden file"
        raise AccuracyError(f"{path} is {found}, this Arriero reads version {VERSION}: record it with `arriero golden`")
    arrays: dict[str, Any] = dict.fromkeys(OPTIONAL)
    if shard.size > LARGEST:
        raise AccuracyError(f"{path} has {shard.size} bytes, a golden file at most {LARGEST}: record it again")
    kinds = {name: np.dtype(kind) for kind, name in DTYPES.items()}
    try:
        for name, region in shard.tensors.items():
            kind = kinds[region.dtype]
            values = np.fromfile(path, kind, region.size // kind.itemsize, offset=region.offset)
            arrays[name] = values.reshape(region.shape)
        spec = ModelSpec.from_fields(parse_json(about["model"]))
        vision = decode(VisionSpec, parse_json(about["vision"])) if "vision" in about else None
        source, tokenizer, form = (about[name] for name in ("source", "tokenizer", "format"))
        golden = Golden(source=source, spec=spec, vision=vision, tokenizer=tokenizer, format=form, **arrays)
        check_golden(golden)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, OSError) as error:
        said = repr(error)[:200]
        raise AccuracyError(f"{path} is a damaged golden file ({said}): record it again") from error
    return golden
