"""What can be compared: a checkpoint in PyTorch, or a model or bundle as it runs.

Enters: a path. Leaves: a `Side`, which scores token ids block by block: logits, and which experts each token chose.
A checkpoint is walked layer by layer over all sequences, so that memory holds one layer and the hidden states lie in
mapped files; a folder runs as a session, its last tokens one by one as in generation.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import AccuracyError
from ..export.checkpoint import open_checkpoint
from ..files.folders import SPEC, check_whole, find_files, read_spec
from ..loading import cpu_decoder_graph, load, open_tower
from ..runtime.backends.mapped_weights import map_weights
from ..runtime.backends.onnxruntime_decoder import OnnxRuntimeDecoder
from ..runtime.session import Session
from ..runtime.state import Limits
from ..runtime.text import Text, read_defaults
from ..spec.geometry import ModelSpec, VisionSpec
from ..spec.recipe import Recipe
from ..walk.decoder import Hidden, LayerWalk, embed, open_head
from ..walk.numbers import Weights
from ..walk.tower import encode_tiles
from ..walk.windows import Windows
from .lowered_graph import LoweredGraph

Experts = NDArray[np.int16]
"""The experts of each token, in rising order: [L, N, K], L the layers that have experts."""

Progress = Callable[[str, int, int], None]
"""Told the phase, the tokens done, and the tokens in all."""

TILES = 8
"""Tiles that PyTorch computes at once."""

BLOCK_BYTES = 1 << 28
"""Of logits computed at once from a checkpoint's hidden states."""


class Block(NamedTuple):
    """What a side says of some tokens of one row.

    Attributes:
        row: Which.
        start: Number of the first token.
        logits_NV: After each token.
        experts_LNK: None where they cannot be seen.
    """

    row: int
    start: int
    logits_NV: NDArray[np.float32]
    experts_LNK: Experts | None


class Side(Protocol):
    """One of the two that are compared."""

    path: Path
    spec: ModelSpec
    vision: VisionSpec | None
    recipe: Recipe | None

    def score(self, windows: Windows, decoded: int, progress: Progress) -> Iterator[Block]:
        """Scores rows.

        Args:
            windows: Token ids, and their images, which the side's own vision tower reads.
            decoded: How many of a row's last tokens run one at a time, where the side can.
            progress: Told how far it is.
        """
        ...

    def encode(self, windows: Windows, progress: Progress) -> NDArray[np.float32] | None:
        """The image features [M, H] of all tiles; None where there are none."""
        ...

    def generate(self, windows: Windows, window: int, prompt: int, count: int) -> list[int] | None:
        """Continues a window's first tokens greedily by exactly so many; None where it does not generate."""
        ...

    def close(self) -> None:
        """Lets go of the weights; they come back when they are needed."""
        ...


def open_side(path: str | Path, weights: Path | None = None, threads: int | None = None) -> Side:
    """Opens one side; its weights are read when it is run.

    Args:
        path: A checkpoint, a model, or a bundle.
        weights: Folder of its weight files, where they have moved.
        threads: Of one operator on the CPU.

    Raises:
        AccuracyError: It is none of these.
        ArrieroError: It is damaged.
    """
    path = Path(path)
    if (path / "config.json").is_file() and not (path / SPEC).exists():
        return CheckpointSide(path)
    if path.is_file():
        raise AccuracyError(f"{path} is a file: give a checkpoint, a model, a bundle, or as --against a golden file")
    return FolderSide(path, weights, threads)


