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
from ...walk.decoder import Hidden
from ...walk.tower import normed
from .decoder import Units
from .decoder_suspects import EXPLAINED, FLOATS_DIFFER, Blame, Mistake, moved_octaves
from .readings import Reading
from .tower import STEM, TorchTower, Tower
from .weight_differences import ALIKE, HALVES, describe, difference, half_split

TURNED = ("self_attn.q_proj", "self_attn.k_proj")
NORMS = {"self_attn": "input_layernorm", "mlp": "post_attention_layernorm"}
"""Of each half of a layer."""

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
"""What the units before and behind the layers read."""

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


def blame_tower(reading: Reading, reference: TorchTower, candidate: Tower, given: Hidden) -> Blame:
    """Says what is wrong with a unit.

    Args:
        reading: Of the unit that is out of line.
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


class _Suspects:
    """One part of the tower under suspicion."""

    def __init__(self, reading: Reading, reference: TorchTower, candidate: Tower, given: Hidden) -> None:
        self.index, self.unit = reading.layer, reading.unit
        self.reference, self.candidate, self.given = reference, candidate, given
        self.vision = reference.vision
        self.explained = max(EXPLAINED * reading.expected, FLOATS_DIFFER)
        self.is_rounded = reading.expected > FLOATS_DIFFER
        self.ours = self._run(candidate)

    def _run(self, tower: Tower) -> Units:
        """The part that the unit lies in."""
        if self.unit in (PATCHES, STEM):
            return tower.stem(self.given)
        if self.unit in TENSORS:
            return tower.head(self.given)
        if self.unit.startswith("mlp.") or self.unit == "out":
            return tower.feed(self.index, self.given)
        return tower.attend(self.index, self.given)

    # Units

    def first_linear(self) -> Blame:
        """A linear whose input is the layer's norm."""
        norm, x = self._norm(), self._rows()
        ratio_K = self._norm_ratio(norm)
        return (
            self._weight(self.unit, norm, ratio_K)
            or self._bias(f"{norm}.bias", ratio_K)
            or self._bias(f"{self.unit}.bias")
            or self._linear(normed(self.candidate.weights, self._full(norm), x))
        )

    def attention(self) -> Blame:
        """Attention and what its output goes through, queries and keys being right."""
        query, key, value = (self.ours[f"self_attn.{part}_proj"] for part in "qkv")
        actual, replayed = self.ours["self_attn"], self._attend(query, key, value)
        if difference(replayed, actual) > FLOATS_DIFFER:
            name, mistakes = self._full("self_attn"), list(self._attention_mistakes(query, key, value))
            return self._mistake("Attention", name, actual, replayed, mistakes) or self._op("Attention", name)
        return self._value_or_output() or self._linear(actual, "self_attn.o_proj")

    def second_linear(self) -> Blame:
        """The feed-forward's second linear, the first being right."""
        name = f"{VISION_LAYERS}{self.index}.mlp"
        return (
            self._tensor(self._full("mlp.fc2.weight"))
            or self._bias("mlp.fc2.bias")
            or self._activation(name, "mlp.fc1", lambda x: self._product("mlp.fc2", x))
            or self._linear(gelu(self.ours["mlp.fc1"]))
        )

    def sum(self) -> Blame:
        """A half's residual, the half being right."""
        before, part = self._rows(), "self_attn.o_proj" if self.unit == "attended" else "mlp.fc2"
        owner, actual = self._full(part.partition(".")[0]), self.ours[self.unit]
        if difference(self.ours[part], actual) <= ALIKE:
            return Blame(kind="op", op="Add", name=owner, why="what enters it is not added to what it computes")
        if difference(before, actual) <= self.explained:
            return Blame(kind="op", op="Add", name=owner, why="it is dropped: the layer's output lacks it")
        return Blame(kind="op", op="Add", name=owner, why="its parts are right, their sum is not")

    def end(self, unit: str) -> Blame:
        """A unit of the stem or of the head."""
        for name in TENSORS[unit]:
            if found := self._tensor(name):
                return found
        if unit in (ADAPTER[1], PROJECTOR):
            before = ADAPTER[0] if unit == ADAPTER[1] else ADAPTER[1]
            found = self._activation("vision_model.vision_adapter.mlp", before, lambda x: self._plain(unit, x))
            return found or self._op("MatMul", unit)
        op, owner, make = {
            PATCHES: ("Transpose", "vision_model.patch_embedding", self._patches),
            STEM: ("Concat", "vision_model", self._placed),
            ADAPTER[0]: ("Transpose", "vision_model.vision_adapter", self._shuffled),
        }[unit]
        replayed, mistakes = make()
        return self._mistake(op, owner, self.ours[unit], replayed, mistakes) or self._op("MatMul", unit)

    # Tensors

    def _tensor(self, name: str, ours: Tensor | None = None, theirs: Tensor | None = None) -> Blame | None:
        """One that is not what the reference has under the same name."""
        if name not in self.candidate.weights.regions:
            return Blame(kind="op", op="Add", name=name, why="it is left out")
        theirs = self.reference.weights.wide(name) if theirs is None else theirs
        ours = self.candidate.weights.wide(name) if ours is None else ours
        flat = theirs.ndim == 1
        why = describe(theirs[None] if flat else theirs, ours[None] if flat else ours, self.explained)
        if why is None:
            return None
        return Blame(kind="tensor", op="Add" if flat else "MatMul", name=name, why=why)

    def _weight(self, unit: str, norm: str, ratio_K: Tensor) -> Blame | None:
        """A weight read through its norm, whose channels a quantiser may divide."""
        name = self._full(f"{unit}.weight")
        theirs, ours = self.reference.weights.wide(name), self.candidate.weights.wide(name)
        through = ours * ratio_K
        head_dim = self.vision.head_dim if unit in TURNED else None
        why = describe(theirs, through, self.explained, head_dim=head_dim, factor_K=1 / ratio_K)
        if why is None:
            return None
        if describe(theirs, ours, self.explained) is None:
            return self._tensor(self._full(f"{norm}.weight"))
        for other in (f"self_attn.{part}_proj" for part in "qkv") if unit.startswith("self_attn") else ():
            another = self.reference.weights.wide(self._full(f"{other}.weight"))
            if other != unit and describe(another, through, max(self.explained, ALIKE)) is None:
                return Blame(kind="tensor", op="MatMul", name=name, why=f"it has the weights of {other}")
        if why == HALVES:
            why = f"of {unit} and its like: {why}"
            return Blame(
                kind="attribute", op="Attention", name=self._full("self_attn"), attribute="rope layout", why=why
            )
        return Blame(kind="tensor", op="MatMul", name=name, why=why)

    def _bias(self, name: str, ratio_K: Tensor | float = 1.0) -> Blame | None:
        """A bias of a linear or a norm whose channels come out times a ratio of what the reference's do."""
        full = self._full(name)
        ours = self.candidate.weights.wide(full) / ratio_K if full in self.candidate.weights.regions else None
        return self._tensor(full, ours)

    def _value_or_output(self) -> Blame | None:
        """Values' or the output's linear, between whose channels a quantiser may have moved powers of two."""
        value, output = (self._full(f"self_attn.{part}_proj.weight") for part in "vo")
        ours_NK, ratio_K = self.candidate.weights.wide(output), self._norm_ratio(NORMS["self_attn"])
        octaves_K = torch.zeros(ours_NK.shape[1])
        if self.is_rounded:
            octaves_K = moved_octaves(self.reference.weights.wide(output), ours_NK)
        factor_K = torch.exp2(octaves_K)
        return (
            self._tensor(value, self.candidate.weights.wide(value) * ratio_K * factor_K[:, None])
            or self._bias("self_attn.v_proj.bias", 1 / factor_K)
            or self._tensor(output, ours_NK / factor_K)
            or self._bias("self_attn.o_proj.bias")
        )

    def _norm(self) -> str:
        return NORMS[self.unit.partition(".")[0]]

    def _norm_ratio(self, norm: str) -> Tensor:
        """What the candidate's norm has more than the reference's, [C]."""
        name = self._full(f"{norm}.weight")
        theirs, ours = self.reference.weights.wide(name), self.candidate.weights.wide(name)
        return torch.where((theirs == 0) | (ours == 0), 1.0, ours / theirs)

    # Mistakes

    def _linear(self, x_RK: Tensor, unit: str | None = None) -> Blame:
        """A linear whose tensors are right: its bias is not added, its input's scale is wrong, or what it computes."""
        unit = unit or self.unit
        name, actual = self._full(unit), self.ours[unit]
        whole, bias = self._product(unit, x_RK), self.candidate.weights.wide(f"{name}.bias")
        if difference(whole - bias, actual) <= max(FLOATS_DIFFER, ALIKE * difference(whole, actual)):
            return Blame(kind="op", op="Add", name=f"{name}.bias", why="it is not added")
        return self._op("MatMul", name)

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
        """What leaves the stem, and with mistakes behind the patches' product."""
        weights, size = self.candidate.weights, self.vision.hidden_size
        patches = self.ours[PATCHES].view(len(self.given), -1, size)
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
        patches = normed(self.candidate.weights, "vision_model.layernorm_post", x_NSC)

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
        x, actual = self.ours[before], self.ours[self.unit]
        mistakes: list[Mistake] = [
            ("activation", why, partial(in_turn, make, product, x)) for why, make in ACTIVATIONS.items()
        ]
        return self._mistake("Gelu", name, actual, product(gelu(x)), mistakes)

    def _mistake(
        self, op: str, name: str, actual: Tensor, replayed: Tensor, mistakes: Sequence[Mistake]
    ) -> Blame | None:
        """The mistake that comes out as the candidate computes it, where the right way does not."""
        differs = difference(replayed, actual)
        if differs <= FLOATS_DIFFER:
            return None
        least, attribute, why = min((difference(make(), actual), attribute, why) for attribute, why, make in mistakes)
        if least > max(FLOATS_DIFFER, ALIKE * differs):
            return None
        return Blame(kind="attribute", op=op, name=name, attribute=attribute, why=why)

    def _plain(self, unit: str, x_RK: Tensor) -> Tensor:
        """The candidate's product of a linear without a bias."""
        return linear(x_RK, self.candidate.weights.wide(f"{unit}.weight"))

    def _product(self, unit: str, x_RK: Tensor) -> Tensor:
        """The same of a layer's linear, with its bias."""
        name, weights = self._full(unit), self.candidate.weights
        return linear(x_RK, weights.wide(f"{name}.weight"), weights.wide(f"{name}.bias"))

    def _rows(self) -> Tensor:
        """The reference's input as rows."""
        return torch.from_numpy(self.given).flatten(0, 1)

    def _op(self, op: str, name: str) -> Blame:
        why = "what it computes is no mistake that is known"
        if op == "MatMul":
            why = "the scale of its input is not, or what it computes"
        return Blame(kind="op", op=op, name=name, why=f"its weights are right: {why}")

    def _full(self, name: str) -> str:
        return f"{VISION_LAYERS}{self.index}.{name}"


def in_turn(first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """One function after the other."""
    return second(first(x))
