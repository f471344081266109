"""What a plan says: the choice and the next best, what they take, why others lost, and how to run it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from textwrap import fill

import torch

from mics_core.planner.arithmetic import peak
from mics_core.planner.candidate import Candidate
from mics_core.planner.cluster import Cluster
from mics_core.planner.columns import WIDTH, aligned, degrees, digits, duration, gigabytes, hanging, unit_of
from mics_core.planner.memory import Memory
from mics_core.planner.simulator import Prediction
from mics_core.planner.ways import AS_FAST, Loser, Row, summed_up
from mics_core.planner.workload import Workload
from mics_core.spec.sharding import Precision, Sharding

_SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


NARROW = 72
"""Columns of a terminal below which what is exposed is told of the choice alone."""

_LEGEND = (
    "All of it is predicted. leanest: least memory of those as fast within 1 %. DDP, HSDP, ZeRO-3: mics with their "
    "degrees; `mics simulate` plays these systems themselves. >=: not simulated, but it takes at least so long."
)


@dataclass(frozen=True, repr=False)
class Plan:
    """The way to train that was found, first in `best`, and what it was chosen from."""

    workload: Workload
    cluster: Cluster
    best: tuple[Row, ...]  # simulated, the choice first
    losers: tuple[Loser, ...]  # of every sharding its best candidate
    advice: str
    eight_bits: str = ""  # what they would bring between nodes; empty where nothing would travel in them

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

    def table(self, top: int | None = None, width: int = WIDTH) -> str:
        """The choice, beside the fastest, the leanest, DDP, HSDP and ZeRO-3; why all others lost; the advice.

        top: so many of the others one by one, the best first, in place of a row for each reason.
        width: of the terminal. Sentences are wrapped; columns fit into 60 where degrees have up to two digits.
        """
        if top is None:
            reasons, title = summed_up(self.losers), f"Not chosen, by reason, of {1 + len(self.losers)} shardings:"
        else:
            reasons = [(degrees(loser.candidate.sharding), loser.reason) for loser in self.losers[:top]]
            title = f"Not chosen, {len(reasons)} of {len(self.losers)}, the best first:"
        lost = ["", title, hanging(reasons, width)] if reasons else []
        said = [fill(sentence, width) for sentence in (_LEGEND, *self._guesses())]
        parts = [self._heading(width), "", self._ways(width), "", *said, *lost]
        return "\n".join([*parts, "", fill(self.advice, width)])

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        return (
            f"Plan({self.sharding}, micro_batch={self.micro_batch}, micro_steps={self.micro_steps}, "
            f"recompute={self.recompute}, {duration(self.prediction.seconds)} a step, "
            f"{gigabytes(self.memory.total)} GB of a rank on {self.cluster.name}:{self.cluster.nodes})"
        )

    def call(self) -> str:
        """The call of `mics.shard` in a program."""
        p, g, o = self.sharding.params, self.sharding.grads, self.sharding.optimizer
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
        p, g, o = self.sharding.params, self.sharding.grads, self.sharding.optimizer
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
        if self.precision.between_nodes is not None:
            settings["sharding.between_nodes"] = str(self.precision.between_nodes).removeprefix("torch.")
        if self.chosen.prefetch_units != 1:
            ahead = self.chosen.prefetch_units * _largest(self.workload, self.precision)
            settings["sharding.prefetch_mb"] = -(-ahead // 10**6)
        return " ".join([line, *(f"{key}={value}" for key, value in settings.items())])

    def _heading(self, width: int) -> str:
        cluster, told, chosen, tokens = self.cluster, self.prediction, self.chosen, self.workload.tokens_per_sample
        samples = chosen.micro_batch * chosen.micro_steps * cluster.ranks
        lines = (
            ("cluster", f"{cluster.name}, {cluster.nodes} nodes of {cluster.ranks_per_node} ranks"),
            ("model", f"{self.workload.parameters:,} parameters"),
            ("samples", f"{samples:,} a step, of {tokens:,} tokens"),
            ("sharding", f"P, G, O = {degrees(chosen.sharding)} pieces of parameters, gradients, optimizer state"),
            ("batch", f"{_batch(chosen)}: samples of a rank in a micro-step, times micro-steps"),
            ("recompute", "yes: units' forwards again in backwards" if chosen.recompute else "no"),
            ("ahead", f"{chosen.prefetch_units} x the largest unit's bytes, gathered before they are used"),
            ("reduce", f"{_short(chosen.precision.reduce)}: gradients travel in it"),
            *([("int8", self.eight_bits)] if self.eight_bits else ()),
            (
                "step",
                f"{duration(told.seconds)}, of which {duration(told.exposed)} exposed: computation waits for links",
            ),
            ("speed", f"{digits(samples * tokens / told.seconds)} tokens/s; {told.tflops:.1f} TFLOP/s a rank"),
            ("MFU", f"{100 * told.tflops * 1e12 / peak(cluster, chosen.precision):.1f} % of the peak"),
            (
                "memory",
                f"{gigabytes(self.memory.total)} of {gigabytes(cluster.memory)} GB a rank: {self.memory.parts()}",
            ),
        )
        return hanging(lines, width)

    def _ways(self, width: int) -> str:
        """A row for each sharding with a name."""
        named, called = self._named(), ["name"]
        simulated = {row.candidate.sharding: row for row in reversed(self.best)}
        lost = {loser.candidate.sharding: loser for loser in self.losers}
        unit, many = unit_of(row.prediction.seconds for row in self.best)
        rows: list[tuple[str, ...]] = [("P, G, O", "batch", "recompute", f"{unit}/step", "exposed", "GB")]
        for sharding, names in named.items():
            row = simulated.get(sharding) or lost[sharding]
            candidate, time, exposed = row.candidate, "-", "-"
            if isinstance(row, Row):
                time = digits(many * row.prediction.seconds)
                exposed = f"{100 * row.prediction.exposed / row.prediction.seconds:.1f} %"
            elif row.seconds is None:
                time = "too big"
            else:
                time = f">= {digits(many * row.seconds)}"
            again = "yes" if candidate.recompute else "no"
            rows.append((degrees(sharding), _batch(candidate), again, time, exposed, gigabytes(row.memory.total)))
            called.append(", ".join(names))
        if width < NARROW:
            rows = [(*row[:4], row[5]) for row in rows]
        return hanging(list(zip(aligned(rows, (0, 1, 2)).splitlines(), called, strict=True)), width)

    def _named(self) -> dict[Sharding, list[str]]:
        """What each sharding of the table is called, the choice first."""
        fastest = min(self.best, key=lambda row: row.prediction.seconds)
        if digits(fastest.prediction.seconds) == digits(self.prediction.seconds):
            fastest = self.best[0]
        near = [row for row in self.best if row.prediction.seconds <= AS_FAST * fastest.prediction.seconds]
        leanest = min(near, key=lambda row: row.memory.total)
        node, ranks = self.cluster.ranks_per_node, self.cluster.ranks
        named: dict[Sharding, list[str]] = {}
        for name, sharding in (
            ("chosen", self.sharding),
            ("fastest", fastest.candidate.sharding),
            ("leanest", leanest.candidate.sharding),
            ("DDP", Sharding(1, 1, 1)),
            ("HSDP", Sharding(node, node, node)),
            ("ZeRO-3", Sharding(ranks, ranks, ranks)),
        ):
            if name != "HSDP" or 1 < node < ranks:
                named.setdefault(sharding, []).append(name)
        return named

    def _guesses(self) -> list[str]:
        guessed = [name for name, source in self.cluster.sources.items() if "a guess" in source]
        named = [f"efficiency ({self.cluster.efficiency} of the peak)" if n == "efficiency" else n for n in guessed]
        return [f"Times are no better than what is guessed of this cluster: {', '.join(named)}."] if named else []


def _batch(candidate: Candidate) -> str:
    return f"{candidate.micro_batch}x{candidate.micro_steps}"


def _largest(workload: Workload, precision: Precision) -> int:
    units = (workload.root, *workload.units)
    return max(unit.size.trained + unit.size.frozen for unit in units) * precision.compute.itemsize


def _precision(precision: Precision) -> str:
    more = {"between_nodes": precision.between_nodes, "hop1_between_nodes": precision.hop1_between_nodes}
    asked = {name: dtype for name, dtype in more.items() if dtype is not None}
    if (asked.keys() | {"exact"} if precision.exact else asked.keys()) <= {"between_nodes"}:
        if precision.compute == precision.reduce == precision.master == torch.float32:
            return f"mics.Precision.fp32({_words(asked)})"
        if precision.compute in (torch.bfloat16, torch.float16) and precision.master == torch.float32:
            return f"mics.Precision.{_SHORT[precision.compute]}({_words({'reduce': precision.reduce} | asked)})"
    words = {name: getattr(precision, name) for name in ("compute", "reduce", "master")} | asked
    return f"mics.Precision({_words(words | ({'exact': precision.exact} if precision.exact else {}))})"


def _words(given: Mapping[str, object]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in given.items())


def _short(dtype: torch.dtype) -> str:
    return _SHORT.get(dtype, str(dtype))
