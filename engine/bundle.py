"""A model folder built for one target, as a bundle folder.

For `cpu` that is the lowered graph, the list of weight regions it is given, and the tokenizer: the runtime needs no
onnx to load it. The weights stay where the model has them.
"""

import dataclasses
import hashlib
import os
from pathlib import Path

from .. import __version__
from ..errors import BuildError, FolderError
from ..folder import SPEC, carry_files, check_apart, check_whole, copy_sparse, new_folder, read_spec
from ..spec import WeightFile
from .cpu import lower_for_cpu

TARGETS = ("cpu",)


def build_bundle(model: str | Path, out: str | Path, *, target: str = "cpu", force: bool = False) -> Path:
    """Builds a bundle.

    Args:
        model: The model folder.
        out: The bundle folder to write.
        target: What to build for; one of `TARGETS`.
        force: Whether an existing bundle at `out` is replaced.

    Returns:
        The bundle folder.

    Raises:
        BuildError: The target is unknown, or the graph cannot be lowered.
        FolderError: `model` is no model folder, or `out` exists or cannot be written.
    """
    source, bundle = Path(model), Path(out)
    if target not in TARGETS:
        raise BuildError(f"target {target!r} is unknown: choose one of {', '.join(TARGETS)}")
    spec = read_spec(source)
    check_whole(source, spec)
    if spec.kind != "model":
        raise FolderError(f"{source} is a {spec.kind}: give the model folder it was built from")
    check_apart(source, bundle)
    with new_folder(bundle, force=force) as folder:
        lowered = lower_for_cpu(source, spec)
        (folder / spec.graph).write_bytes(lowered.graph)
        carry_files(source, folder)
        record = dataclasses.replace(
            spec,
            kind="bundle",
            version=__version__,
            target=target,
            source=str(source.absolute()),
            source_hashes={spec.graph: hashlib.sha256((source / spec.graph).read_bytes()).hexdigest()},
            weight_files=tuple(_place(file, source, folder) for file in spec.weight_files),
            weights=lowered.weights,
            session=lowered.session,
        )
        (folder / SPEC).write_text(record.to_json(), "utf-8")
    return bundle


def _place(file: WeightFile, source: Path, folder: Path) -> WeightFile:
    """Weights of a self-contained model go into the bundle, as hard links where the file system has them."""
    if file.path:
        return file
    try:
        os.link(source / file.name, folder / file.name)
    except OSError:
        copy_sparse(source / file.name, folder / file.name)
    return file
