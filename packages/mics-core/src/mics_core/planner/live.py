"""What a program holds and computes while it runs, on the meta device as well: a mode that sees every operation."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the memory of tensors from the operation that makes it to its end, and counts products of matrices.

    `history` has the bytes that are held after each operation; tensors that were there before do not count.
    """

    def __init__(self, before: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0
        self.flops = 0.0
        self.history: list[int] = [0]
        self._known: dict[int, int] = {tensor.untyped_storage()._cdata: 0 for tensor in before}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Do the operation, and look at what it made."""
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.layout is torch.strided:
                self._see(tensor.untyped_storage())
        packet = func._overloadpacket
        if packet is aten._scaled_dot_product_flash_attention_for_cpu:
            query, key, value = args[:3]
            self.flops += 2.0 * query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        self.history.append(self.bytes)
        return out

    def most(self, begin: int) -> int:
        """The most bytes that were held since the history had this length."""
        return max(self.history[begin:], default=0)

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._known:
            self._known[key] = count = storage.nbytes()
            self.bytes += count
            weakref.finalize(storage, self._end, key).atexit = False

    def _end(self, key: int) -> None:
        self.bytes -= self._known.pop(key)


class FusedAttention(TorchFunctionMode):
    """Lets attention on the meta device keep what fused kernels keep, instead of all scores."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Replace scaled_dot_product_attention; all else stays."""
        if func is torch.nn.functional.scaled_dot_product_attention and args and args[0].is_meta:
            return _attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    _dropout: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
    # Four dimensions are what fused kernels take.
    shape = query.shape
    query, key, value = (part[None].flatten(0, -4) for part in (query, key, value))
    out: Tensor = aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=options.get("scale")
    )[0]
    return out.reshape(*shape[:-1], value.shape[-1])
