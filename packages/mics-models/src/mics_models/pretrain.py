"""Pretrain a GPT or a BERT under the runtime: `torchrun -m mics_models.pretrain [FILE.toml] [table.key=value ...]`.

`make pretrain` runs the defaults: a byte-level GPT, on four CPU ranks that stand for two nodes, or on all GPUs. Plain
python does the same on one rank. training/settings.py lists every key with its default.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import mics_core as mics
from mics_models.data import Corpus, load, standard_library
from mics_models.gpt import GPT
from mics_models.sampling import generate
from mics_models.training import journal, settings
from mics_models.training.batches import Batches, build, configure, to_device
from mics_models.training.interrupts import Interrupts
from mics_models.training.news import Exchange, News
from mics_models.training.peak import peak
from mics_models.training.schedule import rate
from mics_models.training.screen import Screen
from mics_models.training.settings import Settings
from mics_models.training.stopwatch import Stopwatch


class Training:
    """The model, sharded, with its optimizer and its batches. `mics.init()` comes first."""

    def __init__(self, told: Settings, corpus: Corpus, device: torch.device) -> None:
        self.told = told
        self.device = device
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.config = configure(told.model)
        self.batches = Batches(told, self.config, corpus, self.rank, self.world)
        torch.manual_seed(told.seed)
        with torch.device("meta"):  # no rank ever holds the whole model
            model = build(self.config)
        decayed = {name for name, parameter in model.named_parameters() if parameter.ndim > 1}
        self.precision = getattr(mics.Precision, told.sharding.precision)()
        self.model = mics.shard(
            model,
            _sharding(told, self.world),
            precision=self.precision,
            ranks_per_node=told.sharding.ranks_per_node or None,
            prefetch_bytes=None if told.sharding.prefetch_mb < 0 else told.sharding.prefetch_mb << 20,
        )
        if told.model.compile:
            self.model.compile_blocks()
        optimizer = told.optimizer
        named = list(self.model.named_parameters())
        self.optimizer = mics.AdamW(
            [
                {"params": [p for name, p in named if name in decayed], "weight_decay": optimizer.weight_decay},
                {"params": [p for name, p in named if name not in decayed], "weight_decay": 0.0},
            ],
            lr=optimizer.lr,
            betas=(optimizer.beta1, optimizer.beta2),
            eps=optimizer.eps,
        )
        self.stopwatch = Stopwatch(device)

    def step(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimizer step: this rank's loss of each micro-step, before it, and the norm of the gradient."""
        micro_steps = self.told.batch.micro_steps
        losses = []
        for micro_step in mics.accumulate(self.model, range(micro_steps)):
            loss = self.model(**to_device(self.batches.training(number, micro_step), self.device))
            (loss / micro_steps).backward()
            losses.append(loss.detach())
        norm = mics.clip_grad_norm_(self.model, self.told.optimizer.clip or math.inf)
        for group in self.optimizer.param_groups:
            group["lr"] = self.told.optimizer.lr * rate(number, self.told.schedule)
        with self.stopwatch.part():
            self.optimizer.step()
            self.optimizer.zero_grad()
        return torch.stack(losses), norm

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """The mean loss on held-out data, always the same, in nats per token. All ranks must call it."""
        batches, micro_steps = self.told.evaluation.batches, self.told.batch.micro_steps
        self.model.eval()
        total = torch.zeros((), device=self.device)
        for batch in range(batches):
            for micro_step in range(micro_steps):
                total += self.model(**to_device(self.batches.evaluation(batch, micro_step), self.device))
        self.model.train()
        if self.world > 1:
            dist.all_reduce(total)
        return total.item() / (batches * micro_steps * self.world)

    def describe(self, corpus: Corpus) -> dict[str, str]:
        """The plan: what is trained on what, where it lies, and what will travel."""
        told, batch, formula = self.told, self.told.batch, mics.ledger(self.model).formula
        resting, working = formula.at_rest(), formula.working()
        travels: dict[str, int] = {}
        for (_, rung), traffic in formula.step(batch.micro_steps).items():
            travels[rung] = travels.get(rung, 0) + traffic.bytes
        flops = self.config.flops_per_token(batch.seq)
        tokens = batch.samples * batch.seq
        p, g, o = (getattr(formula.sharding, name) for name in ("params", "grads", "optimizer"))
        node = min(formula.rungs.topology.ranks_per_node, self.world)
        return {
            "model": f"{told.model.name}: {self.config.num_params():,} parameters, {self.config.layers} layers, width "
            f"{self.config.width}; {flops:,} FLOPs a token",
            "data": f"{told.data.folder or 'the sources of the Python standard library'}: {len(corpus.train):,} tokens "
            f"in {corpus.train_files:,} documents, {len(corpus.held_out):,} in {corpus.held_out_files:,} held out",
            "ranks": f"{self.world} on {self.device.type}, {node} on a node; computing in {told.sharding.precision}",
            "sharding": f"parameters cut into {p}, gradients into {g}, optimizer state into {o}",
            "memory": f"{_mb(sum(resting.values()))} a rank at rest ("
            + ", ".join(f"{name} {_mb(count)}" for name, count in resting.items() if count)
            + f"), {_mb(sum(working.values()))} for gradients on their way, and the activations",
            "traffic": "a rank sends in a step "
            + (", ".join(f"{_mb(count)} over {rung}" for rung, count in travels.items()) or "nothing"),
            "batch": f"{batch.samples} samples of {batch.seq} = {tokens:,} tokens a step, in {batch.micro_steps} "
            "micro-steps",
            "schedule": f"{told.schedule.steps} steps, {tokens * told.schedule.steps:,} tokens; AdamW at "
            f"{told.optimizer.lr:g}, {told.schedule.kind}",
        }


