"""A parameter of a sharded model as users meet it: a 1-D slice. What would need the whole one is refused."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from mics_core.errors import LifecycleError


def slice_of(old: nn.Parameter, name: str, part: torch.Tensor) -> nn.Parameter:
    """The Parameter that stands for `old` on this rank; `part` is its memory, whose gradient the runtime sets."""
    new = nn.Parameter(part, requires_grad=old.requires_grad)
    new.__dict__.update(old.__dict__)  # marks that users put on their parameters
    if new.requires_grad:
        new.register_hook(_refuser(name))  # type: ignore[no-untyped-call]
    return new


def has_hook(parameter: torch.Tensor, own: int = 0) -> bool:
    """Whether a user waits for this parameter's gradient; `own` hooks are ours."""
    late = getattr(parameter, "_post_accumulate_grad_hooks", None)
    return len(parameter._backward_hooks or ()) > own or bool(late)


def check_hooks(name: str, parameter: nn.Parameter) -> None:
    """Raise if a user's hook waits for the gradient of a slice."""
    if has_hook(parameter, own=1):
        raise LifecycleError(
            f"{name}: a hook waits for its gradient and would never be called, as gradients of slices do not come "
            "through autograd: read or change p.grad after mics.clip_grad_norm_"
        )


def _refuser(name: str) -> Callable[[torch.Tensor], None]:
    def refuse(_: torch.Tensor) -> None:
        raise LifecycleError(
            f"{name}: a gradient came to this rank's slice of it, as of a penalty over model.parameters(), and would "
            "be lost: compute the penalty in the forward of the module that holds it, where module.weight is whole"
        )

    return refuse
