"""What training.py runs on every rank: the same steps of a model under all runtimes, a turn of each after the other."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import mics_core as mics
from bench import peak_memory
from bench.harness import order
from bench.ranks import report
from bench.scenes.runtimes import Runtime, Terms, runtime
from mics_models import BERT, BERTS, GPT, GPTS, BERTConfig, GPTConfig
from mics_models.training.peak import peak

MODELS: Mapping[str, GPTConfig | BERTConfig] = {
    "gpt-small": GPTConfig(vocab=1024, context=256, layers=4, width=256, heads=4, kv_heads=4, hidden=1024),
    "bert-small": BERTConfig(vocab=1024, context=256, layers=4, width=256, heads=4, hidden=1024),
    **GPTS,
    **BERTS,
}
"""The small ones are for CPUs."""

MASKED = 0.15  # of a BERT's tokens

FEWEST, MOST = 5, 100
"""Rounds."""

PASSES = 2
"""How often each runtime is made, where only one has room."""

IN_A_ROW = 2
"""Steps between two looks at the clock: what a step leaves to the next one can hide behind it."""


@dataclass(frozen=True)
class Job:
    """What to train, and how long."""

    models: tuple[str, ...]
    micro_steps: int
    tokens: int  # of a micro-step, on each rank
    seq: int  # at most
    precision: str
    checkpoint_blocks: bool
    seconds: float  # of measuring, for each model
    apart: bool = False  # one runtime at a time, made anew for each of its turns, as where all do not fit at once
    compiled: str = ""  # the backend of torch.compile, for each block; "" compiles nothing

    def shape(self, model: str) -> tuple[int, int, int]:
        """Micro-steps, samples of one, tokens of a sample."""
        seq = min(self.seq, MODELS[model].context)
        return self.micro_steps, max(1, self.tokens // seq), seq

    def write(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, text: str) -> Job:
        """What `write` wrote."""
        told = json.loads(text)
        return cls(**told | {"models": tuple(told["models"])})


def variants(ranks: int, *, apart: bool = False) -> dict[str, str]:
    """The runtimes for so many ranks, and for each of ours the peer that it is compared with."""
    if ranks == 1:
        more = {"FSDP2 full": ""} if apart else {}
        return {"plain PyTorch": "", **more, "mics 1,1,1": "plain PyTorch"}
    ours = {f"mics 1,1,{ranks}": "DDP", "mics 1,1,1": "DDP", f"mics {ranks},{ranks},{ranks}": "FSDP2 full"}
    half = ranks // 2
    hybrid = {f"HSDP {half}": "", f"mics {half},{half},{half}": f"HSDP {half}"} if apart and ranks % 4 == 0 else {}
    return {"DDP": "", "FSDP2 full": "", **ours, **hybrid}


class Loss(nn.Module):
    """A model of one tensor: [2, B, T], the tokens and their targets."""

    def __init__(self, config: GPTConfig | BERTConfig) -> None:
        super().__init__()
        torch.manual_seed(0)
        # Nothing here uses the head that tells whether a sentence follows, and DDP waits for all gradients.
        self.model = GPT(config) if isinstance(config, GPTConfig) else BERT(replace(config, next_sentence=False))

    @property
    def blocks(self) -> nn.ModuleList:
        """The units."""
        return self.model.blocks

    def forward(self, batch: Tensor) -> Tensor:
        loss: Tensor = self.model(batch[0], targets=batch[1])
        return loss


def micro_batches(
    config: GPTConfig | BERTConfig, shape: tuple[int, int, int], rank: int, device: torch.device
) -> list[Tensor]:
    """Random tokens; the next ones are a GPT's targets, and those that are masked a BERT's."""
    chance = torch.Generator().manual_seed(rank)
    *outer, seq = shape
    tokens = torch.randint(config.vocab - 1, (*outer, seq + 1), generator=chance)
    if isinstance(config, GPTConfig):
        pair = tokens[..., :-1], tokens[..., 1:]
    else:
        tokens = tokens[..., 1:]
        masked = torch.rand(tokens.shape, generator=chance) < MASKED
        masked[..., 0] = True  # a loss of no token is none
        pair = tokens.masked_fill(masked, config.vocab - 1), tokens.masked_fill(~masked, -100)
    return list(torch.stack(pair, 1).to(device).unbind())


def turn(variant: Runtime, batches: Sequence[Tensor], device: torch.device) -> tuple[float, float]:
    """Seconds of a step, on the slowest rank; the mean of the ranks' last losses."""
    _all_there(device)
    begun = time.perf_counter()
    for _ in range(IN_A_ROW):
        loss = variant.accumulate(batches)
        variant.update()
    variant.finish()
    _complete(device)
    passed = torch.tensor((time.perf_counter() - begun) / IN_A_ROW, dtype=torch.float64)
    mean = (loss / dist.get_world_size()).double().cpu()
    dist.all_reduce(passed, dist.ReduceOp.MAX)
    dist.all_reduce(mean)
    return passed.item(), mean.item()


