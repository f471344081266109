"""What a plan says: the choice and the next best, what they take, why others lost, and how to run it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mics_core.planner.candidate import Candidate
from mics_core.planner.cluster import Cluster
from mics_core.planner.memory import Memory
from mics_core.planner.simulator import Prediction
from mics_core.planner.workload import Workload
from mics_core.sharding import Precision, Sharding

_SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Row:
    """A way to train that fits, and what it takes."""

    candidate: Candidate
    prediction: Prediction
    memory: Memory


@dataclass(frozen=True)
class Loser:
    """A way to train that was not chosen, and why."""

    candidate: Candidate
    reason: str


@dataclass(frozen=True)
class Plan:
    """The way to train that was found, first in `best`, and what it was chosen from."""

    workload: Workload
    cluster: Cluster
    best: tuple[Row, ...]  # simulated, the choice first
    losers: tuple[Loser, ...]  # of every sharding its best candidate
    advice: str

    @property
    def chosen(self) -> Candidate:
        """The choice."""
        return self.best[0].candidate

    @property
    def sharding(self) -> Sharding:
        """For `mics.shard`."""
        return self.chosen.sharding

    @property
    def precision(self) -> Precision:
        """For `mics.shard`."""
        return self.chosen.precision

    @property
    def micro_batch(self) -> int:
        """Samples of a rank in a micro-step."""
        return self.chosen.micro_batch

    @property
    def micro_steps(self) -> int:
        """Micro-steps of an optimizer step."""
        return self.chosen.micro_steps

    @property
    def recompute(self) -> bool:
        """Whether every unit's forward is to be computed again in its backward, by the model's own checkpointing."""
        return self.chosen.recompute

    @property
    def prediction(self) -> Prediction:
        """Of the choice."""
        return self.best[0].prediction

    @property
    def memory(self) -> Memory:
        """Of the choice."""
        return self.best[0].memory

    def table(self, top: int = 5) -> str:
        """The best few with time and memory, the losers with reasons, and the advice."""
        head = ("P, G, O", "micro-batch", "micro-steps", "recompute", "ahead", "reduce", "s/step", "exposed s")
        rows = [(*head, "TFLOP/s", "GB", "of GB"), *(self._cells(row) for row in self.best[:top])]
        shown = {row.candidate.sharding for row in self.best[:top]}
        others = [loser for loser in self.losers if loser.candidate.sharding not in shown]
        lost = [(_degrees(loser.candidate.sharding), loser.reason) for loser in others[: 2 * top]]
        more = [f"and {len(others) - len(lost)} more"] if len(others) > len(lost) else []
        parts = [f"{self.cluster.name}: {self.cluster.nodes} nodes of {self.cluster.ranks_per_node}", _aligned(rows)]
        if lost:
            parts += ["", "Not chosen:", _aligned(lost), *more]
        return "\n".join([*parts, "", self.advice])

    def call(self) -> str:
        """The call of `mics.shard` in a program."""
        p, g, o = _triple(self.sharding)
        ahead = self.chosen.prefetch_units
        prefetch = "" if ahead == 1 else f", prefetch_bytes={ahead * _largest(self.workload, self.precision)}"
        return f"mics.shard(model, mics.Sharding({p}, {g}, {o}), precision={_precision(self.precision)}{prefetch})"

    def command(self, program: str = "train.py") -> str:
        """The line that starts `program` on every node; for mics_models.pretrain, with the settings of this plan.

        Of several nodes each has its number from 0 up in NODE, and the first one's name or address in FIRST.
        """
        nodes, ranks = self.cluster.nodes, self.cluster.ranks_per_node
        among = f"--nnodes {nodes} --node-rank $NODE --master-addr $FIRST " if nodes > 1 else ""
        line = f"torchrun {among}--nproc-per-node {ranks} {program}"
        if "mics_models.pretrain" not in program:
            return line
        p, g, o = _triple(self.sharding)
        samples = self.micro_batch * self.micro_steps * self.cluster.ranks
        settings = {
            "sharding.params": p,
            "sharding.grads": g,
            "sharding.optimizer": o,
            "sharding.precision": _SHORT.get(self.precision.compute, "fp32"),
            "batch.samples": samples,
            "batch.micro_steps": self.micro_steps,
            "batch.seq": self.workload.tokens_per_sample,
            "model.config.checkpoint_blocks": str(self.recompute).lower(),
        }
        if self.chosen.prefetch_units != 1:
            ahead = self.chosen.prefetch_units * _largest(self.workload, self.precision)
            settings["sharding.prefetch_mb"] = -(-ahead // 10**6)
        return " ".join([line, *(f"{key}={value}" for key, value in settings.items())])

    def _cells(self, row: Row) -> tuple[str, ...]:
        candidate, prediction = row.candidate, row.prediction
        return (
            _degrees(candidate.sharding),
            str(candidate.micro_batch),
            str(candidate.micro_steps),
            "yes" if candidate.recompute else "no",
            str(candidate.prefetch_units),
            _SHORT.get(candidate.precision.reduce, str(candidate.precision.reduce)),
            f"{prediction.seconds:.3g}",
            f"{prediction.exposed:.2g}",
            f"{prediction.tflops:.1f}",
            f"{row.memory.total / 1e9:.1f}",
            f"{self.cluster.memory / 1e9:.1f}",
        )


def _largest(workload: Workload, precision: Precision) -> int:
    units = (workload.root, *workload.units)
    return max(unit.size.trained + unit.size.frozen for unit in units) * precision.compute.itemsize


def _precision(precision: Precision) -> str:
    if precision == Precision.fp32():
        return "mics.Precision.fp32()"
    if precision.compute in (torch.bfloat16, torch.float16) and precision.master == torch.float32:
        return f"mics.Precision.{_SHORT[precision.compute]}(reduce={precision.reduce})"
    return f"mics.Precision({precision.compute}, {precision.reduce}, {precision.master})"


def _triple(sharding: Sharding) -> tuple[int, int, int]:
    return sharding.params, sharding.grads, sharding.optimizer


def _degrees(sharding: Sharding) -> str:
    return ", ".join(map(str, _triple(sharding)))


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
