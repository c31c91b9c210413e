"""A model folder built for one target, as a bundle folder; a group of ranks as a group of bundles.

For `cpu` that is the lowered graph, the list of weight regions it is given, and the tokenizer: the runtime needs no
onnx to load it. For `tensorrt-rtx` and `tensorrt` it is the engines with the plugins' kernels. Weights that are not
in an engine stay where the model has them.
"""

import dataclasses
import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from .. import __version__
from ..errors import BuildError, FolderError
from ..files.agreement import check_decoder, check_draft, check_tower
from ..files.draft_tokens import carry_tokens
from ..files.folders import SPEC, carry_files, check_no_rank, find_files, rank_fingerprint, rank_folder, read_spec
from ..files.manifest import write_manifest
from ..files.output import check_apart, check_free, copy_sparse, new_folder
from ..files.reading import read_bytes
from ..files.trust import remember
from ..plugins.canonical_graph import LARGEST
from ..spec.choice import INT8_GROUP, is_grouped_int8
from ..spec.draft import DRAFT_PREFIX
from ..spec.folder import DraftPart, FolderSpec
from ..spec.stored_weights import Weight, WeightFile
from ..spec.types import BITS, Progress
from .cpu_lowering import lower_for_cpu, lower_part_for_cpu
from .packed_weights import FILE, write_packed
from .target import Target, parse_target
from .tensorrt_bundle import Options, build_tensorrt


def build_bundle(
    model: str | Path,
    out: str | Path,
    *,
    target: str = "cpu",
    options: Options | None = None,
    kv_cache: Literal["int8", "int4"] | None = None,
    copy_weights: bool = False,
    finish: Callable[[Path], None] = lambda folder: None,
    force: bool = False,
    progress: Progress = lambda phase, done, total: None,
) -> Path:
    """Builds a bundle.

    Args:
        model: The model folder, or a group of them.
        out: The bundle folder to write.
        target: The target: `cpu`, `tensorrt-rtx:smNN[,smNN…]`, or `tensorrt` for the GPU at hand.
        options: Sizes and choices of the engine; for `cpu`, whose graph takes any shape, `weights_from` alone.
        kv_cache: Type of keys and values on the CPU, each 32 of a token's rounded by a scale of their own, so that
            nothing needs to be calibrated; None keeps them as the model has them. For `cpu` only.
        copy_weights: Whether the weights are copied into the bundle, with a manifest of the hashes of all its files, so
            that it needs nothing else.
        finish: Called with the folder before it takes its name, to add to it.
        force: Whether an existing bundle at `out` is replaced.
        progress: Called with the phase, the steps done and the steps in all.

    Returns:
        The bundle folder, or the group of bundles.

    Raises:
        BuildError: The target is unknown or cannot run the model, or the graph cannot be lowered.
        FolderError: `model` is no model folder, or `out` exists or cannot be written.
    """
    source, bundle, parsed = Path(model), Path(out), parse_target(target)
    options = options or Options()
    _check_options(parsed, options, kv_cache)
    spec = read_spec(source)
    check_no_rank(source, spec)
    _check_target(source, spec, parsed, target)
    if spec.kind == "bundle" or spec.target:
        raise FolderError(f"{source} is built already: give the {spec.kind.replace('bundle', 'model')} it was built of")
    check_apart(source, bundle)
    check_free(bundle, force=force)
    with new_folder(bundle, force=force) as folder:
        carry_files(source, folder)
        choices, bits = (parsed, options, copy_weights), 0 if kv_cache is None else BITS[kv_cache]
        if spec.kind == "model":
            built = [_write_bundle(source, dataclasses.replace(spec, cache_bits=bits), choices, folder, progress)]
        else:
            built = _write_group(source, spec, bits, choices, folder, progress)
        finish(folder)
        if copy_weights:
            write_manifest(folder, progress)
    remember(bundle, *built)
    return bundle


