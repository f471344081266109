"""Pretrain a GPT or a BERT under the runtime: `torchrun -m mics_models.pretrain [FILE.toml] [table.key=value ...]`.

`make pretrain` runs the defaults: a byte-level GPT, on four CPU ranks that stand for two nodes, or on all GPUs. Plain
python does the same on one rank. training/settings.py lists every key with its default.
"""

from __future__ import annotations

import atexit
import math
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

import mics_core as mics
from mics_models.data import load, standard_library
from mics_models.hf import from_hf_lazily
from mics_models.training import plan, run_folder
from mics_models.training.batches import Batches, build, configure, to_device
from mics_models.training.news import Stop
from mics_models.training.run import Run
from mics_models.training.schedule import rate
from mics_models.training.screen import Screen
from mics_models.training.settings import Settings, explained, flatten
from mics_models.training.settings import read as read_settings
from mics_models.training.stopwatch import Stopwatch
from mics_models.training.together import Refused, agree, everyone, refusing, together
from mics_models.training.trains import Saves

HELP = f"""usage: python -m mics_models.pretrain [--traceback] [FILE.toml] [table.key=value ...]

Pretrain a GPT or a BERT under the runtime: on one rank, or on all that torchrun starts. What fails on one rank, such as
that another is gone, is one sentence; --traceback shows where it failed, too.

keys, their defaults and what they mean:

{explained()}"""


