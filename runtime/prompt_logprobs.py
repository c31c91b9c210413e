"""Log-probabilities of a prompt's own tokens, as those who score texts by a model ask for them.

Enters: a session and token ids. Leaves: each token's log-probability behind those before it. Invariant: a step reads
few tokens, so that whoever else uses the session waits for no more.
"""

from collections.abc import Sequence

from .logprobs import TokenLogprobs, read_logprobs
from .token_session import TokenSession

PIECE = 64
"""Tokens of a step."""


def prompt_logprobs(session: TokenSession, prompts: Sequence[Sequence[int]], top: int) -> list[list[TokenLogprobs]]:
    """Computes the log-probabilities of prompts' tokens, but of each first one, which nothing comes before.

    Args:
        session: The model; a row of its own is taken for each prompt, one after another.
        prompts: Token ids, one or more of each.
        top: The likeliest tokens in each place that are given as well.

    Raises:
        SessionError: The session does not hold that many tokens, or an id is none of its vocabulary's.
    """
    return [_of_one(session, ids, top) for ids in prompts]


def _of_one(session: TokenSession, ids: Sequence[int], top: int) -> list[TokenLogprobs]:
    found: list[TokenLogprobs] = []
    if len(ids) < 2:
        return found
    state = session.start(1, len(ids), sparse=True)
    for first in range(0, len(ids) - 1, PIECE):
        for _, _, logits_SV in session.extend(state, [ids[first : min(first + PIECE, len(ids) - 1)]]):
            for logits_V in logits_SV:
                found.append(read_logprobs(logits_V, ids[len(found) + 1], top))
    return found
