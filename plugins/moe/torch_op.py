"""Mixture-of-experts dispatch in PyTorch: the op `arriero::moe_dispatch`, which computes for real on any device.

Only the chosen experts are computed, each once over all of its tokens, so the cost follows the tokens and not the
number of experts.
"""

import torch
from torch import Tensor
from torch.nn.functional import silu

from .op import Attributes


def dispatch(hidden: Tensor, router_logits: Tensor, gate_up: Tensor, down: Tensor, attributes: Attributes) -> Tensor:
    """Sends tokens [T, H] through their experts, differentiably; see `op` for the shapes.

    Scores are computed in float32 and cast to the model's dtype; a token's experts are added in float32.
    """
    logits_TK, experts_TK = router_logits.topk(attributes.top_k, dim=1)
    scores_TK = logits_TK.float().sigmoid().to(hidden.dtype)
    output_TH = torch.zeros_like(hidden, dtype=torch.float32)
    for chosen in experts_TK.unique().tolist():
        expert = chosen - attributes.first_expert
        if not 0 <= expert < len(gate_up):
            continue
        tokens_N, choice_N = (experts_TK == chosen).nonzero(as_tuple=True)
        expert_input_NH = hidden[tokens_N] * scores_TK[tokens_N, choice_N, None]
        gate_NI, up_NI = (expert_input_NH @ gate_up[expert]).chunk(2, dim=-1)
        output_TH.index_add_(0, tokens_N, ((up_NI * silu(gate_NI)) @ down[expert]).float())
    return output_TH.to(hidden.dtype)


@torch.library.custom_op("arriero::moe_dispatch", mutates_args=())
def moe_dispatch(
    hidden: Tensor,
    router_logits: Tensor,
    gate_up: Tensor,
    down: Tensor,
    top_k: int,
    activation: str,
    first_expert: int = 0,
) -> Tensor:
    """The op that export traces; see `op` for the shapes."""
    attributes = Attributes(top_k=top_k, activation=activation, first_expert=first_expert)
    return dispatch(hidden, router_logits, gate_up, down, attributes)


@moe_dispatch.register_fake
def _(hidden, *_):  # type: ignore[no-untyped-def]
    return torch.empty_like(hidden)
