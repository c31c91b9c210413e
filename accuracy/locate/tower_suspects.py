"""Why a unit of a vision tower is out of line: a tensor, a known mistake in what is computed, or the op.

Enters: a reading, both towers, and the reference's input of the part in which the unit lies. Leaves: a `Blame`. The
tensors that a unit reads are compared first. Where they are right, each op is computed anew from what the candidate
itself hands to it, with known mistakes made on purpose, and the one that comes out as the candidate computes it is
named.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, relu, silu

from ...export.llama4_tower import attend_patches, rotate_patches, turns
from ...spec.choice import ADAPTER, PATCHES, PROJECTOR
from ...spec.geometry import VISION_LAYERS
from ...walk.tower import normed
from .evidence import DROPPED, FLOATS_DIFFER, Evidence, Mistake, norm_of
from .location import STEM, Blame, Reading
from .part_walk import in_second_half, run_half
from .tower_units import TorchTower, TowerUnits
from .units import Hidden, Units
from .weight_differences import ALIKE, describe, difference, half_split

TENSORS = {
    PATCHES: (f"{PATCHES}.weight",),
    STEM: tuple(
        f"vision_model.{name}"
        for name in ("class_embedding", "positional_embedding_vlm", "layernorm_pre.weight", "layernorm_pre.bias")
    ),
    ADAPTER[0]: ("vision_model.layernorm_post.weight", "vision_model.layernorm_post.bias", f"{ADAPTER[0]}.weight"),
    ADAPTER[1]: (f"{ADAPTER[1]}.weight",),
    PROJECTOR: (f"{PROJECTOR}.weight",),
}
"""Tensors that the units before and behind the layers read."""

PATCH_ORDERS = {
    "patches stand column by column, not row by row": (0, 4, 2, 1, 3, 5),
    "colours come last in a patch, not first": (0, 2, 4, 3, 5, 1),
    "rows and columns are exchanged within a patch": (0, 2, 4, 1, 5, 3),
}
"""Orders of [N, 3, rows, rows within a patch, columns, columns within a patch]; the right one is (0, 2, 4, 1, 3, 5)."""

SHUFFLES = {
    "a square's patches stand column by column, not row by row": (0, 1, 3, 4, 2, 5),
    "squares stand column by column, not row by row": (0, 3, 1, 2, 4, 5),
    "channels come before a square's patches, not behind them": (0, 1, 3, 5, 2, 4),
    "patches of a row are joined, not those of a square": (0, 1, 2, 3, 4, 5),
}
"""Orders of [N, rows, rows within a square, columns, columns within a square, C]; the right one is
(0, 1, 3, 2, 4, 5)."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "it is GELU's approximation by a tanh": lambda x: gelu(x, approximate="tanh"),
    "it is GELU's approximation by a sigmoid": lambda x: x * torch.sigmoid(1.702 * x),
    "it is a SiLU, not a GELU": silu,
    "it is a ReLU, not a GELU": relu,
    "it is left out": lambda x: x,
}

UNKNOWN = "its weights are right: what it computes is no mistake that is known"


def blame_tower(reading: Reading, reference: TorchTower, candidate: TowerUnits, given: Hidden) -> Blame:
    """Says what is wrong with a unit.

    Args:
        reading: The unit that is out of line.
        reference: The reference's tower.
        candidate: The candidate's.
        given: The reference's input: tiles for the stem, else hidden states of the half or of the head.
    """
    suspects = _Suspects(reading, reference, candidate, given)
    match reading.unit:
        case "self_attn" | "self_attn.o_proj":
            return suspects.attention()
        case "mlp.fc2":
            return suspects.second_linear()
        case "attended" | "out":
            return suspects.sum()
        case unit if unit in TENSORS:
            return suspects.end(unit)
    return suspects.first_linear()


