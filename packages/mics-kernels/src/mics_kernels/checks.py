"""The checks that every op on flat buffers makes before it launches anything."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def require_flat(
    op: str, name: str, tensor: torch.Tensor, dtypes: Collection[torch.dtype] = FLOATS, like: torch.Tensor | None = None
) -> None:
    """Raise one sentence unless `tensor` is 1-D, contiguous, of one of `dtypes`, and as long and placed as `like`."""
    right = tensor.ndim == 1 and tensor.dtype in dtypes and tensor.is_contiguous()
    if right and (like is None or (tensor.shape == like.shape and tensor.device == like.device)):
        return
    if tensor.ndim != 1 or not tensor.is_contiguous():
        raise ValueError(
            f"{op}: {name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}, expected one contiguous "
            f"dimension: pass a flat buffer or a slice of one"
        )
    if tensor.dtype not in dtypes:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{op}: {name} is {tensor.dtype}, expected {expected}: convert it first")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, expected {like.device} like the rest: move it")
    if like is not None and tensor.numel() != like.numel():
        raise ValueError(
            f"{op}: {name} has {tensor.numel()} elements, expected {like.numel()}: pass buffers of the same shard"
        )


def require_scalar(op: str, name: str, tensor: torch.Tensor, device: torch.device) -> None:
    """Raise one sentence unless `tensor` is one float32 number on `device`."""
    if tensor.numel() != 1 or tensor.dtype != torch.float32 or tensor.device != device:
        raise ValueError(
            f"{op}: {name} is {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}, expected one float32 "
            f"number on {device}, where the buffers are: kernels read it from device memory"
        )


def without_grad(function: Callable[P, R]) -> Callable[P, R]:
    """`torch.no_grad()` as a decorator that takes half the time, and none where gradients are off, as in a backward."""

    @wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        torch.set_grad_enabled(False)
        try:
            return function(*args, **kwargs)
        finally:
            torch.set_grad_enabled(True)

    return guarded