def _all_there(device: torch.device) -> None:
    _complete(device)
    dist.all_reduce(torch.zeros(1))  # gloo's, also where there are GPUs


def _complete(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def warm_up(variant: Runtime, batches: Sequence[Tensor], device: torch.device) -> tuple[float, list[float], int | None]:
    """The first steps: seconds of the last one, the losses, and the most memory that a rank needed in the last turn."""
    _, first = turn(variant, batches, device)  # it allocates and connects
    measurable = peak_memory.unmeasured(device) is None
    if measurable:
        peak_memory.forget(device)
    seconds, second = turn(variant, batches, device)
    return seconds, [first, second], peak_memory.highest(device) if measurable else None


def measure(name: str, job: Job, device: torch.device) -> dict[str, Any]:
    """Seconds, losses and memory of every runtime."""
    config = replace(MODELS[name], checkpoint_blocks=job.checkpoint_blocks)
    batches = micro_batches(config, job.shape(name), dist.get_rank(), device)
    names, terms = list(variants(dist.get_world_size(), apart=job.apart)), Terms(device, job.precision)
    small = replace(config, layers=1, width=32 * config.heads)
    for variant in names:  # what a runtime loads and keeps once, whatever the model, is no model's memory
        runtime(variant, lambda: _made(small, job), terms).accumulate(batches[:1])
    found: dict[str, dict[str, Any]] = {}
    made: dict[str, Runtime] = {}

    def make(variant: str) -> float:
        before = peak_memory.held(device)
        made[variant] = runtime(variant, lambda: _made(config, job), terms)
        seconds, losses, highest = warm_up(made[variant], batches, device)
        most = torch.tensor(0 if highest is None else highest - before)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        memory = None if highest is None else int(most.item())
        found.setdefault(variant, {"seconds": [], "losses": losses, "memory": memory})
        return IN_A_ROW * seconds

    def take_turns(chosen: Sequence[str], rounds: int) -> None:
        for number in range(rounds):
            for variant in order(chosen, number):
                found[variant]["seconds"].append(turn(made[variant], batches, device)[0])

    if not job.apart:
        take_turns(names, _rounds(job.seconds, sum(make(variant) for variant in names)))
        return found
    rounds = 0
    for number in range(PASSES):
        for variant in order(names, number):
            seconds = make(variant)
            rounds = rounds or _rounds(job.seconds / len(names) / PASSES, seconds)
            take_turns([variant], rounds)
            _say(name, variant, found[variant])
            del made[variant]
            peak_memory.held(device)  # collects what is gone
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return found


def _say(model: str, variant: str, found: Mapping[str, Any]) -> None:
    """What a runtime has so far, at once: ranks that are killed report nothing."""
    if dist.get_rank() == 0:
        told = {what: " ".join(f"{each:.5g}" for each in found[what]) for what in ("seconds", "losses")}
        print(f"  {model}, {variant}: {told}, memory: {found['memory']}", file=sys.stderr, flush=True)


def _made(config: GPTConfig | BERTConfig, job: Job) -> Loss:
    model = Loss(config)
    if job.compiled:
        for block in model.blocks:
            block.compile(backend=job.compiled)
    return model


def _rounds(seconds: float, each: float) -> int:
    """The same on all ranks, whose clocks differ by a little."""
    rounds = torch.tensor(max(FEWEST, min(MOST, round(seconds / each))))
    dist.broadcast(rounds, 0)
    return int(rounds.item())


def main(words: Sequence[str]) -> None:
    job = Job.read(words[0])
    device = mics.init()
    if device.type == "cpu":
        torch.set_num_threads(1)
    top = peak(device, torch.bfloat16 if job.precision == "bf16" else torch.float32, 0.0)
    found = {name: measure(name, job, device) for name in job.models}
    if dist.get_rank() == 0:
        why = peak_memory.unmeasured(device)
        report({"peak": asdict(top), "left_out": {} if why is None else {"peak memory": why}, "models": found})
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
