"""Pretrain a GPT: `python -m mics_models.pretrain`, or `make pretrain`.

On one process and one device for now. Sharding arrives with mics-core, and so do checkpoints: nothing is saved yet.
The data is the source code of Python's standard library, a byte a token, so a run needs no download. The defaults are
made for two CPU cores and less than three minutes. The same arguments give the same batches everywhere, and the same
losses on one machine, unless the cap on minutes ends a run early.
"""

from __future__ import annotations

import argparse
import math
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mics_models.configs import GPTS
from mics_models.data import Corpus, Sampler, decode, encode, standard_library
from mics_models.data.corpus import VOCAB
from mics_models.generate import generate
from mics_models.gpt import GPT, GPTConfig

MICRO_STEPS = 2  # per optimizer step; two, so that the default run exercises accumulation
WARMUP = 0.05  # of the steps, to the full learning rate
LAST_RATE = 0.05  # of the full learning rate, at the end of the cosine
WEIGHT_DECAY = 0.1  # of matrices, not of norms and biases
LARGEST_NORM = 1.0  # gradients with a larger one are scaled down to it
REPORTS = 20  # lines of progress in a run
EVALUATED = 64  # held-out samples in a batch: one batch for a line of progress
LAST_BATCHES = 4  # and so many at the end
PROMPT = "\ndef "
SAMPLED = 240  # tokens of the sample at the end


@dataclass(frozen=True)
class Settings:
    """What the command line sets."""

    config: str = "byte-tiny"
    steps: int = 1000
    batch: int = 16  # samples per optimizer step
    seq: int = 128
    lr: float = 3e-3
    seed: int = 0
    minutes: float = 2.5  # before the last evaluation and the sample, which take seconds

    def __post_init__(self) -> None:
        if self.config not in GPTS:
            raise ValueError(f"pretrain: no config is called {self.config!r}, expected one of {', '.join(GPTS)}")
        for name in ("steps", "batch", "seq", "lr", "minutes"):
            if not getattr(self, name) > 0:
                raise ValueError(f"pretrain: --{name} is {getattr(self, name)}, expected more than 0: raise it")
        if self.batch % MICRO_STEPS:
            raise ValueError(
                f"pretrain: --batch is {self.batch}, expected a multiple of the {MICRO_STEPS} micro-steps: make it even"
            )
        if self.seq > GPTS[self.config].context:
            raise ValueError(
                f"pretrain: --seq is {self.seq}, expected at most {GPTS[self.config].context}, the context of "
                f"{self.config}: lower it"
            )


@dataclass(frozen=True)
class Result:
    """What a run came to; losses in nats per byte."""

    losses: list[float]  # of each step's batch, before the step
    held_out: float
    seconds: float
    sample: str


def parse(arguments: list[str] | None) -> Settings:
    """The settings of a command line."""
    default = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m mics_models.pretrain",
        description="Pretrain a GPT on the sources of Python's standard library, on one process.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--config", default=default.config, choices=GPTS, help="the model")
    parser.add_argument("--steps", default=default.steps, type=int, help="optimizer steps")
    parser.add_argument("--batch", default=default.batch, type=int, help="samples per step")
    parser.add_argument("--seq", default=default.seq, type=int, help="tokens per sample")
    parser.add_argument("--lr", default=default.lr, type=float, help="the highest learning rate")
    parser.add_argument("--seed", default=default.seed, type=int, help="of weights, batches and the sample")
    parser.add_argument("--minutes", default=default.minutes, type=float, help="end training after these, whatever")
    chosen = parser.parse_args(arguments)
    try:
        return Settings(**vars(chosen))
    except ValueError as error:
        parser.error(str(error).removeprefix("pretrain: "))


def describe(settings: Settings, config: GPTConfig, corpus: Corpus) -> str:
    """The plan: what will be trained on what, and what it takes."""
    parameters, flops = config.num_params(), config.flops_per_token(settings.seq)
    tokens = settings.batch * settings.seq
    weights = 4 * parameters / 1e6  # float32
    files = f"{corpus.train_files} files, {len(corpus.held_out) / 1e6:.2f} MB in {corpus.held_out_files} held out"
    rows = {
        "model": f"{settings.config}: {parameters:,} parameters, {config.layers} layers, width {config.width}, "
        f"{config.heads} heads ({config.kv_heads} of keys and values), on one {choose_device().type}",
        "data": f"Python {platform.python_version()}'s library: {len(corpus.train) / 1e6:.2f} MB in {files}",
        "batch": f"{settings.batch} samples x {settings.seq} tokens = {tokens:,} tokens per step, "
        f"in {MICRO_STEPS} micro-steps",
        "compute": f"{flops:,} FLOPs per token, {flops * tokens * settings.steps / 1e12:.3g} TFLOPs in all",
        "memory": f"weights {weights:.1f} MB + gradients {weights:.1f} + optimizer {2 * weights:.1f} = "
        f"{4 * weights:.1f} MB, beside the activations",
        "schedule": f"{settings.steps} steps or {settings.minutes:g} minutes, AdamW, learning rate {settings.lr:g} "
        "after a warm-up, then a cosine",
    }
    return "\n".join(f"  {name:<9} {text}" for name, text in rows.items())