class Training:
    """The model, sharded, with its optimizer and its batches. `mics.init()` comes first."""

    def __init__(self, settings: Settings, batches: Batches, device: torch.device) -> None:
        self.settings = settings
        self.device = device
        self.rank, self.world = _place()
        self.config = configure(settings.model)
        self.batches = batches
        torch.manual_seed(settings.seed)
        with torch.device("meta"):  # no rank ever holds the whole model
            model = build(self.config)
        decayed = {name for name, parameter in model.named_parameters() if parameter.ndim > 1}
        precision = _precision(settings)
        self.compute: torch.dtype = precision.compute
        self.model = mics.shard(
            model,
            _sharding(settings, self.world),
            precision=precision,
            ranks_per_node=settings.sharding.ranks_per_node or None,
            prefetch_bytes=None if settings.sharding.prefetch_mb < 0 else settings.sharding.prefetch_mb << 20,
        )
        if settings.model.compile:
            self.model.compile_blocks()
        named = list(self.model.named_parameters())
        self.optimizer = mics.AdamW(
            [
                {"params": [parameter for name, parameter in named if name in decayed]},
                {"params": [parameter for name, parameter in named if name not in decayed]},
            ]
        )
        self.use_settings()
        self.stopwatch = Stopwatch(device)

    def use_settings(self) -> None:
        """Give the optimizer what the settings say, whatever it had: `load` brings a checkpoint's."""
        settings = self.settings.optimizer
        decayed, others = self.optimizer.param_groups
        for group in (decayed, others):
            group["betas"], group["eps"] = (settings.beta1, settings.beta2), settings.eps
        decayed["weight_decay"], others["weight_decay"] = settings.weight_decay, 0.0

    def begin_with(self, weights: str) -> None:
        """Take the weights of a file or folder, each rank what it holds of them."""

        def look() -> Mapping[str, torch.Tensor]:
            given = mics.open_weights(weights)
            # Every model of ours has this name, and none of Hugging Face's.
            return given if "embedding.weight" in given else from_hf_lazily(given, self.config)

        given = together(look)
        with refusing(f"model.weights is {weights}: "):
            mics.load_weights(given, self.model)

    def step(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimizer step: this rank's loss of each micro-step, before it, and the norm of the gradient."""
        micro_steps = self.settings.batch.micro_steps
        losses = []
        for micro_step in mics.accumulate(self.model, range(micro_steps)):
            loss = self.model(**to_device(self.batches.training(number, micro_step), self.device))
            (loss / micro_steps).backward()
            losses.append(loss.detach())
        norm = mics.clip_grad_norm_(self.model, self.settings.optimizer.clip or math.inf)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.optimizer.lr * rate(number, self.settings.schedule)
        with self.stopwatch.part():
            self.optimizer.step()
            self.optimizer.zero_grad()
        return torch.stack(losses), norm

    def exposed(self) -> float:
        """Seconds that the computation stood still for transfers since `measure_again`."""
        return mics.ledger(self.model).exposed

    def measure_again(self) -> None:
        """Count them from zero."""
        mics.ledger(self.model).reset()

    def save(self, path: Path, extra: dict[str, Any], *, background: bool) -> Saves:
        """Write a checkpoint; the settings say how many are kept."""
        keep = self.settings.checkpoint.keep
        return mics.save(path, self.model, self.optimizer, background=background, keep=keep, **extra)

    def load(self, folder: Path) -> dict[str, Any] | None:
        """Continue from the latest checkpoint; what was saved as extra, None if there is none yet."""
        with refusing():
            try:
                extra = mics.load(folder, self.model, self.optimizer)
            except mics.NoCheckpoint:
                return None
        self.use_settings()
        return extra

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """The mean loss on held-out data, always the same, in nats per token. All ranks must call it."""
        batches, micro_steps = self.settings.evaluation.batches, self.settings.batch.micro_steps
        self.model.eval()
        total = torch.zeros((), device=self.device)
        for batch in range(batches):
            for micro_step in range(micro_steps):
                total += self.model(**to_device(self.batches.evaluation(batch, micro_step), self.device))
        self.model.train()
        return float(sum(everyone(total.item()))) / (batches * micro_steps * self.world)


def _place() -> tuple[int, int]:
    """This rank, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _ranks_per_node(settings: Settings, world: int) -> int:
    return min(settings.sharding.ranks_per_node or int(os.environ.get("LOCAL_WORLD_SIZE", "1")), world)


def _sharding(settings: Settings, world: int) -> mics.Sharding:
    """The three degrees, where 0 means the ranks of a node, or what the one before is."""
    params = settings.sharding.params or _ranks_per_node(settings, world)
    grads = settings.sharding.grads or params
    return mics.Sharding(params, grads, settings.sharding.optimizer or grads)


def _precision(settings: Settings) -> mics.Precision:
    """The dtypes of the work, and of what travels between nodes."""
    eight_bits = getattr(torch, settings.sharding.between_nodes) if settings.sharding.between_nodes else None
    chosen: mics.Precision = getattr(mics.Precision, settings.sharding.precision)(between_nodes=eight_bits)
    return chosen


def forecast(settings: Settings, device: torch.device) -> plan.Forecast:
    """What the run will take, before it takes anything."""
    _, world = _place()
    with torch.device("meta"):
        model = build(configure(settings.model))
    formula = mics.forecast(
        model,
        _sharding(settings, world),
        ranks=world,
        ranks_per_node=_ranks_per_node(settings, world),
        precision=_precision(settings),
    )
    sent: dict[str, int] = {}
    for (_, level), traffic in formula.step(settings.batch.micro_steps).items():
        sent[level] = sent.get(level, 0) + traffic.bytes
    return plan.Forecast(
        degrees=(formula.sharding.params, formula.sharding.grads, formula.sharding.optimizer),
        ranks=world,
        ranks_per_node=_ranks_per_node(settings, world),
        device=device.type,
        at_rest=formula.at_rest(),
        gathered=formula.gathered(),
        working=sum(formula.working().values()),
        sent=sent,
    )


def pretrain(settings: Settings, device: torch.device) -> Stop:
    """Run the whole program; why it ended before its last step, if it did."""
    rank, _ = _place()
    screen = Screen(speaks=rank == 0)
    agree(dict(flatten(settings)))
    corpus = together(lambda: load(Path(settings.data.folder)) if settings.data.folder else standard_library())
    agree(
        {f"the number of tokens in data.folder ({side})": len(getattr(corpus, side)) for side in ("train", "held_out")}
    )
    batches = together(lambda: Batches(settings, configure(settings.model), corpus, *_place()))
    folder = run_folder.find(settings, rank)  # before the plan, which takes seconds
    screen.plan("mics pretrain", plan.rows(settings, configure(settings.model), corpus, forecast(settings, device)))
    run = Run(Training(settings, batches, device), corpus, folder, screen)
    if run.peak is not None:
        screen.say(f"MFU is of {run.peak.flops / 1e12:.3g} TFLOP/s a device: {run.peak.source}")
    stopped = run.train()
    if stopped is not Stop.SIGNAL:
        run.finish()
    return stopped


def _told(words: Sequence[str]) -> Settings:
    """The settings of a command line."""
    file = Path(words[0]) if words and words[0].endswith(".toml") and "=" not in words[0] else None
    settings = read_settings(file, words[file is not None :])
    configure(settings.model)
    return settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, and return the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    words = [word for word in given if word != "--traceback"]
    first = os.environ.get("RANK", "0") == "0"
    if "-h" in words or "--help" in words:
        if first:
            print(HELP, end="")
        return 0
    if first and "RANK" in os.environ:
        print(f"waiting until all {os.environ['WORLD_SIZE']} ranks are there", flush=True)
    device = mics.init()
    try:
        return _status(words, device, first=first)
    except mics.LifecycleError as error:  # of this rank
        if len(words) < len(given):
            raise
        mics.tell_failure(error)
        print(f"pretrain: on rank {_place()[0]}: {error}", file=sys.stderr, flush=True)
        return 1


def _status(words: Sequence[str], device: torch.device, *, first: bool) -> int:
    """The exit status of a run that ends alike on all ranks."""
    try:
        stopped = pretrain(together(lambda: _told(words)), device)
    except (Refused, mics.ConfigError, FloatingPointError) as error:  # the same on every rank
        if first:
            print(f"pretrain: {str(error).removeprefix('settings: ')}", file=sys.stderr, flush=True)
        everyone("said")  # the first rank to end makes torchrun end the others
        return 1 if isinstance(error, FloatingPointError) else 2
    return 3 if stopped is Stop.SIGNAL else 0


def leave(status: int) -> NoReturn:
    """End the process after all that waits for its end, and do not take Python apart.

    A thread of gloo that lets go of a tensor meanwhile, such as that of the last collective, aborts the process.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # outside of the steps there is nothing to save, nor to trace back
    leave(main())