class _Suspects(Evidence):
    """One part of the tower under suspicion."""

    def __init__(self, reading: Reading, reference: TorchTower, candidate: TowerUnits, given: Hidden) -> None:
        self.vision = vision = reference.vision
        prefix = "" if reading.unit in TENSORS else f"{VISION_LAYERS}{reading.layer}."
        super().__init__(
            reading,
            reference.weights,
            candidate.weights,
            prefix=prefix,
            attention="Attention",
            heads=(vision.heads, vision.head_dim),
        )
        self.index, self.given = reading.layer, given
        self.outputs = self._run(candidate)

    def full(self, name: str) -> str:
        """The checkpoint's name of a unit or tensor, which is also the one that weights are read by."""
        return self.prefix + name

    def _run(self, tower: TowerUnits) -> Units:
        """The part that the unit lies in."""
        if self.unit in (PATCHES, STEM):
            return tower.stem(self.given)
        if self.unit in TENSORS:
            return tower.head(self.given)
        return run_half(tower, "feed" if in_second_half(self.unit) else "attend", self.index, self.given)

    # Units

    def first_linear(self) -> Blame:
        """A linear whose input is the layer's norm."""
        norm = norm_of(self.unit)
        return (
            self.read_through(self.unit)
            or self._tensor(f"{norm}.bias", over_K=self.norm_ratio(norm))
            or self._tensor(f"{self.unit}.bias")
            or self._linear(normed(self.our_weights, self.full(norm), self._rows()))
        )

    def attention(self) -> Blame:
        """Attention and what its output goes through, queries and keys being right."""
        query, key, value = (self.outputs[f"self_attn.{part}_proj"] for part in "qkv")
        actual, replayed = self.outputs["self_attn"], self._attend(query, key, value)
        if difference(replayed, actual) > FLOATS_DIFFER:
            mistakes = list(self._attention_mistakes(query, key, value))
            return self._mistake("Attention", "self_attn", actual, replayed, mistakes) or self.op_blame(
                "Attention", "self_attn", UNKNOWN
            )
        return self._value_or_output() or self._linear(actual, "self_attn.o_proj")

    def second_linear(self) -> Blame:
        """The feed-forward's second linear, the first being right."""
        return (
            self._tensor("mlp.fc2.weight")
            or self._tensor("mlp.fc2.bias")
            or self._activation("mlp", "mlp.fc1", lambda x: self._product("mlp.fc2", x))
            or self._linear(gelu(self.outputs["mlp.fc1"]))
        )

    def sum(self) -> Blame:
        """A half's residual, the half being right."""
        before, part = self._rows(), "self_attn.o_proj" if self.unit == "attended" else "mlp.fc2"
        owner, actual, why = part.partition(".")[0], self.outputs[self.unit], "its parts are right, their sum is not"
        if difference(self.outputs[part], actual) <= ALIKE:
            why = "what enters it is not added to what it computes"
        elif difference(before, actual) <= self.explained:
            why = DROPPED
        return self.op_blame("Add", owner, why)

    def end(self, unit: str) -> Blame:
        """A unit of the stem or of the head."""
        for name in TENSORS[unit]:
            if found := self._tensor(name):
                return found
        if unit in (ADAPTER[1], PROJECTOR):
            before = ADAPTER[0] if unit == ADAPTER[1] else ADAPTER[1]
            found = self._activation("vision_model.vision_adapter.mlp", before, lambda x: self._plain(unit, x))
            return found or self.op_blame("MatMul", unit)
        op, owner, make = {
            PATCHES: ("Transpose", "vision_model.patch_embedding", self._patches),
            STEM: ("Concat", "vision_model", self._placed),
            ADAPTER[0]: ("Transpose", "vision_model.vision_adapter", self._shuffled),
        }[unit]
        replayed, mistakes = make()
        return self._mistake(op, owner, self.outputs[unit], replayed, mistakes) or self.op_blame("MatMul", unit)

    # Tensors

    def norm_blame(self, norm: str, why: str) -> Blame | None:
        """A norm's weight, which makes a right weight a wrong one."""
        return self._tensor(f"{norm}.weight")

    def exchanged_with(self, unit: str, weight_NK: Tensor) -> str | None:
        """Another of queries, keys and values whose weight it is."""
        for other in (f"self_attn.{part}_proj" for part in "qkv") if unit.startswith("self_attn") else ():
            another = self.theirs(f"{other}.weight")
            if other != unit and describe(another, weight_NK, max(self.explained, ALIKE)) is None:
                return other
        return None

    def _tensor(self, name: str, ours: Tensor | None = None, over_K: Tensor | float = 1.0) -> Blame | None:
        """A tensor that is not what the reference has under the same name.

        Args:
            name: Name in the layer, or the full one.
            ours: The candidate's, where factors were taken out of it; None reads it.
            over_K: Factors to be taken out of it.
        """
        if not self.our_weights.has(self.full(name)):
            return self.op_blame("Add", name, "it is left out")
        theirs, ours = self.theirs(name), (self.ours(name) if ours is None else ours) / over_K
        flat = theirs.ndim == 1
        why = describe(theirs[None] if flat else theirs, ours[None] if flat else ours, self.explained)
        return None if why is None else self.tensor_blame("Add" if flat else "MatMul", name, why)

    def _value_or_output(self) -> Blame | None:
        """The linear of values or of the output, between whose channels a quantiser may have moved powers of two."""
        value, output = "self_attn.v_proj", "self_attn.o_proj"
        value_NK, output_NK, factor_N = self.without_moved(value, output)
        return (
            self._tensor(f"{value}.weight", value_NK)
            or self._tensor(f"{value}.bias", over_K=1 / factor_N)
            or self._tensor(f"{output}.weight", output_NK)
            or self._tensor(f"{output}.bias")
        )

    # Mistakes

    def _linear(self, x_RK: Tensor, unit: str | None = None) -> Blame:
        """A linear whose tensors are right: its bias is not added, its input's scale is wrong, or what it computes."""
        unit = unit or self.unit
        actual, bias = self.outputs[unit], f"{unit}.bias"
        whole = self._product(unit, x_RK)
        if difference(whole - self.ours(bias), actual) <= max(FLOATS_DIFFER, ALIKE * difference(whole, actual)):
            return self.op_blame("Add", bias, "it is not added")
        return self.op_blame("MatMul", unit)

    def _attention_mistakes(self, query: Tensor, key: Tensor, value: Tensor) -> Iterator[Mistake]:
        cos_SP, sin_SP = turns(self.vision)
        nothing, width = (torch.ones_like(cos_SP), torch.zeros_like(sin_SP)), cos_SP.shape[1] // 2
        exchanged = tuple(angle_SP.roll(width, 1) for angle_SP in (cos_SP, sin_SP))
        yield "inputs", "queries and keys are exchanged", lambda: self._attend(key, query, value)
        yield "inputs", "keys and values are exchanged", lambda: self._attend(query, value, key)
        yield "rope", "queries and keys are not turned", lambda: self._attend(query, key, value, nothing)
        yield (
            "rope",
            "columns and rows are exchanged",
            lambda: self._attend(query, key, value, (exchanged[0], exchanged[1])),
        )
        yield (
            "rope layout",
            "RoPE turns halves of a head, not neighbouring pairs",
            lambda: self._attend(self._halved(query), self._halved(key), value),
        )
        scale = self.vision.head_dim**0.5
        yield "scale", "scores are not scaled", lambda: self._attend(query * scale, key, value)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, angles: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Attention [R, C] of what the three linears compute."""
        cos_SP, sin_SP = turns(self.vision) if angles is None else angles
        split = (rows.view(-1, self.vision.positions, self.vision.hidden_size) for rows in (query, key, value))
        query, key, value = split
        query, key = (rotate_patches(turned, cos_SP, sin_SP, self.vision.heads) for turned in (query, key))
        return attend_patches(query, key, value, self.vision.heads).flatten(0, 1)

    def _halved(self, rows: Tensor) -> Tensor:
        """Rows whose neighbouring pairs are what a RoPE over halves turns together."""
        return rows[:, half_split(self.vision.hidden_size, self.vision.head_dim).argsort()]

    def _patches(self) -> tuple[Tensor, list[Mistake]]:
        """The patches' product, and with its values in other orders."""
        side, used = self.vision.patch_size, self.vision.grid * self.vision.patch_size
        pixels = torch.from_numpy(self.given[:, :, :used, :used]).float()
        squares = pixels.unflatten(3, (-1, side)).unflatten(2, (-1, side))

        def product(order: Sequence[int], pixels: Tensor = squares) -> Tensor:
            return self._plain(PATCHES, pixels.permute(*order).reshape(-1, self.vision.patch_values))

        right = (0, 2, 4, 1, 3, 5)
        mistakes: list[Mistake] = [("patches", why, partial(product, order)) for why, order in PATCH_ORDERS.items()]
        mistakes.append(("patches", "colours are blue, green, red", lambda: product(right, squares.flip(1))))
        return product(right), mistakes

    def _placed(self) -> tuple[Tensor, list[Mistake]]:
        """The stem's output, and with mistakes behind the patches' product."""
        weights, size = self.our_weights, self.vision.hidden_size
        patches = self.outputs[PATCHES].view(len(self.given), -1, size)
        last = weights.wide("vision_model.class_embedding").expand(len(patches), 1, -1)
        places = weights.wide("vision_model.positional_embedding_vlm")

        def leaving(parts: Sequence[Tensor], places: Tensor | float = places) -> Tensor:
            return normed(weights, "vision_model.layernorm_pre", torch.cat([*parts], dim=1) + places).flatten(0, 1)

        mistakes: list[Mistake] = [
            ("class token", "it stands first, and should be last", lambda: leaving([last, patches])),
            ("places", "they are not added", lambda: leaving([patches, last], 0.0)),
        ]
        return leaving([patches, last]), mistakes

    def _shuffled(self) -> tuple[Tensor, list[Mistake]]:
        """The adapter's first product, and with patches in other orders."""
        across, shuffle = self.vision.grid // self.vision.shuffle, self.vision.shuffle
        x_NSC = torch.from_numpy(self.given)
        patches = normed(self.our_weights, "vision_model.layernorm_post", x_NSC)

        def product(order: Sequence[int], patches: Tensor = patches[:, :-1]) -> Tensor:
            squares = patches.unflatten(1, (across, shuffle, across, shuffle)).permute(*order)
            return self._plain(ADAPTER[0], squares.reshape(-1, self.vision.mlp_size))

        right = (0, 1, 3, 2, 4, 5)
        mistakes: list[Mistake] = [("pixel shuffle", why, partial(product, order)) for why, order in SHUFFLES.items()]
        without_first = patches[:, 1:]
        mistakes.append(
            ("class token", "the first position is left out, not the last", lambda: product(right, without_first))
        )
        return product(right), mistakes

    def _activation(self, name: str, before: str, product: Callable[[Tensor], Tensor]) -> Blame | None:
        """A GELU between two linears that is none."""
        x, actual = self.outputs[before], self.outputs[self.unit]
        mistakes: list[Mistake] = [
            ("activation", why, partial(in_turn, make, product, x)) for why, make in ACTIVATIONS.items()
        ]
        return self._mistake("Gelu", name, actual, product(gelu(x)), mistakes)

    def _mistake(
        self, op: str, unit: str, actual: Tensor, replayed: Tensor, mistakes: Sequence[Mistake]
    ) -> Blame | None:
        return self.mistake(op, unit, actual, replayed, mistakes, FLOATS_DIFFER)

    def _plain(self, unit: str, x_RK: Tensor) -> Tensor:
        """The candidate's product of a linear without a bias."""
        return linear(x_RK, self.ours(f"{unit}.weight"))

    def _product(self, unit: str, x_RK: Tensor) -> Tensor:
        """The candidate's product of a layer's linear, with its bias."""
        return linear(x_RK, self.ours(f"{unit}.weight"), self.ours(f"{unit}.bias"))

    def _rows(self) -> Tensor:
        """The reference's input as rows."""
        return torch.from_numpy(self.given).flatten(0, 1)


def in_turn(first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """One function after the other."""
    return second(first(x))
