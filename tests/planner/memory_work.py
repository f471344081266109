"""What the tests of the memory model ask ranks to do: train a model, and tell the most bytes that a step held."""

import gc
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import mics_core as mics
from mics_core import registry
from mics_models import BERT, GPT, BERTConfig, GPTConfig
from runtime_work import live_bytes

ROWS, TOKENS, MICRO_STEPS = 4, 128, 2
SMALL = 4096
"""Bytes of numbers and tables that are no unit's, at most."""
CONFIGS: dict[str, GPTConfig | BERTConfig] = {
    "gpt": GPTConfig(vocab=512, context=TOKENS, layers=3, width=128, heads=4, kv_heads=4, hidden=512),
    "bert": BERTConfig(vocab=512, context=TOKENS, layers=3, width=128, heads=4, hidden=512, types=1),
}


def build(kind: str, *, checkpoint: bool) -> nn.Module:
    config = replace(CONFIGS[kind], checkpoint_blocks=checkpoint)
    return GPT(config) if isinstance(config, GPTConfig) else BERT(config)


def batch(rows: int = ROWS) -> dict[str, Tensor]:
    tokens = torch.arange(rows * TOKENS).view(rows, TOKENS) % 512
    return {"tokens": tokens, "targets": tokens.roll(-1, 1)}


def step(model: nn.Module, optimizer: torch.optim.Optimizer, given: dict[str, Tensor]) -> None:
    for micro in mics.accumulate(model, [given] * MICRO_STEPS):
        (model(**micro) / MICRO_STEPS).backward()
    optimizer.step()
    optimizer.zero_grad()


def peaks(kind: str, checkpoint: bool, shardings: list[mics.Sharding], precision: mics.Precision) -> list[int]:
    """The most bytes that a steady step held under each sharding."""
    train(kind, checkpoint, shardings[0], precision)  # brings the kernels' own small tables
    return [peak(kind, checkpoint, sharding, precision) for sharding in shardings]


def train(
    kind: str, checkpoint: bool, sharding: mics.Sharding, precision: mics.Precision
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """As far as a steady state."""
    model = mics.shard(build(kind, checkpoint=checkpoint), sharding, ranks_per_node=2, precision=precision)
    optimizer = mics.AdamW(model.parameters())
    for _ in range(2):
        step(model, optimizer, batch())
    mics.ledger(model)  # waits for what is under way
    return model, optimizer


def peak(kind: str, checkpoint: bool, sharding: mics.Sharding, precision: mics.Precision) -> int:
    if torch.get_default_device().type == "cuda":
        return peak_of_allocator(kind, checkpoint, sharding, precision)
    given = batch()
    gc.collect()
    gc.freeze()  # what there was before is not this model's
    model, optimizer = train(kind, checkpoint, sharding, precision)
    formula = registry.runtime_of(model, "test").formula
    held = live_bytes(sum(formula.at_rest().values()) + sum(formula.working().values()), beside=SMALL)
    # Of this thread: what lanes allocate they keep from the first steps on.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        step(model, optimizer, given)
        mics.ledger(model)
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    most = total = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        most = max(most, total)
    return held + most


def peak_of_allocator(kind: str, checkpoint: bool, sharding: mics.Sharding, precision: mics.Precision) -> int:
    """The same of a GPU, which counts for itself."""
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    model, optimizer = train(kind, checkpoint, sharding, precision)
    given = batch()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step(model, optimizer, given)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
