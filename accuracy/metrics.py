"""How far a candidate is from the reference, in numbers with their confidence intervals.

Enters: a `Golden` and the candidate's side, run over the same tokens. Leaves: a `Comparison` at each token, and from it
`Estimate`s. Tokens of one text depend on one another, so the intervals come from drawing whole windows anew (bootstrap
percentiles; Efron & Tibshirani 1993, chapter 13).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..spec.types import Progress
from .golden import with_experts
from .probabilities import Logs, log_sum, next_of, predicting, rest_of
from .recorded import Golden
from .sides.side import Experts, Side, likeliest

DRAWS, LEVEL = 2000, 0.95
FEWEST_WINDOWS = 5
"""With fewer windows there is no interval to speak of."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A number and its confidence interval at `LEVEL`; an infinite one where there are too few windows."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """The candidate at each token that has a next one.

    Attributes:
        golden: The reference.
        divergence_WN: Kullback-Leibler divergence of the candidate's distribution from the reference's, nats, over the
            reference's likeliest tokens and one bucket for all others.
        next_logs_WN: The candidate's log-probability of the token that comes.
        likeliest_WN: Its likeliest token.
        experts_LWSK: Its chosen experts; None where they cannot be seen.
        agreed_P: Number of greedy tokens of the reference that it would have chosen too, before the first other one.
    """

    golden: Golden
    divergence_WN: Floats
    next_logs_WN: NDArray[np.float32]
    likeliest_WN: NDArray[np.int32]
    experts_LWSK: Experts | None
    agreed_P: NDArray[np.int64] | None

    @property
    def reference_likeliest_WN(self) -> NDArray[np.int32]:
        """The reference's likeliest tokens."""
        return self.golden.top_ids_WNK[..., 0]

    @property
    def flipped_LWS(self) -> NDArray[np.bool_] | None:
        """Where a router chose other experts."""
        if self.experts_LWSK is None or self.golden.experts_LWSK is None:
            return None
        flipped: NDArray[np.bool_] = (self.experts_LWSK != self.golden.experts_LWSK).any(-1)
        return flipped


def compare(golden: Golden, side: Side, progress: Progress) -> Comparison:
    """Runs the candidate over the reference's tokens.

    Raises:
        AccuracyError: Its logits are not finite.
    """
    data = golden.windows
    ids_WS = data.ids_WS
    windows, length = ids_WS.shape
    divergence = np.zeros((windows, length - 1))
    next_logs = np.zeros((windows, length - 1), np.float32)
    likeliest_WN = np.zeros((windows, length - 1), np.int32)
    experts: Experts | None = None
    for block in side.score(data, golden.decoded, progress):
        part, logits_NV = predicting(block, length, side.path)
        experts = with_experts(experts, block, windows, length)
        if not len(logits_NV):
            continue
        total_N1 = log_sum(logits_NV)
        next_logs[block.row, part] = next_of(logits_NV, ids_WS, block, total_N1)
        likeliest_WN[block.row, part] = logits_NV.argmax(-1)
        divergence[block.row, part] = divergence_of(golden, block.row, part, logits_NV, total_N1)
    agreed = None if golden.continued_PC is None else _agreed(golden, golden.continued_PC, side, progress)
    side.close()
    return Comparison(
        golden=golden,
        divergence_WN=divergence,
        next_logs_WN=next_logs,
        likeliest_WN=likeliest_WN,
        experts_LWSK=experts,
        agreed_P=agreed,
    )


def divergence_of(golden: Golden, row: int, part: slice, logits_NV: Logs, total_N1: Logs) -> Floats:
    """Σ p (log p - log q) over the reference's likeliest tokens and the bucket of all others, [N] in float64."""
    ids_NK, rest_N1 = golden.top_ids_WNK[row, part].astype(np.int64), golden.rest_logs_WN[row, part, None]
    p_NK = np.concatenate([golden.top_logs_WNK[row, part], rest_N1], axis=1).astype(np.float64)
    rest_q_N1 = rest_of(logits_NV, ids_NK)[:, None] - total_N1
    q_NK = np.concatenate([np.take_along_axis(logits_NV, ids_NK, axis=1) - total_N1, rest_q_N1], axis=1)
    with np.errstate(invalid="ignore"):  # where neither has any others, their difference is none
        terms_NK = np.where(p_NK > -np.inf, np.exp(p_NK) * (p_NK - q_NK.astype(np.float64)), 0.0)
    found_N: Floats = terms_NK.sum(-1)
    return found_N


def _agreed(golden: Golden, continued_PC: NDArray[np.int32], side: Side, progress: Progress) -> NDArray[np.int64]:
    """Where greedy continuations part: at the first token that is not the candidate's likeliest."""
    ids_PC, (prompt, begun) = continued_PC.astype(np.int64), golden.beginnings
    likeliest_PC = np.zeros_like(ids_PC)
    windows = golden.windows.at(begun).continued(ids_PC, prompt)
    for block in side.score(windows, 0, progress):
        found_N = likeliest(block.logits_NV, windows.image_token)
        likeliest_PC[block.row, block.start : block.start + len(found_N)] = found_N
    same_PC = likeliest_PC[:, prompt - 1 : -1] == ids_PC[:, prompt:]
    return np.where(same_PC.all(1), same_PC.shape[1], same_PC.argmin(1))


