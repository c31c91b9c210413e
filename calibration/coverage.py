"""Demands on the routing, and which finished layers keep them.

Enters: the reports of finished layers, and what is asked of their experts. Leaves: the layers that are to be measured
again, and a refusal that names every expert that saw too few tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..errors import StarvedError
from ..spec.choice import choose
from ..spec.recipe import Recipe
from .extent import FLOOR
from .report import LayerReport


@dataclass(frozen=True, kw_only=True, slots=True)
class Coverage:
    """Calibration's demands on the routing.

    Attributes:
        floor: Tokens that every expert must have seen.
        all_experts: Whether every expert is measured over every token.
        falls_back: Whether experts that saw fewer are rounded without statistics of their own.
    """

    floor: int = FLOOR
    all_experts: bool = False
    falls_back: bool = False


def starved(expert_tokens: Sequence[int], floor: int) -> tuple[int, ...]:
    """The experts that saw fewer tokens than the floor."""
    return tuple(expert for expert, tokens in enumerate(expert_tokens) if tokens < floor)


def starved_layers(layers: Sequence[LayerReport], recipe: Recipe, coverage: Coverage) -> dict[int, tuple[int, ...]]:
    """The quantised experts that saw too few tokens, by layer."""
    found = {}
    for index, layer in enumerate(layers):
        is_quantised = choose(recipe, f"layers.{index}.feed_forward.experts").format != "none"
        few = starved(layer.expert_tokens, coverage.floor)
        if few and is_quantised and not layer.all_experts:
            found[index] = few
    return found


def to_measure_again(layers: Sequence[LayerReport], recipe: Recipe, coverage: Coverage, data: str) -> list[int]:
    """The layers that do not fit what is now asked of experts, and would if they were measured again over this data."""
    few_by_layer, found = starved_layers(layers, recipe, coverage), []
    for index, layer in enumerate(layers):
        few = few_by_layer.get(index, ())
        wanted = few if coverage.falls_back and not coverage.all_experts else ()
        can_see_more = coverage.all_experts or layer.data != data
        if tuple(layer.unmeasured) != wanted or (few and can_see_more):
            found.append(index)
    return found


def check_coverage(
    layers: Sequence[LayerReport], recipe: Recipe, coverage: Coverage, notice: Callable[[str], None]
) -> None:
    """Refuses experts that saw too few tokens; `notice` is called with a line a layer, which names them all.

    Raises:
        StarvedError: There are some.
    """
    found = {} if coverage.falls_back else starved_layers(layers, recipe, coverage)
    if not found:
        return
    seen = {index: [layers[index].expert_tokens[expert] for expert in few] for index, few in found.items()}
    for index, few in found.items():
        each = ", ".join(f"{expert} ({tokens})" for expert, tokens in zip(few, seen[index], strict=True))
        notice(f"Layer {index}, experts that saw too few tokens: {each}")
    count, fewest = sum(map(len, found.values())), min(map(min, seen.values()))
    first = next(iter(found))
    raise StarvedError(
        f"layer {first}: expert {found[first][0]} saw {seen[first][0]} tokens, fewer than {coverage.floor} ({count} "
        f"experts in {len(found)} of {len(layers)} layers did); all layers are kept. Run it again with more --data or "
        f"--samples, which measures these layers alone again; with a lower --floor ({fewest} takes all); with "
        "--all-experts, which measures every expert over every token; or with --floor-action fallback, which rounds "
        "these experts without statistics of their own"
    )