def tokenizer_of(path: Path) -> str:
    """A fingerprint of what a folder's tokenizer does, whatever the file's layout.

    Raises:
        AccuracyError: There is none, or it is damaged.
    """
    try:
        content = json.loads((path / "tokenizer.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise AccuracyError(f"{path} has no tokenizer.json that can be read ({error}): export it again") from error
    fields = {name: content.get(name) for name in ("model", "added_tokens", "normalizer", "pre_tokenizer")}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


class CheckpointSide:
    """A Hugging Face checkpoint, computed by PyTorch in float32 from the weights as they are stored."""

    recipe: Recipe | None = None

    def __init__(self, path: Path) -> None:
        self.path = path
        opened = open_checkpoint(path.absolute())
        if opened.quantised is not None:
            method = opened.quantised.scheme.method
            raise AccuracyError(f"{path} is quantised ({method}): export it, and give the model folder")
        self.spec, self.vision = opened.spec, opened.vision
        self.weights = Weights({shard.path.name: shard.path for shard in opened.shards})

    def score(self, windows: Windows, decoded: int, progress: Progress) -> Iterator[Block]:
        """Scores rows; whole sequences, there is no cache."""
        spec, count, ids_WS = self.spec, len(self.spec.layers), windows.ids_WS
        features_MH = windows.features_in_order(self.encode(windows, progress))
        with hidden_states((*ids_WS.shape, spec.hidden_size)) as (x, attended, out):
            embed(self.weights, ids_WS, x, windows.image_token, features_MH)
            chosen = []
            for index, layer in enumerate(spec.layers):
                progress(f"PyTorch, layer {index}", index * ids_WS.size // count, ids_WS.size)
                walk = LayerWalk(spec, index, self.weights, attended, out)
                walk.run(x)
                if layer.experts:
                    chosen.append(in_order(walk.chosen().numpy()))
                self.weights.release()
                x, out = out, x
            experts_LTK = np.stack(chosen) if chosen else None
            for row, start, logits_NV in self._head(x):
                at = row * ids_WS.shape[1] + start
                experts = None if experts_LTK is None else experts_LTK[:, at : at + len(logits_NV)]
                yield Block(row, start, logits_NV, experts)

    def _head(self, x: Hidden) -> Iterator[tuple[int, int, NDArray[np.float32]]]:
        """The logits of the last hidden states, some tokens at a time."""
        head = open_head(self.spec, self.weights)
        at_once = max(1, BLOCK_BYTES // (4 * self.spec.vocab_size))
        for row, hidden_SH in enumerate(x):
            for start in range(0, len(hidden_SH), at_once):
                part = torch.from_numpy(np.ascontiguousarray(hidden_SH[start : start + at_once]))
                yield row, start, head(part).numpy()

    def encode(self, windows: Windows, progress: Progress) -> NDArray[np.float32] | None:
        """The image features [M, H] of all tiles; None where there are none."""
        if windows.vision is None or not len(windows.pixels_N3PP):
            return None
        found, tiles = [], len(windows.pixels_N3PP)
        for start in range(0, tiles, TILES):
            progress("PyTorch, tiles", start, tiles)
            part = windows.pixels_N3PP[start : start + TILES].astype(np.float32)
            found.append(encode_tiles(windows.vision, self.weights, part))
        self.weights.release()
        return np.concatenate(found)

    def generate(self, windows: Windows, window: int, prompt: int, count: int) -> list[int] | None:
        """Does not: without a cache each token would cost a walk over all weights."""
        return None

    def close(self) -> None:
        """Lets go of the mapped pages."""
        self.weights.release()


class FolderSide:
    """A model or a bundle, run as a session."""

    def __init__(self, path: Path, weights: Path | None, threads: int | None) -> None:
        self.path, self.weights, self.threads = path, weights, threads
        self.folder = read_spec(path)
        check_whole(path, self.folder)
        self.spec, self.recipe = self.folder.model, self.folder.recipe
        self.vision = None if self.folder.vision is None else self.folder.vision.spec
        self.session: Session | None = None
        self.routed: list[NDArray[np.float32]] = []

    def score(self, windows: Windows, decoded: int, progress: Progress) -> Iterator[Block]:
        """Scores rows one by one, each prefilled in pieces and then decoded, but for an image at its end."""
        ids_WS = windows.ids_WS
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # ONNX Runtime's threads wait in a loop, on the cores that torch's would need
        try:
            for row, ids_S in enumerate(ids_WS):
                session = self._opened(ids_WS.shape[1])
                seen = windows.is_image_WS[row].nonzero()[0]
                alone = min(decoded, len(ids_S) - 1 - int(seen[-1])) if len(seen) else decoded
                features_MH = self._features(session, windows, row)
                for start, logits_NV in session.score(ids_S.tolist(), alone, features_MH):
                    progress(self.path.name, row * ids_WS.shape[1] + start, ids_WS.size)
                    yield Block(row, start, logits_NV, self._chosen())
        finally:
            torch.set_num_threads(threads)

    def generate(self, windows: Windows, window: int, prompt: int, count: int) -> list[int] | None:
        """Continues greedily; never by an image's token, which would need an image."""
        session, ids = self._opened(prompt + count), windows.ids_WS[window, :prompt].tolist()
        state, features_MH = session.start(1, prompt + count), self._features(session, windows, window, prompt)
        logits_BV = session.prefill(state, [ids], () if features_MH is None else [features_MH])
        found: list[int] = []
        while len(found) < count:
            found.append(int(likeliest(logits_BV, windows.image_token)[0]))
            logits_BV = session.decode(state, found[-1:])
        return found

    def encode(self, windows: Windows, progress: Progress) -> NDArray[np.float32] | None:
        """The image features [M, H] of all tiles; None where there are none."""
        part = self.folder.vision
        if part is None or not len(windows.pixels_N3PP):
            return None
        tower = open_tower(self.path, self.folder, part, self.files, self.threads)
        return tower.encode(windows.pixels_N3PP.astype(np.float32))

    def _features(
        self, session: Session, windows: Windows, window: int, prompt: int | None = None
    ) -> NDArray[np.float32] | None:
        """The image features of a window, or of its first tokens."""
        if not windows.tiles_W[window]:
            return None
        features_MH = session.encode(windows.pixels_of(window))
        assert features_MH is not None
        return features_MH[: int(np.count_nonzero(windows.ids_WS[window, :prompt] == windows.image_token))]

    def close(self) -> None:
        """Lets go of the session."""
        self.session = None

    def _opened(self, positions: int) -> Session:
        """The session, its routers' logits watched where the graph is open."""
        if self.session is None or self.session.max_seq < positions:
            self.session = None  # before another is made
            positions = max(positions, min(self.spec.max_positions, 4096))
            self.session = self._watched(positions) if self.is_open else self._closed()
        return self.session

    @cached_property
    def lowered(self) -> LoweredGraph:
        """The graph that runs on the CPU."""
        return LoweredGraph(*cpu_decoder_graph(self.path, self.folder))

    @cached_property
    def files(self) -> dict[str, Path]:
        """The weight files, found and checked."""
        return find_files(self.path, self.folder.weight_files, self.weights)

    @property
    def is_open(self) -> bool:
        """Whether values inside the graph can be seen."""
        return self.folder.engine is None

    def _closed(self) -> Session:
        return load(self.path, weights=self.weights)

    def _watched(self, positions: int) -> Session:
        graph = self.lowered
        layers = [index for index, layer in enumerate(self.spec.layers) if layer.experts]
        names = [name for index in layers if (name := graph.output_of(f"layers.{index}/feed_forward.router"))]
        decoder = OnnxRuntimeDecoder(
            graph.watching(names),
            map_weights(graph.weights, self.files),
            self.path,
            self.spec,
            graph.flags,
            self.threads,
            watched=names,
            watch=self._watch,
        )
        limits, text, part = Limits.of(self.spec, positions, None), Text(self.path), self.folder.vision
        tower = None if part is None else open_tower(self.path, self.folder, part, self.files, self.threads)
        return Session(decoder, text, read_defaults(self.path), limits, tower)

    def _watch(self, values: dict[str, NDArray[np.float32]]) -> None:
        self.routed = list(values.values())

    def _chosen(self) -> Experts | None:
        """The experts of the last step's tokens."""
        if not self.routed:
            return None
        count = self.spec.experts_per_token
        logits = torch.from_numpy(np.stack(self.routed))
        return in_order(logits.topk(count, dim=-1).indices.numpy())


def likeliest(logits_NV: NDArray[np.float32], image_token: int | None) -> NDArray[np.int64]:
    """The likeliest tokens [N] but for an image's, which no model writes."""
    if image_token is not None:
        logits_NV = logits_NV.copy()
        logits_NV[:, image_token] = -np.inf
    found_N: NDArray[np.int64] = logits_NV.argmax(-1)
    return found_N


def in_order(chosen: NDArray[Any]) -> Experts:
    """Experts [..., K] as sets: in rising order."""
    return np.sort(chosen, axis=-1).astype(np.int16)


@contextmanager
def hidden_states(shape: tuple[int, ...]) -> Iterator[tuple[Hidden, Hidden, Hidden]]:
    """Three arrays of hidden states in mapped files, which go when the block ends."""
    with tempfile.TemporaryDirectory(prefix="arriero-") as folder:
        first, second, third = (np.memmap(f"{folder}/{name}", np.float32, "w+", shape=shape) for name in "abc")
        yield first, second, third
