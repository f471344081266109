"""A parameter of a sharded model as users meet it: a 1-D slice. What would need the whole one is refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import nn

from mics_core.errors import ConfigError, LifecycleError


def slice_of(old: nn.Parameter, name: str, part: torch.Tensor) -> nn.Parameter:
    """The Parameter that stands for `old` on this rank; `part` is its memory, whose gradient the runtime sets."""
    new = nn.Parameter(part, requires_grad=old.requires_grad)
    new.__dict__.update(old.__dict__)  # marks that users put on their parameters
    new.mics_shape = old.shape  # type: ignore[attr-defined]
    if new.requires_grad:
        new.register_hook(_refuser(name))  # type: ignore[no-untyped-call]
    return new


def shape_of(parameter: torch.Tensor) -> torch.Size:
    """The shape of the whole parameter, of which a sharded model has a 1-D slice; of any other tensor its own.

    >>> matrices = [p for p in model.parameters() if len(mics.shape_of(p)) > 1]    # doctest: +SKIP
    """
    if not isinstance(parameter, torch.Tensor):
        raise ConfigError(f"shape_of: got a {type(parameter).__name__}, expected a parameter or another tensor")
    shape: torch.Size = getattr(parameter, "mics_shape", parameter.shape)
    return shape


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


def warn_of_state_dict() -> None:
    """Say what a state dict holds, for whoever wants to write it to a file."""
    warnings.warn(
        "state_dict: it holds this rank's 1-D slices, which no other rank and no plain model can load: take it inside "
        "mics.full_params for whole weights, or call mics.save",
        stacklevel=4,
    )


def check_decay(optimizer: torch.optim.Optimizer) -> None:
    """Raise if parameters were sorted by a number of dimensions that they had before they were cut."""
    empty = any(group.get("weight_decay") and not group["params"] for group in optimizer.param_groups)
    spared = [p for group in optimizer.param_groups if not group.get("weight_decay") for p in group["params"]]
    if empty and any(len(shape_of(parameter)) > parameter.dim() for parameter in spared):
        raise ConfigError(
            f"{type(optimizer).__name__}: the group that decays holds no parameter, and matrices are in one that does "
            "not: parameters of a sharded model are 1-D slices, so sort by len(mics.shape_of(p)), or leave the empty "
            "group out"
        )


def _refuser(name: str) -> Callable[[torch.Tensor], None]:
    def refuse(_: torch.Tensor) -> None:
        raise LifecycleError(
            f"{name}: a gradient came to this rank's slice of it, as of a penalty over model.parameters(), and would "
            "be lost: compute the penalty in the forward of the module that holds it, where module.weight is whole"
        )

    return refuse