def _sharding(told: Settings, world: int) -> mics.Sharding:
    """The three degrees, where 0 means the ranks of a node, or what the one before is."""
    node = min(told.sharding.ranks_per_node or int(os.environ.get("LOCAL_WORLD_SIZE", "1")), world)
    params = told.sharding.params or node
    grads = told.sharding.grads or params
    return mics.Sharding(params, grads, told.sharding.optimizer or grads)


def _mb(count: int) -> str:
    return f"{count / 1e6:.2f} MB"


class Run:
    """A training in its folder: it reports, evaluates, saves, and leaves when it is asked to."""

    def __init__(self, training: Training, corpus: Corpus, folder: Path, screen: Screen) -> None:
        self.training = training
        self.told = training.told
        self.corpus = corpus
        self.folder = folder
        self.screen = screen
        self.checkpoints = folder / "checkpoints"
        self.done = self._resume() if self.told.checkpoint.resume else 0
        self.journal: journal.Journal | None = None
        if training.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "settings.toml").write_text(settings.to_toml(self.told))
            self.journal = journal.Journal(folder, first=self.done, tensorboard=self.told.log.tensorboard)
        self.peak = peak(training.device, training.precision.compute, self.told.log.peak_tflops)
        self.last = News(math.nan, (), False)

    def train(self) -> bool:
        """Take the steps; whether all were taken."""
        training, told, steps = self.training, self.told, self.told.schedule.steps
        end = time.monotonic() + 60 * told.schedule.minutes if told.schedule.minutes else math.inf
        exchange, saved = Exchange(training.device), self.done
        self.screen.begin(self.done, steps)
        self._begin_lap()
        with Interrupts() as interrupts:
            while self.done < steps and not self.last.stop:
                losses, norm = training.step(self.done)
                self._hear(exchange.read(), self.done - 1)
                exchange.send(losses, stop=interrupts.received is not None or time.monotonic() > end)
                self.done += 1
                if self.done % told.log.every == 0 or self.done == steps:
                    self._hear(exchange.read(), self.done - 1)
                    self._report(norm)
                if told.checkpoint.every and self.done % told.checkpoint.every == 0 and self.done < steps:
                    self._save(background=told.checkpoint.background)
                    saved = self.done
            self._hear(exchange.read(), self.done - 1)
            self.screen.end()
            if self.done < steps:
                why = interrupts.received.name if interrupts.received else "the minutes are over, or another rank asked"
                self.screen.say(f"stopped after {self.done} of {steps} steps: {why}")
            if self.done > saved or self.done == steps:
                self._save(background=False)
        return self.done == steps

    def finish(self) -> float:
        """The held-out loss at the end, a sample, and the curves."""
        held_out = self.training.held_out_loss()
        if self.journal is not None:
            self.journal.close()
            from mics_models.training.curves import draw  # matplotlib takes a second to import

            draw(journal.read(self.folder), self.told.model.name, self.folder / "curves.png")
        if isinstance(self.training.model, GPT) and self.told.evaluation.sampled:
            prompt = self.corpus.encode(self.told.evaluation.prompt)
            tokens = generate(self.training.model, prompt, self.told.evaluation.sampled, seed=self.told.seed)
            self.screen.say(f"a sample:\n{self.corpus.decode(tokens.cpu())}\n")
        self.screen.say(
            f"held-out loss {held_out:.4f} nats a token (a uniform guess: {math.log(self.corpus.vocab):.3f}) after "
            f"{self.done} steps; log, curves.png and checkpoints are in {self.folder}"
        )
        return held_out

    def _hear(self, news: News | None, step: int) -> None:
        """What all ranks said of a step. A loss that is not finite ends the run: what follows would be worthless."""
        if news is None:
            return
        self.last = news
        self.screen.stepped(step + 1, news.loss)
        if news.bad:
            micro_step, rank = news.bad[0]
            samples = self.training.batches.samples(step, micro_step, rank)
            raise FloatingPointError(
                f"pretrain: the loss of step {step} is not finite in micro-step {micro_step} on rank {rank}, on "
                f"samples {samples.start} to {samples.stop - 1} of seed {self.told.seed}, expected a finite one: look "
                f"at these, or lower optimizer.lr and go on from the last checkpoint in {self.checkpoints}"
            )

    def _begin_lap(self) -> None:
        ledger = mics.ledger(self.training.model)
        ledger.reset()
        self.training.stopwatch.lap()
        self._lap = (self.done, time.perf_counter())

    def _report(self, norm: torch.Tensor) -> None:
        told, training = self.told, self.training
        steps, seconds = self.done - self._lap[0], time.perf_counter() - self._lap[1]
        exposed = mics.ledger(training.model).exposed
        optimizer = training.stopwatch.lap()
        speed = steps * told.batch.samples * told.batch.seq / seconds
        flops = speed * training.config.flops_per_token(told.batch.seq)
        row = {
            "step": self.done,
            "loss": self.last.loss,
            "norm": norm.item(),
            "lr": told.optimizer.lr * rate(self.done - 1, told.schedule),
            "tokens_per_second": speed,
            "mfu": flops / (training.world * self.peak.flops),
            "step_seconds": seconds / steps,
            "compute": (seconds - exposed - optimizer) / steps,
            "exposed": exposed / steps,
            "optimizer": optimizer / steps,
        }
        if told.evaluation.every and self.done % told.evaluation.every == 0:
            row["held_out"] = training.held_out_loss()
        if self.journal is not None:
            self.journal.write(row)
        self.screen.report(row, told.schedule.steps)
        self._begin_lap()

    def _save(self, *, background: bool) -> None:
        mics.save(
            self.checkpoints / f"step-{self.done:08d}",
            self.training.model,
            self.training.optimizer,
            background=background,
            keep=self.told.checkpoint.keep,
            step=self.done,
            settings=dict(settings.flatten(self.told)),
        )
        self._begin_lap()

    def _resume(self) -> int:
        extra: dict[str, Any] = mics.load(self.checkpoints, self.training.model, self.training.optimizer)
        now, then = dict(settings.flatten(self.told)), extra["settings"]
        for key in now:
            if key in then and now[key] != then[key] and key != "checkpoint.resume":
                self.screen.say(f"resuming with {key} = {now[key]!r}; the checkpoint was made with {then[key]!r}")
        self.screen.say(f"resuming after step {extra['step']}")
        return int(extra["step"])


