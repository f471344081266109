"""A model that knows nothing of mics: what `mics plan --model planned_for:Words()` builds."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, 16)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = torch.relu(layer(x))
        return F.cross_entropy((x @ self.embedding.weight.T).flatten(0, 1), labels.flatten())
