"""Why a unit of a decoder is out of line: its tensor, an attribute of its op, or the op.

Enters: both sides' decoders, and the reference's input of the half in which the unit lies. Leaves: a `Blame`. First the
candidate's own weights are put through the reference's arithmetic. What comes out as the candidate computes it is the
fault of a tensor, which is then compared with the reference's. Otherwise known mistakes are made on purpose, and the
one that comes out as the candidate computes it is named.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import silu

from ...spec.geometry import LayerSpec, ModelSpec
from ...walk.numbers import Weights
from .decoder_units import CUSTOM, DecoderUnits, TorchDecoder
from .evidence import DROPPED, Evidence, Mistake, explained_by
from .location import Blame, Reading
from .part_walk import Half, run_half
from .units import Hidden
from .weight_differences import ALIKE, describe, difference, half_split


def blame(reading: Reading, reference: TorchDecoder, candidate: DecoderUnits, x_WSH: Sequence[Hidden]) -> Blame:
    """Says what is wrong with a unit of a layer.

    Args:
        reading: The unit that is out of line.
        reference: The reference's decoder.
        candidate: The candidate's.
        x_WSH: The reference's input of the half in which the unit lies, a window each.
    """
    suspects = _Suspects(reading, reference, candidate, x_WSH)
    match reading.unit:
        case "self_attn" | "self_attn.o_proj" | "attended":
            return suspects.attention()
        case "feed_forward.experts":
            return suspects.experts()
        case "out":
            return suspects.sum_of_parts()
        case unit if unit.endswith("down_proj"):
            return suspects.feed_forward(unit)
    return suspects.read_through(reading.unit) or suspects.input_or_op(reading.unit)


def blame_ends(reading: Reading, reference: TorchDecoder, candidate: DecoderUnits) -> Blame:
    """Says what is wrong with the embedding or the head."""
    unit, tied = reading.unit, reference.spec.tied_embeddings
    names = ["embed_tokens"] if unit == "embed_tokens" else ["norm", "embed_tokens" if tied else "lm_head"]
    for name in names:
        theirs, ours = (each.weights.wide(f"{name}.weight") for each in (reference, candidate))
        if why := describe(theirs.view(len(theirs), -1), ours.view(len(ours), -1), explained_by(reading)):
            full = reference.weights.full_names[f"{name}.weight"]
            return Blame(kind="tensor", op="Gather" if unit == "embed_tokens" else "MatMul", name=full, why=why)
    return Blame(kind="op", op="MatMul", name=unit, why="its weights are right, what is computed from them is not")


class _Suspects(Evidence):
    """One half of one layer under suspicion."""

    def __init__(
        self, reading: Reading, reference: TorchDecoder, candidate: DecoderUnits, x_WSH: Sequence[Hidden]
    ) -> None:
        spec = reference.spec
        super().__init__(
            reading,
            reference.weights,
            candidate.weights,
            prefix=f"layers.{reading.layer}.",
            attention=CUSTOM["self_attn"],
            heads=(spec.kv_heads, spec.head_dim),
        )
        self.index, self.reference, self.candidate, self.x_WSH = reading.layer, reference, candidate, x_WSH
        self.spec, self.layer = spec, spec.layers[reading.layer]

    # Tensors

    def norm_blame(self, norm: str, why: str) -> Blame:
        """A norm's weight, which makes a right weight a wrong one that differs as `why` says."""
        return self.tensor_blame("MatMul", f"{norm}.weight", f"of {norm}: {why.replace('its rows', 'what reads it')}")

    def attention(self) -> Blame:
        """The attention op and what it reads and feeds."""
        unit = "self_attn.o_proj"
        actual = self._of_candidate("attend", unit)
        replayed = self._replay("attend", unit, self.spec)
        if self._explains(replayed, actual, self._of_reference("attend", unit)):
            return self._either("self_attn.v_proj", unit)
        whole = self._of_candidate("attend", "self_attn")  # the op itself, before its output is multiplied
        if difference(self._replay("attend", "self_attn", self.spec), whole) <= self.explained:
            return self.input_or_op(unit)
        for mistakes in (self._described(), self._attention_mistakes()):
            found = self.mistake(self.attention_op, "self_attn", actual, replayed, list(mistakes), self.explained)
            if found is not None:
                return found
        why = "its weights are right, what it computes is no mistake that is known"
        return self.op_blame(self.attention_op, "self_attn", why)

    def feed_forward(self, unit: str) -> Blame:
        """The dense feed-forward or the shared expert, gate and up being right."""
        actual, replayed = self._of_candidate("feed", unit), self._replay("feed", unit, self.spec)
        if not self._explains(replayed, actual, self._of_reference("feed", unit)):
            return self.input_or_op(unit)
        return self._either(unit.replace("down_proj", "up_proj"), unit)

    def experts(self) -> Blame:
        """The routed experts, the router being right."""
        unit = "feed_forward.experts"
        actual, replayed = self._of_candidate("feed", unit), self._replay("feed", unit, self.spec)
        if self._explains(replayed, actual, self._of_reference("feed", unit)):
            return self._expert_tensor()
        mistakes = list(self._expert_mistakes())
        return self.mistake(CUSTOM[unit], unit, actual, replayed, mistakes, self.explained) or self.input_or_op(unit)

    def sum_of_parts(self) -> Blame:
        """The sum that leaves the layer, its parts being right."""
        parts = ["feed_forward.down_proj"]
        if self.layer.experts:
            parts = ["feed_forward.shared_expert.down_proj", "feed_forward.experts"]
        units = [self.reference.feed(self.index, x_SH) for x_SH in self.x_WSH]
        actual = torch.cat([
            self.candidate.feed(self.index, x_SH)["out"] - torch.from_numpy(x_SH) for x_SH in self.x_WSH
        ])  # fmt: skip
        whole = torch.cat([sum((each[part] for part in parts), torch.zeros(())) for each in units])
        for part in parts:
            without = whole - torch.cat([each[part] for each in units])
            if difference(without, actual) <= ALIKE or not actual.any():
                owner = part.removesuffix(".down_proj")
                return self.op_blame("Add", owner, DROPPED)
        return self.op_blame("MatMul", "feed_forward", "its parts are right, their sum is not")

    def input_or_op(self, unit: str) -> Blame:
        """A unit whose weights are right: its input's static scale is not, or what it computes."""
        return self.op_blame(CUSTOM.get(unit, "MatMul"), unit)

    def _either(self, before: str, after: str) -> Blame:
        """Which of two linears is wrong, between whose channels a quantiser may have moved powers of two."""
        ours_before, ours_after, _ = self.without_moved(before, after)
        for unit, ours in ((before, ours_before), (after, ours_after)):
            if why := describe(self.theirs(f"{unit}.weight"), ours, self.explained):
                return self.tensor_blame("MatMul", f"{unit}.weight", why)
        return self.input_or_op(after)

    def _expert_tensor(self) -> Blame:
        """The first expert whose weights are not its own."""
        unit = "feed_forward.experts"
        ratio_H1 = self.norm_ratio("post_attention_layernorm")[:, None]
        for expert in range(self.spec.experts):
            for part, reads_norm in (("gate_up_proj", True), ("down_proj", False)):
                name = f"{unit}.{part}"
                theirs = self._expert_part(self.reference, name, expert)
                ours = self._expert_part(self.candidate, name, expert) * (ratio_H1 if reads_norm else 1.0)
                if not reads_norm:
                    ours = ours / torch.exp2(self.moved(theirs.T, ours.T))[:, None]
                if (why := describe(theirs.T, ours.T, self.explained)) is None:
                    continue
                for other in range(self.spec.experts):
                    another = self._expert_part(self.reference, name, other)
                    if other != expert and describe(another.T, ours.T, max(self.explained, ALIKE)) is None:
                        why = f"expert {expert} has the weights of expert {other}"
                        break
                else:
                    why = f"of expert {expert}: {why}"
                return self.tensor_blame(CUSTOM[unit], name, why)
        return self.input_or_op(unit)

    def _expert_part(self, layers: DecoderUnits, name: str, expert: int) -> Tensor:
        """An expert's weight; of gate and up the gate, whose channels no quantiser divides."""
        weight = layers.weights.wide(f"layers.{self.index}.{name}", expert)
        return weight[:, : self.spec.expert_size] if name.endswith("gate_up_proj") else weight

    # Mistakes

    def _described(self) -> Iterator[Mistake]:
        """Differences of the candidate's own description."""
        ours, theirs = self.candidate.spec, self.spec
        for field in dataclasses.fields(LayerSpec):
            value = getattr(ours.layers[self.index], field.name)
            if value != getattr(self.layer, field.name):
                spec = self._with_layer(**{field.name: value})
                yield field.name, f"it is {value}, in the reference {getattr(self.layer, field.name)}", self._run(spec)
        for name in ("rope_theta", "rope_scaling", "qk_norm", "norm_eps", "temperature_scale", "temperature_floor"):
            if getattr(ours, name) != getattr(theirs, name):
                spec = dataclasses.replace(theirs, **{name: getattr(ours, name)})
                yield name, f"it is {getattr(ours, name)}, in the reference {getattr(theirs, name)}", self._run(spec)

    def _attention_mistakes(self) -> Iterator[Mistake]:
        """Mistakes that exporters and kernels make in attention."""
        layer, spec = self.layer, self.spec
        if layer.chunk:
            for chunk in (layer.chunk - 1, layer.chunk + 1):
                yield (
                    "chunk",
                    f"chunks end after {chunk} positions, not {layer.chunk}",
                    self._run(self._with_layer(chunk=chunk)),
                )
            yield "chunk", "attention goes beyond its chunk", self._run(self._with_layer(chunk=0))
        elif spec.chunk:
            yield (
                "chunk",
                "attention is cut into chunks, and should be full",
                self._run(self._with_layer(chunk=spec.chunk)),
            )
        if layer.rope:
            yield "rope layout", "RoPE turns halves of a head, not neighbouring pairs", self._run(spec, halves=True)
            yield "rope", "queries and keys are not turned", self._run(dataclasses.replace(spec, rope_theta=1e30))
            if spec.rope_scaling is not None:
                plain = dataclasses.replace(spec, rope_scaling=None)
                yield "rope scaling", "RoPE's frequencies are not scaled", self._run(plain)
            other = dataclasses.replace(spec, qk_norm=not spec.qk_norm)
            yield "qk_norm", "there is none" if spec.qk_norm else "there is one", self._run(other)
        else:
            yield "rope", "queries and keys are turned, and should not be", self._run(self._with_layer(rope=True))
            if spec.temperature_scale:
                plain = dataclasses.replace(spec, temperature_scale=0.0)
                yield "temperature", "queries are not tuned by their position", self._run(plain)

    def _run(self, spec: ModelSpec, *, halves: bool = False) -> Callable[[], Tensor]:
        return lambda: self._replay("attend", "self_attn.o_proj", spec, halves=halves)

    def _with_layer(self, **fields: object) -> ModelSpec:
        layers = list(self.spec.layers)
        layers[self.index] = dataclasses.replace(self.layer, **fields)  # type: ignore[arg-type]
        return dataclasses.replace(self.spec, layers=tuple(layers))

    def _expert_mistakes(self) -> Iterator[Mistake]:
        """Mistakes in routing's scores and in the experts' arithmetic."""
        yield "router score", "it multiplies the experts' output, not their input", lambda: self._routed(on_output=True)
        yield "router score", "it is left out", lambda: self._routed(scores=torch.ones_like)
        yield "router score", "it is a softmax, not a sigmoid", lambda: self._routed(scores=lambda x: x.softmax(-1))
        yield "activation", "gate and up are exchanged", lambda: self._routed(exchanged=True)

    def _routed(
        self,
        *,
        on_output: bool = False,
        exchanged: bool = False,
        scores: Callable[[Tensor], Tensor] = torch.sigmoid,
    ) -> Tensor:
        """The candidate's experts over all windows, with a mistake."""
        layers, outputs = TorchDecoder(self.spec, self.candidate.weights), []
        for x_SH in self.x_WSH:
            layers.feed(self.index, x_SH)
            x_TH, logits_TE = layers.inputs["feed_input"], layers.walk.router_logits_TE
            chosen_TK, scores_TE = layers.walk.chosen(), scores(logits_TE)
            out_TH = torch.zeros_like(x_TH)
            for expert in range(self.spec.experts):
                tokens_N = (chosen_TK == expert).any(1).nonzero()[:, 0]
                if not len(tokens_N):
                    continue
                gate_up, down = layers.expert(expert)
                score_N1, x_NH = scores_TE[tokens_N, expert, None], x_TH[tokens_N]
                gate_NI, up_NI = (x_NH * (1.0 if on_output else score_N1) @ gate_up).chunk(2, dim=1)
                active_NI = gate_NI * silu(up_NI) if exchanged else up_NI * silu(gate_NI)
                out_TH[tokens_N] += active_NI @ down * (score_N1 if on_output else 1.0)
            outputs.append(out_TH)
        return torch.cat(outputs)

    # Both sides over all windows

    def _of_candidate(self, half: Half, unit: str) -> Tensor:
        return self._over_windows(self.candidate, half, unit)

    def _of_reference(self, half: Half, unit: str) -> Tensor:
        return self._over_windows(self.reference, half, unit)

    def _replay(self, half: Half, unit: str, spec: ModelSpec, *, halves: bool = False) -> Tensor:
        """The candidate's weights in the reference's arithmetic."""
        weights = HalfSplit(self.candidate.weights, spec.head_dim) if halves else self.candidate.weights
        return self._over_windows(TorchDecoder(spec, weights), half, unit)

    def _over_windows(self, layers: DecoderUnits, half: Half, unit: str) -> Tensor:
        return torch.cat([run_half(layers, half, self.index, x_SH)[unit] for x_SH in self.x_WSH])

    def _explains(self, replayed: Tensor, actual: Tensor, reference: Tensor) -> bool:
        """Whether most of what the candidate has otherwise comes from its weights."""
        return difference(replayed, actual) <= max(self.explained, ALIKE * difference(reference, actual))


class HalfSplit(Weights):
    """Another's weights, whose heads' queries and keys stand as a RoPE over halves finds them."""

    def __init__(self, weights: Weights, head_dim: int) -> None:
        super().__init__({}, device=weights.device)
        self.weights, self.head_dim = weights, head_dim

    def factor(self, name: str, index: int | None = None) -> Tensor:
        """A product's weight as `wide` makes it."""
        return self.wide(name, index)

    def wide(self, name: str, index: int | None = None) -> Tensor:
        """A tensor in float32."""
        weight = self.weights.wide(name, index)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            return weight[half_split(len(weight), self.head_dim).argsort()]
        return weight
