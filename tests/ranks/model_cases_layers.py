"""Models of torch's own layers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from model_case import ROWS, WIDTH, Block, Case, Chain


class Picture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.norm(self.convolution(x)))


class Pictures(Case):
    """convolutions and BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.blocks = nn.ModuleList([Picture(), Picture()])

    batch = staticmethod(lambda generator: torch.randn(4, 3, 5, 5, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        for block in self.blocks:
            x = block(x)
        return x

    def between(self, optimizer: Any, batch: Any, step: int) -> Sequence[Tensor]:  # noqa: ARG002
        return evaluate(self, batch)


def evaluate(model: nn.Module, batch: Any) -> list[Tensor]:
    model.eval()
    with torch.no_grad():
        outputs = model(batch)
    model.train()
    return [outputs]


class Recurrent(Case):
    """LSTM and GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.blocks = nn.ModuleList(
            [nn.LSTM(WIDTH, WIDTH, 2, batch_first=True), nn.GRU(WIDTH, WIDTH // 2, bidirectional=True), nn.RNN(10, 10)]
        )

    batch = staticmethod(lambda generator: torch.randn(ROWS, 4, WIDTH, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.gru(x)
        for block in self.blocks:
            x, _ = block(x)
        return x

    between = Pictures.between


class Transformer(Case):
    """TransformerEncoder, whose layers take a fast path in eval."""

    ignored = "The PyTorch API of nested tensors"

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    batch = staticmethod(lambda generator: torch.randn(ROWS, 4, WIDTH, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        padding = torch.zeros(x.shape[:2], dtype=torch.bool)
        padding[0, 3] = True  # in eval such a batch becomes a nested tensor
        x = self.encoder(x, src_key_padding_mask=padding)
        return self.attention(x, x, x)[0]

    def between(self, optimizer: Any, batch: Any, step: int) -> Sequence[Tensor]:  # noqa: ARG002
        self.eval()
        with torch.no_grad():
            outputs = self(batch)
            plain = self.encoder.layers[0](batch)
        with torch.inference_mode():
            inferred = self(batch).clone()
        self.train()
        return [outputs, plain, inferred]


class Lists(Case):
    """ParameterList and ParameterDict."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(WIDTH, WIDTH) / 3 for _ in range(2)])
        self.biases = nn.ParameterDict({"a": torch.zeros(WIDTH), "b": torch.ones(WIDTH)})
        self.inner = nn.ModuleList([InnerLists(), InnerLists()])

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = torch.tanh(x @ weight)
        for bias in self.biases.values():
            x = x + bias
        return self.inner[1](self.inner[0](x)) * self.biases["b"]


class InnerLists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.ModuleList([nn.ParameterList([torch.randn(WIDTH)]), nn.ParameterDict({"c": torch.ones(WIDTH)})])
        self.named = nn.ModuleDict({"block": Block()})

    def forward(self, x: Tensor) -> Tensor:
        return self.named["block"](x) * self.table[0][0] + self.table[1]["c"]


class Reparametrised(Chain):
    """weight_norm and spectral_norm."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.rise = nn.utils.parametrizations.weight_norm(block.rise)
        self.last = nn.utils.parametrizations.spectral_norm(self.last)