def _check_target(source: Path, spec: FolderSpec, target: Target, text: str) -> None:
    """Refuses what engines do not run.

    Raises:
        BuildError: A model has such a thing, and the target is an engine.
    """
    if target.flavour == "cpu":
        return
    if spec.draft is not None:
        raise BuildError(f"{source} has a draft, which engines do not run: export the model for {text} without --draft")
    if spec.recipe is not None and is_grouped_int8(spec.recipe):
        raise BuildError(
            f"{source} has int8 weights in groups of {INT8_GROUP} inputs, which CPUs alone take: calibrate "
            f"without --group-size for {text}"
        )


def _check_options(target: Target, options: Options, kv_cache: str | None) -> None:
    """Refuses what does not go with the target.

    Raises:
        BuildError: Something does not.
    """
    if target.flavour == "cpu" and options != Options(weights_from=options.weights_from):
        raise BuildError("the cpu target's graph takes any batch and length: leave the engine's options out")
    if kv_cache not in (None, "int8", "int4"):
        raise BuildError(f"kv_cache is {kv_cache!r}, expected int8 or int4")
    if kv_cache and target.flavour != "cpu":
        raise BuildError("kv_cache is for the cpu target: calibrate with --kv-cache int8 or fp8 for an engine's caches")


Choices = tuple[Target, Options, bool]
"""A build's target and options, and whether weights are copied."""


def _write_group(
    source: Path, spec: FolderSpec, bits: int, choices: Choices, folder: Path, progress: Progress
) -> list[FolderSpec]:
    """Writes a bundle a rank, and the spec of them all. Returns the ranks' specs."""
    fingerprints, built = [], list[FolderSpec]()
    for rank in range(spec.ranks):
        model, own = rank_folder(source, spec, rank)
        out = folder / model.name
        out.mkdir()
        built.append(_write_bundle(model, dataclasses.replace(own, cache_bits=bits), choices, out, progress))
        fingerprints.append(rank_fingerprint(out))
    group = dataclasses.replace(
        spec,
        version=__version__,
        source=str(source.absolute()),
        target=built[-1].target,
        cache_bits=bits,
        rank_hashes=tuple(fingerprints),
    )
    (folder / SPEC).write_text(group.to_json(), "utf-8")
    return built


def _write_bundle(source: Path, spec: FolderSpec, choices: Choices, folder: Path, progress: Progress) -> FolderSpec:
    """Writes one bundle, but for the tokenizer. Returns its spec."""
    target, options, copies = choices
    built = _build(source, spec, target, options, folder, progress)
    record = dataclasses.replace(
        built,
        kind="bundle",
        version=__version__,
        source=str(source.absolute()),
        source_hashes={
            spec.graph: hashlib.sha256(read_bytes(source / spec.graph, folder=source, most=LARGEST)).hexdigest()
        },
        weight_files=tuple(_place(file, source, folder, options.weights_from, copies) for file in _used_files(built)),
    )
    (folder / SPEC).write_text(record.to_json(), "utf-8")
    return record


def _used_files(spec: FolderSpec) -> list[WeightFile]:
    """The weight files that the graphs read."""
    parts = [part.weights for part in (spec.vision, spec.draft) if part is not None]
    used = {weight.file for weight in itertools.chain(spec.weights, *parts)}
    return [file for file in spec.weight_files if file.name in used]


def _build(
    source: Path, spec: FolderSpec, target: Target, options: Options, folder: Path, progress: Progress
) -> FolderSpec:
    """Writes the target's own files. Returns the spec with their description."""
    if target.flavour == "cpu":
        lowered = lower_for_cpu(source, spec)
        (folder / spec.graph).write_bytes(lowered.graph)
        vision = spec.vision
        if vision is not None and vision.graph:
            tower = lower_part_for_cpu(source, vision)
            (folder / vision.graph).write_bytes(tower.graph)
            vision = dataclasses.replace(vision, weights=tower.weights, session=tower.session)
        built = dataclasses.replace(
            spec,
            target="cpu",
            weights=lowered.weights,
            session=lowered.session,
            vision=vision,
            draft=None if spec.draft is None else _build_draft(source, spec, spec.draft, folder),
        )
        _check_graphs(source, folder, lowered.graph, built)
        return _with_packed(source, built, folder, options.weights_from)
    return build_tensorrt(source, spec, target, options, folder, progress)


