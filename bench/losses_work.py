"""What losses.py runs on every rank: one training after another, alike but for what travels in eight bits."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

import mics_core as mics
from bench.ranks import report
from mics_core import registry
from mics_models.data import standard_library
from mics_models.pretrain import Training
from mics_models.training.batches import Batches, configure
from mics_models.training.settings import Settings, read

EVERY = 100  # steps between two looks at what is held out

SMALL = {
    "byte-tiny": ("layers=2", "width=64", "heads=2", "kv_heads=2", "hidden=168"),
    "bert-tiny": ("layers=2", "width=64", "heads=2", "hidden=256"),
}
"""What is smaller than in the models of these names."""

VARIANTS = ("exact", "hop 2", "refresh", "both")


def settings_of(model: str, precision: str, seed: int, steps: int) -> Settings:
    """A node for each rank, so that everything which travels once a step crosses nodes."""
    return read(
        None,
        [
            f"model.name={model}",
            *[f"model.config.{change}" for change in SMALL[model]],
            f"seed={seed}",
            f"schedule.steps={steps}",
            f"sharding.precision={precision}",
            "sharding.params=1",
            "sharding.grads=1",
            "sharding.optimizer=-1",
            "sharding.ranks_per_node=1",
            "batch.samples=8",
            "batch.seq=64",
            "batch.micro_steps=1",
            "evaluation.batches=32",
        ],
    )


def trained(settings: Settings, variant: str) -> dict[str, Any]:
    """The held-out losses on the way, and the last training losses' mean."""
    eight = "" if variant == "exact" else "int8"
    settings = replace(settings, sharding=replace(settings.sharding, between_nodes=eight))
    config = configure(settings.model)
    batches = Batches(settings, config, standard_library(), dist.get_rank(), dist.get_world_size())
    training = Training(settings, batches, torch.device("cpu"))
    for unit in registry.runtime_of(training.model, "losses").units:
        if variant == "hop 2":
            unit.trained.sends_differences = False
        if variant == "refresh":
            unit.trained.forms = replace(unit.trained.forms, hop2=None)
    curve = []
    for number in range(settings.schedule.steps):
        training.step(number)
        if (number + 1) % EVERY == 0:
            curve.append(training.held_out_loss())
    mics.check_replicas(training.model)
    return {"variant": variant, "seed": settings.seed, "held_out": curve}


def main(words: Sequence[str]) -> None:
    """Train a model in a precision, with every seed in every variant."""
    model, precision, seeds, steps = words[0], words[1], int(words[2]), int(words[3])
    mics.init()
    torch.set_num_threads(1)
    found = [
        trained(settings_of(model, precision, seed, steps), variant) for seed in range(seeds) for variant in VARIANTS
    ]
    if dist.get_rank() == 0:
        report(found)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
