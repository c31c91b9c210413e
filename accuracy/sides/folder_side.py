"""A model, a bundle or a group of ranks as a side, run as a session: its last tokens one by one, as in generation.

Enters: a folder. Leaves: logits block by block, and where the graph is open the experts that its routers choose. No
PyTorch; onnx where a graph is looked into.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ...errors import AccuracyError
from ...files.folders import check_no_rank, find_files, rank_folder, read_spec
from ...files.trust import check_trusted
from ...loading import cpu_decoder_graph, cpu_tower_graph, load, open_tower
from ...plugins.finite import first_damaged
from ...runtime.backends.mapped_weights import map_weights
from ...runtime.backends.onnxruntime_decoder import OnnxRuntimeDecoder
from ...runtime.defaults import read_defaults
from ...runtime.session import Session
from ...runtime.state import Limits
from ...runtime.text import Text
from ...spec.types import Progress
from ...walk.windows import Windows
from .side import Block, Experts, chosen_by, likeliest

if TYPE_CHECKING:
    from ..lowered_graph import LoweredGraph


class FolderSide:
    """A model or a bundle, run as a session.

    Args:
        path: The folder.
        weights: Folder of its weight files, where they have moved.
        threads: Threads of one operator on the CPU.
        option: The command line's name for the folder of the weight files.

    Raises:
        ArrieroError: It is damaged.
    """

    def __init__(self, path: Path, weights: Path | None, threads: int | None, option: str = "--weights") -> None:
        self.path, self.weights, self.threads, self.option = path, weights, threads, option
        self.folder = read_spec(path)
        check_no_rank(path, self.folder)
        check_trusted(path, self.folder)
        self.is_group = self.folder.kind == "group"
        self.own_path, self.own = rank_folder(path, self.folder, 0) if self.is_group else (path, self.folder)
        self.spec, self.recipe = self.folder.model, self.folder.recipe
        self.vision = None if self.folder.vision is None else self.folder.vision.spec
        self.blind: str | None = None
        if self.own.engine is not None:
            self.blind = "inside an engine"
        elif self.is_group:
            self.blind = "in a group of ranks"
        elif find_spec("onnx") is None:
            self.blind = "without onnx"
        self.session: Session | None = None
        self.routed: list[NDArray[np.float32]] = []

    def score(self, windows: Windows, decoded: int, progress: Progress) -> Iterator[Block]:
        """Scores rows one by one, each prefilled in pieces and then decoded, but for an image at its end."""
        ids_WS = windows.ids_WS
        with torch_at_rest():
            for row, ids_S in enumerate(ids_WS):
                session = self._opened(ids_WS.shape[1])
                seen = windows.is_image_WS[row].nonzero()[0]
                alone = min(decoded, len(ids_S) - 1 - int(seen[-1])) if len(seen) else decoded
                features_MH = self._features(session, windows, row)
                for start, logits_NV in session.score(ids_S.tolist(), alone, features_MH):
                    progress(self.path.name, row * ids_WS.shape[1] + start, ids_WS.size)
                    self._check_finite(logits_NV)
                    yield Block(row, start, logits_NV, self._chosen())

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
        part = self.own.vision
        if part is None or not len(windows.pixels_N3PP):
            return None
        tower = open_tower(self.own_path, self.own, part, self.files, self.threads)
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
        """Releases the session."""
        self.session = None

    def _opened(self, positions: int) -> Session:
        """The session, its routers' logits watched where the graph is open."""
        if self.session is None or self.session.max_seq < positions:
            self.session = None  # before another is made
            positions = max(positions, min(self.spec.max_positions, 4096))
            if self.own.engine is not None:
                self.session = load(self.path, weights=self.weights)
            elif self.is_group:
                self.session = load(self.path, max_seq=positions, threads=self.threads, weights=self.weights)
            else:
                self.session = self._on_cpu(positions)
        return self.session

    @cached_property
    def lowered(self) -> "LoweredGraph":
        """The decoder's graph as it runs on the CPU.

        Raises:
            AccuracyError: The folder is an engine.
        """
        from ..lowered_graph import LoweredGraph

        self._check_open()
        return LoweredGraph(*cpu_decoder_graph(self.path, self.folder))

    @cached_property
    def lowered_tower(self) -> "LoweredGraph":
        """The vision tower's graph as it runs on the CPU.

        Raises:
            AccuracyError: The folder is an engine.
        """
        from ..lowered_graph import LoweredGraph

        self._check_open()
        assert self.folder.vision is not None
        return LoweredGraph(*cpu_tower_graph(self.path, self.folder, self.folder.vision))

    @cached_property
    def files(self) -> dict[str, Path]:
        """The weight files, found and checked."""
        return find_files(self.own_path, self.own.weight_files, self.weights, option=self.option)

    def _check_open(self) -> None:
        if self.is_group:
            raise AccuracyError(
                f"{self.path} is a group of ranks, which compute parts: give --locate the model it was split from"
            )
        if self.own.engine is not None:
            raise AccuracyError(
                f"{self.path} is an engine, whose layers are fused: give --locate the model it was built of"
            )

    def _check_finite(self, logits_NV: NDArray[np.float32]) -> None:
        """Names the damaged tensor where logits are not finite and it can be seen.

        Raises:
            AccuracyError: A weight is NaN or infinite.
        """
        if self.own.engine is not None or np.isfinite(logits_NV).all():
            return
        folders = [(self.path, self.folder)]
        if self.is_group:
            folders = [rank_folder(self.path, self.folder, rank) for rank in range(self.folder.ranks)]
        for path, spec in folders:
            _, weights, _ = cpu_decoder_graph(path, spec)
            files = find_files(path, spec.weight_files, self.weights, option=self.option)
            if (name := first_damaged(weights, files)) is not None:
                raise AccuracyError(f"{path}: tensor {name!r} holds NaN or infinity: its file is damaged, restore it")

    def _on_cpu(self, positions: int) -> Session:
        names: list[str] = []
        if self.blind is None:
            graph = self.lowered
            layers = [index for index, layer in enumerate(self.spec.layers) if layer.experts]
            names = [name for index in layers if (name := graph.output_of(f"layers.{index}/feed_forward.router"))]
            content, weights, flags = graph.watching(names), graph.weights, graph.flags
        else:
            content, weights, flags = cpu_decoder_graph(self.path, self.folder)
        decoder = OnnxRuntimeDecoder(
            content,
            map_weights(weights, self.files),
            self.path,
            self.spec,
            flags,
            self.threads,
            watched=names,
            watch=self._watch,
        )
        limits, text, part = Limits.of(self.spec, positions, None), Text(self.path), self.folder.vision
        tower = None if part is None else open_tower(self.path, self.folder, part, self.files, self.threads)
        return Session(decoder, text, read_defaults(self.path, self.spec.vocab_size), limits, tower)

    def _watch(self, values: dict[str, NDArray[np.float32]]) -> None:
        self.routed = list(values.values())

    def _chosen(self) -> Experts | None:
        """The experts of the last step's tokens."""
        if not self.routed:
            return None
        return chosen_by(np.stack(self.routed), self.spec.experts_per_token)


@contextmanager
def torch_at_rest() -> Iterator[None]:
    """Leaves the cores to ONNX Runtime, whose threads wait in a loop, where PyTorch is loaded besides."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