def estimate(
    values_W: NDArray[Any],
    of_mean: Callable[[Floats], Floats] = lambda mean: mean,
    counts_W: NDArray[np.int64] | None = None,
) -> Estimate:
    """A function of the mean over windows, with its interval.

    Args:
        values_W: A number for each window.
        of_mean: The function, of an array of means.
        counts_W: How much each window counts, its tokens; None is one like another.
    """
    values_W = np.asarray(values_W, np.float64)
    weights_W = np.ones(len(values_W)) if counts_W is None else counts_W / counts_W.mean()
    value = float(of_mean(np.average(values_W, weights=weights_W, keepdims=True))[0])
    if len(values_W) < FEWEST_WINDOWS:
        return Estimate(value=value, low=-np.inf, high=np.inf)
    drawn = np.random.default_rng(0).integers(0, len(values_W), (DRAWS, len(values_W)))
    tail = 100 * (1 - LEVEL) / 2
    means = np.average(values_W[drawn], axis=1, weights=weights_W[drawn])
    low, high = np.percentile(of_mean(means), [tail, 100 - tail])
    return Estimate(value=value, low=float(low), high=float(high))


def estimates(seen: Comparison) -> dict[str, Estimate]:
    """All metrics that can be estimated, by name.

    perplexity, reference_perplexity and perplexity_ratio; kl, nats a token; top1, the share of tokens where both find
    the same one likeliest; flips, where one of them finds the token that comes and the other does not; router_flips,
    the share of choices of experts that differ; greedy, tokens that the candidate generates before it parts.
    """
    golden, judged_WN = seen.golden, seen.golden.judged_WN
    counts_W = judged_WN.sum(1)

    def mean(values_WN: NDArray[Any]) -> Floats:
        """Means over each window's tokens that are judged."""
        found_W: Floats = (values_WN * judged_WN).sum(1, dtype=np.float64) / np.maximum(counts_W, 1)
        return found_W

    def over(values_W: Floats, of_mean: Callable[[Floats], Floats] = lambda mean: mean) -> Estimate:
        return estimate(values_W, of_mean, counts_W)

    loss_W, reference_W = -mean(seen.next_logs_WN), -mean(golden.next_logs_WN)
    agrees_WN = seen.likeliest_WN == seen.reference_likeliest_WN
    next_WN = golden.ids_WS[:, 1:]
    flips_WN = (seen.likeliest_WN == next_WN) != (seen.reference_likeliest_WN == next_WN)
    found = {
        "reference_perplexity": over(reference_W, np.exp),
        "perplexity": over(loss_W, np.exp),
        "perplexity_ratio": over(loss_W - reference_W, np.exp),
        "kl": over(mean(seen.divergence_WN)),
        "top1": over(mean(agrees_WN)),
        "flips": over(mean(flips_WN)),
    }
    if (flipped_LWS := seen.flipped_LWS) is not None:
        found["router_flips"] = estimate(flipped_LWS.mean((0, 2)))
    if seen.agreed_P is not None:
        found["greedy"] = estimate(seen.agreed_P)
    return found


def routing_matrix(seen: Comparison) -> NDArray[np.int64] | None:
    """How often a token that the reference sent to one expert (row) went to another (column), over all layers."""
    if seen.flipped_LWS is None or seen.experts_LWSK is None or seen.golden.experts_LWSK is None:
        return None
    size = seen.golden.spec.experts
    matrix = np.zeros((size, size), np.int64)
    theirs, ours = (each.reshape(-1, each.shape[-1]) for each in (seen.golden.experts_LWSK, seen.experts_LWSK))
    for place in range(theirs.shape[1]):
        expert_T = theirs[:, place]
        kept_T = (ours == expert_T[:, None]).any(1)
        other_T = np.where(kept_T, expert_T, ours[:, place])
        np.add.at(matrix, (expert_T, other_T), 1)
    return matrix


def moved_by_layer(seen: Comparison) -> NDArray[np.float64] | None:
    """The share of each expert's tokens that went elsewhere: [L, E], NaN where the reference sent an expert none."""
    if seen.flipped_LWS is None or seen.experts_LWSK is None or seen.golden.experts_LWSK is None:
        return None
    theirs_LTK, ours_LTK = (
        each.reshape(len(each), -1, each.shape[-1]) for each in (seen.golden.experts_LWSK, seen.experts_LWSK)
    )
    sent_LE, moved_LE = (np.zeros((len(theirs_LTK), seen.golden.spec.experts)) for _ in range(2))
    for layer, (theirs_TK, ours_TK) in enumerate(zip(theirs_LTK, ours_LTK, strict=True)):
        kept_TK = (theirs_TK[:, :, None] == ours_TK[:, None, :]).any(-1)
        np.add.at(sent_LE[layer], theirs_TK.ravel(), 1)
        np.add.at(moved_LE[layer], theirs_TK[~kept_TK], 1)
    with np.errstate(invalid="ignore"):
        return np.where(sent_LE > 0, moved_LE / np.maximum(sent_LE, 1), np.nan)
