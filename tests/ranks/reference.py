"""What a sharded model is compared with: a whole one, of which each rank has a copy and all have the same gradients.

Each copy sees its own rank's data, as the sharded model does. So a rank does the work of one rank, and not of all.
"""

from typing import Any

import torch.distributed as dist
from torch import nn


def sum_gradients(model: nn.Module) -> None:
    """Make every copy's gradients the sum of all copies', added up in the order of ranks: the same bits on all."""
    mine = [None if parameter.grad is None else parameter.grad.cpu() for parameter in model.parameters()]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    for parameter, *grads in zip(model.parameters(), *everyone, strict=True):
        present = [grad.to(parameter.device) for grad in grads if grad is not None]
        parameter.grad = sum(present[1:], present[0]) if present else None