def _check_graphs(source: Path, folder: Path, graph: bytes, built: FolderSpec) -> None:
    """Refuses graphs that compute something else than the model's spec says; errors name the model's."""
    check_decoder(graph, built.weights, built, source / built.graph)
    if (vision := built.vision) is not None and vision.graph:
        check_tower((folder / vision.graph).read_bytes(), vision.weights, built, source / vision.graph)
    if (draft := built.draft) is not None:
        content = (folder / draft.graph).read_bytes()
        check_draft(content, draft.weights, draft, built.model, source / draft.graph)


def _build_draft(source: Path, spec: FolderSpec, draft: DraftPart, folder: Path) -> DraftPart:
    """Writes the draft's graph and tokens. Returns its part with their description."""
    lowered = lower_part_for_cpu(source, draft)
    (folder / draft.graph).write_bytes(lowered.graph)
    carry_tokens(source, folder, spec)
    return dataclasses.replace(draft, weights=lowered.weights, session=lowered.session)


def _with_packed(source: Path, spec: FolderSpec, folder: Path, moved: Path | None) -> FolderSpec:
    """Writes the weights in panels, where there are any. Returns the spec with the new places."""
    vision = spec.vision
    weights = (*spec.weights, *(() if vision is None else vision.weights))
    if not _has_panels(weights):
        return spec
    files = find_files(source, spec.weight_files, moved, option="--weights-from")
    placed, file = write_packed(weights, files, folder, of_rank=spec.ranks > 1)
    if vision is not None:
        vision = dataclasses.replace(vision, weights=tuple(placed[weight.name] for weight in vision.weights))
    draft, drafts = spec.draft, list[WeightFile]()
    if draft is not None:
        draft, drafts = _packed_draft(draft, spec.weight_files, placed, files, folder)
    return dataclasses.replace(
        spec,
        weights=tuple(placed[weight.name] for weight in spec.weights),
        vision=vision,
        draft=draft,
        weight_files=(file, *drafts),
    )


def _has_panels(weights: Iterable[Weight]) -> bool:
    """Whether some of the weights are to lie in panels."""
    return any(weight.layout != "rows" for weight in weights)


def _packed_draft(
    draft: DraftPart,
    weight_files: Sequence[WeightFile],
    decoder: Mapping[str, Weight],
    files: Mapping[str, Path],
    folder: Path,
) -> tuple[DraftPart, list[WeightFile]]:
    """A draft beside a decoder in panels: its own weights in panels too where it has any, else left where they are.

    Args:
        draft: The draft.
        weight_files: The model's weight files.
        decoder: The decoder's weights in their new places, by name; the draft may read its embedding.
        files: Where the model's weight files are.
        folder: The bundle.

    Returns:
        The draft with the new places, and its own weight files.
    """
    own = [weight for weight in draft.weights if weight.file.startswith(DRAFT_PREFIX)]
    drafts = [file for file in weight_files if file.name.startswith(DRAFT_PREFIX)]
    placed = {weight.name: weight for weight in own}
    if _has_panels(own):
        placed, file = write_packed(own, files, folder, name=f"{DRAFT_PREFIX}{FILE}")
        drafts = [file]
    weights = tuple(placed[each.name] if each.name in placed else decoder[each.name] for each in draft.weights)
    return dataclasses.replace(draft, weights=weights), drafts


def _place(file: WeightFile, source: Path, folder: Path, moved: Path | None, copies: bool) -> WeightFile:
    """Weights of a self-contained model go into the bundle, as hard links where the file system has them.

    Copies share nothing with the model: who writes into its files changes no bundle that is to stand alone. Weights
    that are read in place and have moved are looked for where they are said to be now.
    """
    is_elsewhere = file.path and not copies
    if (folder / file.name).exists() or (is_elsewhere and moved is None):
        return file
    path = find_files(source, [file], moved, option="--weights-from")[file.name]
    if is_elsewhere:
        return dataclasses.replace(file, path=str(path.absolute()))
    if copies:
        copy_sparse(path, folder / file.name)
        return dataclasses.replace(file, path="")
    try:
        os.link(path.resolve(), folder / file.name)  # not a link into a hub's cache, but its file
    except OSError:
        copy_sparse(path, folder / file.name)
    return file
