"""Folders as a stage reads them: the spec, the small files that travel on, and the weight files, found and checked."""

import hashlib
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, FolderError
from ..spec import FolderSpec, WeightFile
from ..spec.folder import SPEC_NAME
from . import reading
from .safetensors import POINTER, check_downloaded, identity

SPEC = SPEC_NAME
LONGEST_SPEC = 1 << 23
"""Bytes of a spec at most: twenty times those of the largest model's."""

LAYERS, TOWER_LAYERS, KERNELS = "layers.json", "vision_layers.json", "kernels"
"""Files of an engine's bundle: the fused layers of the decoder's and of the vision tower's, and the folder of the
plugins' compiled kernels."""

CARRIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "added_tokens.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
)
"""Small files that every stage hands on unchanged."""

OF_TOKENIZER = tuple(name for name in CARRIED if name != "generation_config.json")
"""The ones among them that belong to the tokenizer and the preprocessor."""

NAMED_TEMPLATES = "additional_chat_templates"
"""Folder of chat templates that have names of their own, which travels with the small files."""

MOST_TEMPLATES = 100
"""Templates of that folder at most."""


def read_spec(folder: Path) -> FolderSpec:
    """Reads a folder's `spec.json`.

    Raises:
        FolderError: The folder is not one of Arriero's, or of a newer version.
    """
    path = folder / SPEC
    try:
        text = reading.read_text(path, remedy="write the folder again", folder=folder, most=LONGEST_SPEC)
    except FileNotFoundError:
        if (folder / "config.json").exists():
            raise FolderError(f"{folder} is a checkpoint: make a model of it with `arriero export` first") from None
        if is_packed(folder):
            raise FolderError(
                f"{folder} is a packed bundle: unpack it with `arriero pack {folder} --unpack -o FOLDER`, give FOLDER"
            ) from None
        found = "holds no spec.json" if folder.is_dir() else "is no folder"
        raise FolderError(f"{folder} {found}: give a folder that `arriero export` or `arriero build` wrote") from None
    try:
        return FolderSpec.from_json(text)
    except FolderError as error:
        raise FolderError(f"{folder}: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a folder, empty where the file is missing.

    Raises:
        FolderError: The file is damaged.
    """
    try:
        return reading.read_json(path, folder=path.parent)
    except FileNotFoundError:
        return {}


def is_packed(path: Path) -> bool:
    """Whether a path is a file that begins as a packed bundle does, with the name of its first file."""
    start = SPEC.encode() + b"\0"
    try:
        with reading.open_regular(path) as file:
            return file.read(len(start)) == start
    except OSError:
        return False


def check_no_rank(folder: Path, spec: FolderSpec) -> None:
    """Refuses one rank of several, which computes a part of each sum.

    Raises:
        FolderError: The folder is one rank's.
    """
    if spec.kind != "group" and spec.ranks > 1:
        raise FolderError(
            f"{folder} is rank {spec.rank} of {spec.ranks}, which does not run alone: give the group's folder, "
            f"{folder.absolute().parent}"
        )


def check_whole(folder: Path, spec: FolderSpec) -> None:
    """Refuses a model that is split over ranks.

    Raises:
        FolderError: The folder is one rank's, or holds the ranks' folders.
    """
    check_no_rank(folder, spec)
    if spec.kind == "group":
        raise FolderError(f"{folder} is a group of {spec.ranks} ranks: give the model that it was split from")


def rank_folder(group: Path, spec: FolderSpec, rank: int) -> tuple[Path, FolderSpec]:
    """A rank's folder in a group's and its spec, proven to be the one that was written with the group.

    Raises:
        FolderError: It is missing, damaged, or another.
    """
    folder = group / f"rank-{rank}"
    own = read_spec(folder)
    if (own.rank, own.ranks) != (rank, spec.ranks) or len(spec.rank_hashes) != spec.ranks:
        raise FolderError(f"{folder} is not rank {rank} of this group: write the group again")
    if rank_fingerprint(folder) != spec.rank_hashes[rank]:
        raise FolderError(f"rank {rank}: {folder} has other weights or another graph than its group: write it again")
    return folder, own


def rank_fingerprint(folder: Path, text: bytes | None = None) -> str:
    """SHA-256 of a rank's spec, which has the identities of its weights, and of its graphs.

    Args:
        folder: The rank's folder.
        text: The text that `spec.json` will have in a copy; None takes the folder's own.
    """
    spec, digest = read_spec(folder), hashlib.sha256()
    for name in (SPEC, spec.graph, "" if spec.vision is None else spec.vision.graph):
        if name:
            try:
                is_given = name == SPEC and text is not None
                remedy = "write the group again"
                digest.update(
                    text or b"" if is_given else reading.read_bytes(folder / name, remedy=remedy, most=1 << 30)
                )
            except FileNotFoundError as error:
                raise FolderError(f"{folder / name}: {error.strerror}: write the group again") from error
    return digest.hexdigest()


def carry_files(source: Path, target: Path, names: Iterable[str] = CARRIED) -> None:
    """Copies the small files that travel with a model: tokenizer, chat template, generation config.

    Raises:
        CheckpointError: Git left a pointer in place of one, or one is no regular file of a sane size, or a link to
            somewhere else.
    """
    for name in (*names, *template_names(source)):
        try:
            content = reading.read_bytes(source / name, CheckpointError, "restore the file", folder=source)
        except FileNotFoundError:
            continue
        check_downloaded(source / name, content[: len(POINTER)])
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).write_bytes(content)


def template_names(folder: Path) -> list[str]:
    """The files of a folder's chat templates that have names of their own.

    Raises:
        FolderError: There are more than `MOST_TEMPLATES`, or their folder is a link out of this one.
    """
    place = folder / NAMED_TEMPLATES
    if not place.is_dir():
        return []
    reading.check_inside(place, folder)
    found = sorted(path.name for path in itertools.islice(place.glob("*.jinja"), MOST_TEMPLATES + 1))
    if len(found) > MOST_TEMPLATES:
        raise FolderError(f"{place} holds more than {MOST_TEMPLATES} templates: remove those that are not used")
    return [f"{NAMED_TEMPLATES}/{name}" for name in found]


def find_files(
    folder: Path, files: Iterable[WeightFile], weights: Path | None = None, *, option: str = "--weights"
) -> dict[str, Path]:
    """Finds each weight file: in the folder given, in the model's own, or where it lay at export.

    Args:
        folder: The model or bundle.
        files: The files that its spec lists.
        weights: Folder of the weights after a move.
        option: The command line's name for that folder.

    Raises:
        FolderError: A file is missing, or another than the one exported.
    """
    found = {}
    for file in files:
        places = [weights / file.name] if weights else []
        if not file.path or not weights:  # files of the folder's own need not move with the others
            places.append(folder / file.name)
        if file.path and not weights:
            places.append(Path(file.path))
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            sought = places[0 if weights else -1]
            raise FolderError(f"weight file {file.name} is not at {sought}: give its folder with {option}")
        try:
            same = path.stat().st_size == file.size and identity(path) == file.identity
        except CheckpointError:
            same = False
        if not same:
            again = _again(folder, file)
            raise FolderError(f"{path} is not the file that was exported (size or content differs): {again}")
        found[file.name] = path
    return found


def _again(folder: Path, file: WeightFile) -> str:
    """The way to a weight file that fits again: by the stage that wrote it."""
    if not file.path:
        return f"write {folder} again, with --force"
    source = Path(file.path).parent
    try:
        is_quantised = read_spec(source).recipe is not None
    except FolderError:
        return "export again"
    return f"calibrate {source} again, then build" if is_quantised else "export again"
