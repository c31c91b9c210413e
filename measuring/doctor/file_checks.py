"""A bundle's files: whole, of one build, and what a session can read."""

from pathlib import Path

from ...errors import FolderError, SessionError
from ...files.contents_hash import file_hash
from ...files.folders import KERNELS, find_files
from ...files.manifest import differences
from ...files.trust import check_trusted
from ...loading import cpu_decoder_graph, cpu_draft_graph, cpu_tower_graph
from ...runtime.chat.templates import DEFAULT
from ...runtime.defaults import read_defaults
from ...runtime.room import size
from ...runtime.text import Text
from ...spec.folder import FolderSpec
from ...spec.types import Progress
from .finding import Finding, found, ok, seen

MOST_NAMED = 4
"""Files that a line names at most."""


def check_files(folder: Path, spec: FolderSpec, weights: Path | None, prefix: str) -> list[Finding]:
    """Looks at one bundle's weights, graph, engine and kernels."""
    looks = [seen(f"{prefix}weights", lambda: _weights(folder, spec, weights))]
    if spec.engine is not None:
        looks.append(seen(f"{prefix}engine", lambda: _engine(folder, spec)))
    elif looks[0].state == "ok":
        looks.append(seen(f"{prefix}graph", lambda: _graph(folder, spec)))
    return looks


def check_hashes(folder: Path, progress: Progress) -> Finding:
    """Holds every file against the manifest, where there is one."""
    return seen("files", lambda: _manifest(folder, progress))


def check_small_files(folder: Path, spec: FolderSpec) -> Finding:
    """Looks at tokenizer, chat template and generation config."""
    return seen("tokenizer", lambda: _text(folder, spec))


def check_trust(folder: Path, spec: FolderSpec, prefix: str) -> Finding:
    """Looks whether this user trusts a bundle's engine."""

    def look() -> str:
        check_trusted(folder, spec)
        return "this user built the engine here, or trusts it"

    return seen(f"{prefix}trust", look)


def _manifest(folder: Path, progress: Progress) -> Finding:
    try:
        wrong = differences(folder, progress)
    except FileNotFoundError:
        return ok(
            "files", "no manifest of hashes, which --copy-weights and pack write; sizes and samples are looked at"
        )
    if not wrong:
        return ok("files", "every file's SHA-256 is the manifest's")
    more = f" and {len(wrong) - MOST_NAMED} more" if len(wrong) > MOST_NAMED else ""
    return found("files", f"{'; '.join(wrong[:MOST_NAMED])}{more}: copy or unpack the bundle again")


def _weights(folder: Path, spec: FolderSpec, weights: Path | None) -> str:
    files = find_files(folder, spec.weight_files, weights)
    total = size(sum(file.size for file in spec.weight_files))
    outside = sorted({str(path.parent) for path in files.values() if path.parent != folder})
    where = f", outside of the bundle in {outside[0]}" if outside else ""
    return f"{len(files)} file{'s' * (len(files) != 1)}, {total}{where}" if files else "inside the engine"


def _graph(folder: Path, spec: FolderSpec) -> str:
    cpu_decoder_graph(folder, spec)
    if spec.vision is not None and spec.vision.graph:
        cpu_tower_graph(folder, spec, spec.vision)
    if spec.draft is not None:
        cpu_draft_graph(folder, spec, spec.draft)
    return "operators, caches and weights are those that spec.json describes"


def _engine(folder: Path, spec: FolderSpec) -> str:
    assert spec.engine is not None
    hashes = {folder / spec.engine.file: spec.engine.sha256}
    if spec.vision is not None and spec.vision.engine is not None:
        hashes[folder / spec.vision.engine.file] = spec.vision.engine.sha256
    hashes |= {folder / KERNELS / kernel.file: kernel.sha256 for kernel in spec.engine.kernels}
    for path, expected in hashes.items():
        if file_hash(path) != expected:
            raise FolderError(f"{path} is not what was built (truncated or changed): build the bundle again")
    return f"{len(hashes)} files are what was built"


def _text(folder: Path, spec: FolderSpec) -> Finding:
    text = Text(folder)
    read_defaults(folder, spec.model.vocab_size)
    if text.tokenizer is None:
        return found(
            "tokenizer",
            f"{folder} has no tokenizer.json, so it takes token ids alone: export with --tokenizer, and build again",
        )
    largest = max(text.tokenizer.get_vocab().values(), default=0)
    if largest >= spec.model.vocab_size:
        return found(
            "tokenizer",
            f"{folder / 'tokenizer.json'} has a token of id {largest}, the model a vocabulary of "
            f"{spec.model.vocab_size}: export with the model's own (--tokenizer), and build again",
        )
    if text.templates:
        _try_templates(text, folder)
    chat = f"{len(text.templates)} chat template{'s' * (len(text.templates) != 1)}" if text.templates else "no chat"
    return ok("tokenizer", f"{text.tokenizer.get_vocab_size()} tokens, {chat}")


def _try_templates(text: Text, folder: Path) -> None:
    """Writes a question by the template that is taken unless another is asked for, and compiles the others.

    Raises:
        ArrieroError: One does not compile, or the first does not take a question.
    """
    for name in text.templates:
        try:
            text.render_chat({"role": "user", "content": "Hello"}, chat_template=name)
        except SessionError as error:
            if name == DEFAULT:  # one for tools or documents may refuse a plain question
                remedy = "correct it, or export again from an intact checkpoint"
                raise FolderError(f"{folder}: for one question: {error}: {remedy}") from error
