"""The sum over ranks in PyTorch: the op `arriero::all_reduce`, over the default group of `torch.distributed`."""

import torch
from torch import Tensor, distributed


@torch.library.custom_op("arriero::all_reduce", mutates_args=())
def all_reduce(part: Tensor, ranks: int) -> Tensor:
    """The sum of every rank's part, on each of them; one rank needs no process group."""
    total = part.clone()
    if ranks > 1:
        assert distributed.get_world_size() == ranks
        distributed.all_reduce(total)
    return total


@all_reduce.register_fake
def _(part, ranks):  # type: ignore[no-untyped-def]
    return torch.empty_like(part)