def choose_device() -> torch.device:
    """The one device of this process."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def rate(step: int, settings: Settings) -> float:
    """The learning rate of a step: a linear warm-up, then a cosine down to a fraction that is not zero."""
    warmup = max(1, round(WARMUP * settings.steps))
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, settings.steps - warmup)
    return settings.lr * (LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * done)) / 2)


class Training:
    """The model with its optimizer and its data."""

    def __init__(self, settings: Settings, corpus: Corpus) -> None:
        self.settings = settings
        self.device = choose_device()
        torch.manual_seed(settings.seed)
        self.model = GPT(GPTS[settings.config]).to(self.device)
        self.train_data = Sampler(corpus.train, settings.seq, settings.batch, settings.seed)
        # The seed of the held-out samples is fixed: runs with different seeds are measured on the same text.
        self.held_out_data = Sampler(corpus.held_out, settings.seq, EVALUATED, seed=0)
        matrices = [parameter for parameter in self.model.parameters() if parameter.ndim > 1]
        vectors = [parameter for parameter in self.model.parameters() if parameter.ndim < 2]
        groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95), fused=True)

    def step(self, number: int) -> float:
        """Train on one batch, and return its loss before the step."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate(number, self.settings)
        total = torch.zeros((), device=self.device)
        for micro_step in range(MICRO_STEPS):
            loss = self._loss(*self.train_data.micro_batch(number, micro_step, MICRO_STEPS)) / MICRO_STEPS
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        if not math.isfinite(value := total.item()):
            first = number * self.settings.batch
            raise RuntimeError(
                f"pretrain: the loss of step {number} is {value}, expected a finite one, on samples {first} to "
                f"{first + self.settings.batch - 1} of seed {self.settings.seed}: lower --lr {self.settings.lr:g}"
            )
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), LARGEST_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return value

    @torch.no_grad()
    def held_out_loss(self, batches: int = 1) -> float:
        """The mean loss on the first held-out batches, always the same ones, in nats per byte."""
        return sum(self._loss(*self.held_out_data.micro_batch(n)).item() for n in range(batches)) / batches

    def _loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = self.model(tokens.to(self.device), targets.to(self.device))
        return loss


class Progress:
    """The lines of progress, with the speed since the line before; evaluations do not count in it."""

    def __init__(self, settings: Settings, end: float) -> None:
        self.settings = settings
        self.end = end  # when the minutes are over, on time.monotonic()'s clock
        self.steps = 0
        self.since = time.monotonic()

    def line(self, losses: list[float], evaluate: Callable[[], float]) -> str:
        """What to report after the steps that had these losses."""
        settings, now = self.settings, time.monotonic()
        recent = losses[self.steps :]
        seconds = (now - self.since) / len(recent)  # of a step
        left = max(0, round(min(self.end - now, seconds * (settings.steps - len(losses)))))
        held_out = evaluate()
        self.steps, self.since = len(losses), time.monotonic()
        speed = settings.batch * settings.seq / seconds
        flops = speed * GPTS[settings.config].flops_per_token(settings.seq)
        return (
            f"step {len(losses):>{len(str(settings.steps))}}/{settings.steps}  loss {sum(recent) / len(recent):.3f}  "
            f"held out {held_out:.3f} nats/byte  {speed:,.0f} tokens/s  {flops / 1e9:.1f} GFLOP/s  "
            f"ETA {left // 60}:{left % 60:02d}"
        )


def pretrain(settings: Settings, say: Callable[[str], None] = print) -> Result:
    """Train as the settings say, telling `say` the plan, the progress and the outcome."""
    begin = time.monotonic()
    end = begin + 60 * settings.minutes
    say("mics pretrain: one process, nothing sharded; sharding arrives with mics-core")
    corpus = standard_library()
    say(describe(settings, GPTS[settings.config], corpus))
    training = Training(settings, corpus)
    progress = Progress(settings, end)
    every = max(1, settings.steps // REPORTS)
    losses: list[float] = []
    while len(losses) < settings.steps and time.monotonic() < end:
        losses.append(training.step(len(losses)))
        if len(losses) % every == 0:
            say(progress.line(losses, training.held_out_loss))
    if len(losses) < settings.steps:
        say(f"the {settings.minutes:g} minutes are over: stopped after {len(losses)} of {settings.steps} steps")
    held_out = training.held_out_loss(LAST_BATCHES)
    tokens = generate(training.model, encode(PROMPT), SAMPLED, seed=settings.seed)
    result = Result(losses, held_out, time.monotonic() - begin, decode(tokens))
    say(f"a sample after {PROMPT!r}:\n{result.sample}\n")
    samples, tokens_seen = LAST_BATCHES * EVALUATED, len(losses) * settings.batch * settings.seq
    say(
        f"held-out loss {held_out:.3f} nats/byte on {samples} samples (a uniform guess: {math.log(VOCAB):.3f}) after "
        f"{len(losses)} steps, {tokens_seen:,} tokens and {result.seconds:.0f} s"
    )
    return result


def main(arguments: list[str] | None = None) -> int:
    """Run the command line, and return the exit status."""
    settings = parse(arguments)
    try:
        pretrain(settings, say=partial(print, flush=True))  # progress is to be seen in a pipe, too
    except KeyboardInterrupt:
        print("\npretrain: interrupted; nothing is saved, because checkpoints arrive with mics-core")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
