"""The layers that GPT and BERT share: torch's own, told with which scale their weights begin.

Each module that owns parameters fills them in reset_parameters() alone, and there are no buffers. So a model built on
the meta device can be brought to memory one module at a time: to_empty(recurse=False), reset_parameters().
"""

from __future__ import annotations

from torch import nn


class Linear(nn.Linear):
    """A linear layer whose weights begin with a given standard deviation, its biases with zero."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = True, std: float) -> None:
        self.std = std  # first, because nn.Linear ends with reset_parameters()
        super().__init__(inputs, outputs, bias=bias)

    def reset_parameters(self) -> None:
        """Draw the weights again."""
        nn.init.normal_(self.weight, std=self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Embedding(nn.Embedding):
    """An embedding that begins with a given standard deviation."""

    def __init__(self, entries: int, width: int, *, std: float) -> None:
        self.std = std
        super().__init__(entries, width)

    def reset_parameters(self) -> None:
        """Draw the entries again."""
        nn.init.normal_(self.weight, std=self.std)
