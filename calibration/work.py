"""The walk of calibration over all layers, and the progress that survives a kill.

Enters: windows of tokens, the tiles of their images, a model's weights. Leaves: a shard for each layer in the model's
new folder, and a `Report`. The vision tower comes first, then the decoder, which sees the unquantised tower's features.

Layer by layer: the hidden states go through the unquantised layer, the quantised layer is written, both are released.
The scratch folder holds the hidden states in front of the layer that is next, those behind it, those between its
attention and its feed-forward, and `progress.json`, which is replaced when a layer's shard is on the disk.

Experts that saw too few tokens end the run, but only behind the last layer, and all that was done is kept. The next run
takes what fits its demands as it is, and measures the layers again that do not: over its own data, which may be more.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CalibrationError
from ..export.llama4 import rms_norm
from ..files.disks import take_room
from ..plugins.finite import all_finite
from ..spec.choice import choose, units
from ..spec.geometry import VISION, ModelSpec, VisionSpec
from ..spec.recipe import Recipe
from ..spec.types import Progress
from ..walk.decoder import TOKENS, Hidden, LayerWalk, embed
from ..walk.numbers import INTEGERS, Weights
from ..walk.tower import embed_tiles, encode_tiles
from ..walk.windows import Windows
from .coverage import Coverage, check_coverage, to_measure_again
from .decoder import LayerQuantiser
from .linears import Linears
from .product import ProductInput, Record
from .reached import Reached, check_reached, described, fingerprint, read_progress, restarted, write_progress
from .report import LayerReport, Report
from .shard import CODES, write_shard
from .statistics import Statistics
from .tower import quantise_tower_ends, quantise_tower_layer

TILES = 8
"""Tiles whose features are computed at once where layers are measured again."""


@dataclass(slots=True)
class Work:
    """The walk; `run` does all of it.

    Attributes:
        spec: The decoder's geometry.
        vision: The vision tower's geometry; None where the model has none.
        recipe: How the weights are quantised; leaves the tower as it is where the windows hold no image.
        coverage: Demands on the routing.
        weights: The model's weights.
        windows: Tokens and tiles.
        folder: Where the shards go.
        scratch: Where everything else goes.
        data: Fingerprint of the windows.
    """

    spec: ModelSpec
    vision: VisionSpec | None
    recipe: Recipe
    coverage: Coverage
    weights: Weights
    windows: Windows
    folder: Path
    scratch: Path
    data: str
    reached: Reached = field(init=False)

    def run(self, progress: Progress, notice: Callable[[str], None]) -> Report:
        """Quantises the layers that are not yet, and writes the rest.

        Args:
            progress: Called with the tokens done, each once a layer; the tower's are patches.
            notice: Called with each line that a person should know.

        Raises:
            StarvedError: Experts saw too few tokens.
            FolderError: What an earlier run left is damaged.
        """
        self.reached = read_progress(self.scratch)
        if self.reached.data not in ("", self.data) and self.reached.head is None:
            notice("The data is not that of the run before, which had not walked all layers: beginning anew.")
            self.reached = restarted(self.folder, self.scratch)
        check_reached(self.reached, self.folder, self.scratch, self.spec, self.vision)
        was_other, self.reached.data = self.reached.data not in ("", self.data), self.data
        count, tokens, tower = len(self.spec.layers), self.windows.ids_WS.size, 0
        if self.windows.vision is not None:
            tower = len(self.windows.pixels_N3PP) * self.windows.vision.positions * self.windows.vision.layers
        total = tower + count * tokens
        if where := described(self.reached, self.spec, self.vision):
            notice(f"Going on: {where}")
        if self.windows.vision is not None:
            self._quantise_tower(self.windows.vision, lambda phase, share: progress(phase, int(share * tower), total))
        if not self.reached.layers:
            self._embed()
        for index in range(len(self.reached.layers), count):

            def report(share: float, at: int = index) -> None:
                progress(f"layer {at}", tower + int((at + share) * tokens), total)

            self._quantise_layer(index, report)
        if self.reached.head is None:
            self.reached.head = self._write_rest()
            write_progress(self.scratch, self.reached)
        if again := to_measure_again(self.reached.layers, self.recipe, self.coverage, self.data):
            self._measure_again(again, progress, notice)
        check_coverage(self.reached.layers, self.recipe, self.coverage, notice)
        measured = units(self.spec, self.windows.vision)
        kept = [name for name, _ in measured if choose(self.recipe, name).format == "none"]
        if self.vision is not None and self.windows.vision is None:
            kept.append("vision tower")
        return Report(
            recipe=self.recipe,
            windows=len(self.windows.ids_WS),
            tokens=tokens,
            layers=tuple(self.reached.layers),
            head=tuple(self.reached.head),
            kept=dict.fromkeys(["embed_tokens", "norms", *kept], self.spec.dtype),
            tiles=len(self.windows.pixels_N3PP),
            tower=tuple(self.reached.tower),
            other_data=was_other or any(layer.data != self.data for layer in self.reached.layers),
        )

    def _quantise_layer(self, index: int, report: Callable[[float], None]) -> None:
        """Measures and quantises a layer, for the first time or again."""
        self.weights.read_ahead(f"layers.{index + 1}.")
        quantiser = LayerQuantiser(self.spec, index, self.weights, self.recipe, self.coverage)
        hidden = self._hidden(index), self._hidden("attended"), self._hidden(index + 1)
        quantiser.quantise(*hidden, report)
        self._write_step(
            f"layer-{index:05}", quantiser.linears, hidden[-1], self.reached.layers, quantiser, place=index
        )

    def _measure_again(self, again: Sequence[int], progress: Progress, notice: Callable[[str], None]) -> None:
        """Walks once more, and quantises some layers anew; the others are kept as they are."""
        count, tokens = again[-1] + 1, self.windows.ids_WS.size
        names = ", ".join(map(str, again))
        kept = len(self.spec.layers) - len(again)
        notice(f"Measuring layer{'s' if len(again) > 1 else ''} {names} again; the other {kept} are kept.")
        if self.windows.vision is not None:
            features_MH, pixels = self._features(self.windows.vision), self.windows.pixels_N3PP
            for start in range(0, len(pixels), TILES):
                some = slice(start * self.windows.vision.features, (start + TILES) * self.windows.vision.features)
                part = pixels[start : start + TILES].astype(np.float32)
                features_MH[some] = encode_tiles(self.windows.vision, self.weights, part)
        self._embed()
        for index in range(count):

            def report(share: float, at: int = index) -> None:
                progress(f"layer {at} again", int((at + share) * tokens), count * tokens)

            if index in again:
                self._quantise_layer(index, report)
            else:
                walk = LayerWalk(self.spec, index, self.weights, self._hidden("attended"), self._hidden(index + 1))
                walk.run(self._hidden(index))
                self.weights.release()
                report(1.0)

    def _quantise_tower(self, vision: VisionSpec, report: Callable[[str, float], None]) -> None:
        """The tower's layers, then what lies around them and the image features."""
        pixels_N3PP, tower = self.windows.pixels_N3PP, self.reached.tower
        if len(tower) > vision.layers:
            return
        shape = len(pixels_N3PP), vision.positions, vision.hidden_size
        if not tower:
            embed_tiles(vision, self.weights, pixels_N3PP, self._mapped("vision-0", shape))
        for index in range(len(tower), vision.layers):
            x, attended, out = (
                self._mapped(f"vision-{name}", shape) for name in (index % 2, "attended", (index + 1) % 2)
            )
            self._write_step(
                f"vision-{index:05}",
                quantise_tower_layer(vision, index, self.weights, self.recipe, x, attended, out),
                out,
                tower,
            )  # unnamed, so that a layer is released before the next
            report(f"vision layer {index}", (index + 1) / vision.layers)
        x, features_MH = self._mapped(f"vision-{vision.layers % 2}", shape), self._features(vision)
        linears = quantise_tower_ends(vision, self.weights, self.recipe, pixels_N3PP, x, features_MH)
        self._write_step("vision-rest", linears, features_MH, tower)
        for path in self.scratch.glob("vision-*"):
            path.unlink()

    def _embed(self) -> None:
        """Writes the decoder's first input: embeddings, and image features in the places of image tokens."""
        windows, hidden = self.windows, self._hidden(0)
        features_MH = None if windows.vision is None else self._features(windows.vision)
        for at in range(len(windows.ids_WS)):
            some = slice(at, at + 1)
            features = windows.features_of(at, features_MH)
            embed(self.weights, windows.ids_WS[some], hidden[some], windows.image_token, features)

    def _write_step(
        self,
        name: str,
        linears: Linears,
        output: NDArray[np.float32],
        reports: list[LayerReport],
        quantiser: LayerQuantiser | None = None,
        place: int | None = None,
    ) -> None:
        """Puts a step's shard and output on the disk, and then what is reached."""
        self._check_finite(linears)
        if not all_finite(output, "F32"):
            raise CalibrationError(
                f"{linears.title}: its output is NaN or infinite: its weights or the text are damaged"
            )
        shard = self.folder / f"{name}.safetensors"
        if shard.name in self.reached.shards:
            self.reached.shards[shard.name] = ""  # a kill may leave this shard before or behind its report
            write_progress(self.scratch, self.reached)
        write_shard(shard, linears.tensors)
        assert isinstance(output, np.memmap)
        output.flush()
        left = Path(str(output.filename))
        self.reached.shards[shard.name] = fingerprint(shard)
        self.reached.output = left.name, fingerprint(left)
        report = LayerReport(
            records=tuple(linears.records),
            expert_tokens=tuple(quantiser.expert_tokens) if quantiser else (),
            unmeasured=quantiser.unmeasured if quantiser else (),
            all_experts=self.coverage.all_experts,
            data=self.data,
        )
        if place is not None and place < len(reports):
            reports[place] = report
        else:
            reports.append(report)
        write_progress(self.scratch, self.reached)
        self.weights.release()

    def _check_finite(self, linears: Linears) -> None:
        """Refuses what has become NaN or infinite on its way, as a scale that its type does not hold.

        Raises:
            CalibrationError: A tensor to be written holds such a number.
        """
        for name, tensor in linears.tensors.items():
            if not all_finite(tensor.view(INTEGERS[tensor.element_size()]).numpy(), CODES[tensor.dtype]):
                raise CalibrationError(
                    f"{name!r} becomes NaN or infinite: it does not fit {self.spec.dtype}, export with another --dtype"
                )

    def _hidden(self, name: int | str) -> Any:
        """The decoder's hidden states [W, S, H]; a layer's input and output take turns in two files."""
        shape = (*self.windows.ids_WS.shape, self.spec.hidden_size)
        return self._mapped(str(name % 2 if isinstance(name, int) else name), shape)

    def _features(self, vision: VisionSpec) -> Any:
        """The image features of all tiles [M, H]."""
        return self._mapped("features", (len(self.windows.pixels_N3PP) * vision.features, self.spec.hidden_size))

    def _mapped(self, name: str, shape: tuple[int, ...]) -> Any:
        """An array in a mapped file."""
        path = self.scratch / f"{name}.f32"
        size = int(np.prod(shape)) * 4
        if not path.exists() or path.stat().st_size != size:
            take_room(path, size)
        return np.memmap(path, np.float32, "r+", shape=shape)

    def _write_rest(self) -> list[Record]:
        """Embedding, last norm and LM head, the head quantised where the recipe asks for it; a tower that is left."""
        linears = Linears(self.weights, self.recipe, "", "lm_head")
        names = ["embed_tokens.weight", "norm.weight", "lm_head.weight"]
        if self.vision is not None and self.windows.vision is None:
            names += [name for name in self.weights.regions if name.startswith(VISION)]
        for name in names:
            if name in self.weights.regions:
                linears.emit_kept(name)
        if linears.choice("lm_head").format != "none":
            statistics = Statistics("lm_head: its input", self.spec.hidden_size, device=self.weights.device)
            source = ProductInput(statistics, self.recipe)
            norm = self.weights.wide("norm.weight")
            last: Hidden = self._hidden(len(self.spec.layers)).reshape(-1, self.spec.hidden_size)
            for start in range(0, len(last), TOKENS):
                rows_NH = self.weights.place(last[start : start + TOKENS])
                source.statistics.update(rms_norm(rows_NH, norm, self.spec.norm_eps))
            linears.emit_linear("lm_head", self.weights.wide("lm_head.weight"), source)
        self._check_finite(linears)
        shard = self.folder / "rest.safetensors"
        write_shard(shard, linears.tensors)
        self.reached.shards[shard.name] = fingerprint(shard)
        return linears.records
