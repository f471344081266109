from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mics_models import chunked_cross_entropy
from mics_models.loss import IGNORED


@pytest.mark.parametrize("rows", [1, 5, 14, 28, 1000])  # one at a time, uneven, even, exactly all, more than all
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
def test_the_chunked_loss_has_the_value_and_gradients_of_the_full_one(rows: int, biased: bool) -> None:
    hidden = torch.randn(4, 7, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(61, 16, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(61, dtype=torch.float64, requires_grad=True) if biased else None
    inputs = (hidden, weight) if bias is None else (hidden, weight, bias)
    targets = torch.randint(61, (4, 7))
    targets[1, 2:5] = IGNORED
    expected = F.cross_entropy(F.linear(hidden, weight, bias).flatten(0, 1).float(), targets.flatten())
    loss = chunked_cross_entropy(hidden, weight, targets, bias, logits_at_once=rows * 61 + 60)
    torch.testing.assert_close(loss, expected)
    for got, wanted in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7)  # the logits are float32 in both


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements of any tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_the_chunked_loss_never_holds_all_logits_nor_keeps_any_for_the_backward() -> None:
    hidden, weight = torch.randn(64, 4, requires_grad=True), torch.randn(500, 4, requires_grad=True)
    targets = torch.randint(500, (64,))
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with LargestTensor() as largest:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = chunked_cross_entropy(hidden, weight, targets, logits_at_once=8 * 500)
        loss.backward()
    assert largest.elements == 8 * 500
    assert max(kept, default=0) <= weight.numel()