def pretrain(told: Settings, device: torch.device) -> float:
    """Run the whole program; the held-out loss at its end, nan if it was asked to leave before."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    screen = Screen(speaks=rank == 0)
    folder = _folder(told, rank)
    corpus = load(Path(told.data.folder)) if told.data.folder else standard_library()
    training = Training(told, corpus, device)
    screen.plan("mics pretrain", training.describe(corpus))
    run = Run(training, corpus, folder, screen)
    screen.say(f"MFU is of {run.peak.flops / 1e12:.3g} TFLOP/s a device: {run.peak.source}")
    return run.finish() if run.train() else math.nan


def _folder(told: Settings, rank: int) -> Path:
    """Where the run keeps what it makes; the same on all ranks."""
    named = [told.output or f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{told.model.name}"]
    taken = [rank == 0 and not told.checkpoint.resume and (Path(named[0]) / journal.LOG).exists()]
    if dist.is_initialized():
        dist.broadcast_object_list(named)
        dist.broadcast_object_list(taken)
    if taken[0]:
        raise FileExistsError(
            f"pretrain: {named[0]} has a run already, expected a new folder: name another output, or go on with "
            "checkpoint.resume=true"
        )
    return Path(named[0])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m mics_models.pretrain",
        description="Pretrain a GPT or a BERT under the runtime.",
        epilog="keys and their defaults:\n\n" + settings.to_toml(Settings()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", nargs="?", type=Path, help="a TOML file of settings")
    parser.add_argument("changes", nargs="*", metavar="table.key=value", help="what is to be different from it")
    chosen = parser.parse_args(arguments)
    if chosen.file is not None and "=" in str(chosen.file):
        chosen.changes.insert(0, str(chosen.file))
        chosen.file = None
    try:
        told = settings.read(chosen.file, chosen.changes)
        configure(told.model)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error).removeprefix("settings: "))
    pretrain(told, mics.init())
    return 0


if __name__ == "__main__":
    sys.exit(main())
