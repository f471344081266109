"""What a sharded model is compared with: a whole one, of which each rank has a copy and all have the same gradients.

Each copy sees its own rank's data, as the sharded model does. So a rank does the work of one rank, and not of all.
"""

import torch
import torch.distributed as dist
from torch import nn


def sum_gradients(model: nn.Module) -> None:
    """Make every copy's gradients the sum of all copies', in float64: the same bits on all, whose order is one."""
    parameters = list(model.parameters())
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    there = torch.tensor([p.grad is not None for p in parameters], device=grads[0].device)
    mine = torch.cat([*[grad.detach().reshape(-1).double() for grad in grads], there.double()])
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    *sums, there = torch.stack(everyone).sum(0).split([*[grad.numel() for grad in grads], len(parameters)])
    for parameter, total, holders in zip(parameters, sums, there.tolist(), strict=True):
        parameter.grad = total.view_as(parameter).to(parameter.dtype) if holders else None
