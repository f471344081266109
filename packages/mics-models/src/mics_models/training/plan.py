"""The plan that a run prints first: what is trained on what, where it will lie, and what will travel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mics_models.data import Corpus
from mics_models.training.batches import Config
from mics_models.training.settings import Settings


@dataclass(frozen=True)
class Forecast:
    """What the sharding's formula says of one rank, in bytes."""

    degrees: tuple[int, int, int]  # into how many pieces parameters, gradients and optimizer state are cut
    ranks: int
    ranks_per_node: int
    device: str
    at_rest: Mapping[str, int]
    gathered: int  # whole units, at most
    working: int  # gradients on their way
    sent: Mapping[str, int]  # in a step, by level


CALLED = {"shard": "weights", "master": "master weights", "sharded": "gradients", "optimizer": "optimizer state"}
"""The runtime's nouns in everyday words."""


def rows(settings: Settings, config: Config, corpus: Corpus, forecast: Forecast) -> dict[str, str]:
    """A name and a text in each row."""
    batch, schedule = settings.batch, settings.schedule
    tokens = batch.samples * batch.seq
    p, g, o = forecast.degrees
    sent = ", ".join(f"{_mb(count)} over {level}" for level, count in forecast.sent.items())
    resting = ", ".join(f"{CALLED.get(name, name)} {_mb(count)}" for name, count in forecast.at_rest.items() if count)
    return {
        "model": f"{settings.model.name}: {config.num_params():,} parameters, {config.layers} layers, width "
        f"{config.width}; {config.flops_per_token(batch.seq):,} FLOPs a token",
        "data": f"{settings.data.folder or 'the sources of the Python standard library'}: {len(corpus.train):,} tokens "
        f"in {corpus.train_files:,} documents, {len(corpus.held_out):,} in {corpus.held_out_files:,} held out",
        "ranks": f"{forecast.ranks} on {forecast.device}, {forecast.ranks_per_node} on a node"
        f"{' (as if: nodes are told, not found)' if settings.sharding.ranks_per_node else ''}; computing in "
        f"{settings.sharding.precision}"
        + (f", {settings.sharding.between_nodes} between nodes" if settings.sharding.between_nodes else ""),
        "sharding": f"parameters cut into {p}, gradients into {g}, optimizer state into {o}",
        "memory": f"{_mb(sum(forecast.at_rest.values()))} a rank at rest ({resting}), up to {_mb(forecast.gathered)} "
        f"of gathered units, {_mb(forecast.working)} for gradients on their way, and the activations",
        "traffic": f"a rank sends in a step {sent + ' (levels: 1-2 is from 1 piece to 2)' if sent else 'nothing'}",
        "batch": f"{batch.samples} samples of {batch.seq} = {tokens:,} tokens a step, in {batch.micro_steps} "
        "micro-steps",
        "schedule": f"{schedule.steps} steps, {tokens * schedule.steps:,} tokens; AdamW at {settings.optimizer.lr:g}, "
        f"{schedule.kind}",
    }


def _mb(count: int) -> str:
    return f"{count / 1e6:,.2f} MB"
