"""What a run asks of what it runs: a model with its optimizer and its batches, under any runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch

from mics_models.bert import BERT
from mics_models.gpt import GPT
from mics_models.training.batches import Batches, Config
from mics_models.training.settings import Settings
from mics_models.training.stopwatch import Stopwatch


class Saves(Protocol):
    """A save that may be under way."""

    def wait(self) -> None:
        """Return when it is complete; raise if it will not be."""


class Trains(Protocol):
    """A model with its optimizer and its batches, on all ranks."""

    settings: Settings
    config: Config
    device: torch.device
    compute: torch.dtype
    rank: int
    world: int
    model: GPT | BERT
    batches: Batches
    stopwatch: Stopwatch

    def begin_with(self, weights: str) -> None:
        """Take the weights of a file or folder."""

    def step(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimizer step: this rank's loss of each micro-step, before it, and the norm of the gradient."""

    def held_out_loss(self) -> float:
        """The mean loss on held-out data, always the same, in nats per token."""

    def exposed(self) -> float:
        """Seconds that the computation stood still for transfers since `measure_again`."""

    def measure_again(self) -> None:
        """Count them from zero."""

    def save(self, path: Path, extra: dict[str, Any], *, background: bool) -> Saves:
        """Write a checkpoint."""

    def load(self, folder: Path) -> dict[str, Any] | None:
        """Continue from the latest one; what was saved as extra, None if there is none yet."""
