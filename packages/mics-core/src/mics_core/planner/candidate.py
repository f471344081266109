"""What a plan chooses, and under which runtime's schedule a step is simulated."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from mics_core.errors import ConfigError
from mics_core.spec.sharding import Precision, Sharding


@dataclass(frozen=True)
class Candidate:
    """One way to train: how the states are cut, and how the batch is."""

    sharding: Sharding  # resolved: three degrees
    precision: Precision
    micro_batch: int  # samples of a rank in a micro-step
    micro_steps: int  # of an optimizer step
    recompute: bool = False  # activation checkpointing of every unit
    prefetch_units: int = 1  # the largest unit so often may be gathered ahead
    ranks_per_node: int | None = None  # as told to `shard`; None: as many as the cluster's nodes have

    def __post_init__(self) -> None:
        for name in ("micro_batch", "micro_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"Candidate: {name} is {getattr(self, name)}, expected at least 1: give it a size")
        if self.prefetch_units < 0:
            raise ConfigError(
                f"Candidate: prefetch_units is {self.prefetch_units}, expected 0 or more: 0 gathers nothing ahead"
            )


class System(Enum):
    """Whose schedule a step follows.

    Of peers, `sharding.optimizer` says into how many pieces they cut everything, and `sharding.params` into how many
    between forward and backward; `scaling.peer` fills both in.
    """

    MICS = "mics"
    DDP = "DDP"  # whole copies; buckets of gradients are summed behind the last backward
    HSDP = "HSDP"  # FSDP2 in groups of ranks; their shards are summed behind the last backward
    FSDP2 = "FSDP2"  # cut over all ranks
    ZERO3 = "ZeRO-3"  # DeepSpeed's, cut over all ranks
