"""Limits that a candidate must keep, and the verdict.

Enters: estimates with their intervals. Leaves: an outcome for each limit. A limit is kept where the whole interval
keeps it, broken where the whole interval breaks it; between the two there is not enough data to tell.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from .metrics import Estimate

Outcome = Literal["pass", "regressed", "undecided"]

METRICS = {
    "perplexity_ratio": ("max", "perplexity over the reference's"),
    "kl": ("max", "divergence from the reference, nats a token"),
    "top1": ("min", "tokens where both find the same one likeliest"),
    "flips": ("max", "tokens that one of them gets right and the other does not"),
    "router_flips": ("max", "choices of experts that differ"),
    "greedy": ("min", "tokens generated alike"),
}
"""Metrics that can be limited: from which side, and what each is."""

DEFAULTS: dict[str, dict[str, float]] = {
    "none": {"perplexity_ratio": 1.002, "kl": 0.002, "top1": 0.98},
    "int8": {"perplexity_ratio": 1.015, "kl": 0.03, "top1": 0.92},
    "fp8": {"perplexity_ratio": 1.02, "kl": 0.05, "top1": 0.88},
    "int4": {"perplexity_ratio": 1.05, "kl": 0.12, "top1": 0.82},
}
"""Limits by the candidate's format. They hold a good quantiser of a small model; large ones keep them with ease."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """One limit, kept or not.

    Attributes:
        metric: Name of the metric.
        limit: The limit.
        side: `max` or `min`.
        found: The estimate; None where the metric cannot be estimated.
        outcome: Kept, broken, or not enough data to tell.
        origin: Where the limit comes from: `default`, `file` or `given`.
    """

    metric: str
    limit: float
    side: str
    found: Estimate | None
    outcome: Outcome
    origin: str = "default"


def judge(
    found: Mapping[str, Estimate], limits: Mapping[str, float], origins: Mapping[str, str] | None = None
) -> tuple[Judgement, ...]:
    """Holds estimates against limits, of which `origins` says where each comes from."""
    judgements = []
    for metric, limit in limits.items():
        side, estimate = METRICS[metric][0], found.get(metric)
        outcome: Outcome = "undecided"
        if estimate is not None:
            worst, best = (estimate.high, estimate.low) if side == "max" else (-estimate.low, -estimate.high)
            bound = limit if side == "max" else -limit
            outcome = "pass" if worst <= bound else "regressed" if best > bound else "undecided"
        origin = (origins or {}).get(metric, "default")
        judgements.append(
            Judgement(metric=metric, limit=limit, side=side, found=estimate, outcome=outcome, origin=origin)
        )
    return tuple(judgements)


def overall(judgements: Sequence[Judgement]) -> Outcome:
    """Regressed where a limit is broken, undecided where one is open, else pass."""
    outcomes = {judgement.outcome for judgement in judgements}
    return "regressed" if "regressed" in outcomes else "undecided" if "undecided" in outcomes else "pass"
