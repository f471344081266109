"""A training in its folder: when it reports, evaluates, saves and leaves.

It knows no runtime: whatever has the methods of `Trains` can be run.
"""

from __future__ import annotations

import math
import os
import shlex
import time
from pathlib import Path

from mics_models.data import Corpus
from mics_models.gpt import GPT
from mics_models.sampling import sample
from mics_models.training import journal, run_folder
from mics_models.training.interrupts import Interrupts
from mics_models.training.news import Exchange, News, Stop
from mics_models.training.peak import Peak, peak
from mics_models.training.schedule import rate
from mics_models.training.screen import Screen
from mics_models.training.settings import flatten
from mics_models.training.together import Refused, everyone, refusing, together
from mics_models.training.token_check import TokenCheck
from mics_models.training.trains import Saves, Trains


def resuming(folder: Path, world: int) -> str:
    """The command that goes on with a run."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if world == 1:
        start = ["python"]
    elif world == local:
        start = ["torchrun", "--standalone", "--nproc-per-node", str(local)]
    else:  # how nodes find each other is known to whoever started them
        start = ["torchrun", "--nnodes", str(world // local), "--nproc-per-node", str(local), "..."]
    words = [f"{folder}/settings.toml", f"output={folder}", "checkpoint.resume=always"]
    return shlex.join([*start, "-m", "mics_models.pretrain", *words])


class Run:
    """A training in its folder: it reports, evaluates, saves, and leaves when it is asked to."""

    def __init__(self, training: Trains, corpus: Corpus, folder: Path, screen: Screen) -> None:
        self.training = training
        self.settings = training.settings
        self.corpus = corpus
        self.folder = folder
        self.screen = screen
        self.checkpoints = folder / "checkpoints"
        self._losses: list[float] = []  # of the steps since the last report
        self._unwritten = ""  # why the log was not
        self.done = self._resume()
        run_folder.write(folder, self.settings, training.rank)  # a resume that is refused leaves the run as it was
        self.journal: journal.Journal | None = together(self._open_journal)
        self.peak: Peak | None = everyone(self._peak() if training.rank == 0 else None)[0]
        self.check = TokenCheck(corpus, training.rank, training.world)
        self.news = News(math.nan, (), math.nan, Stop.NO)  # of the last step that was heard of
        self._row: dict[str, float] = {}  # the last report
        self._saving: tuple[int, Saves] | None = None  # in the background, of the state after so many steps
        self._unsaved = False  # whether the last of these failed
        self._lap_steps, self._lap_seconds, self._lap_exposed = self.done, 0.0, 0.0
        self._since = time.perf_counter()

    def train(self) -> Stop:
        """Take the steps; why it ended before the last of them, if it did."""
        training, settings, steps = self.training, self.settings, self.settings.schedule.steps
        end = time.monotonic() + 60 * settings.schedule.minutes if settings.schedule.minutes else math.inf
        exchange, saved = Exchange(training.device), self.done
        self.screen.begin(self.done, steps)
        self._measure_again()
        try:
            with Interrupts() as interrupts:
                while self.done < steps and self.news.stop is Stop.NO:
                    losses, norm = training.step(self.done)
                    self._hear(exchange.read(), self.done - 1)
                    over = Stop.TIME if time.monotonic() > end else Stop.NO
                    asked = Stop.SIGNAL if interrupts.received else over
                    exchange.send(losses, norm, Stop.TROUBLE if self._trouble() else asked)
                    self.done += 1
                    if self._due(settings.log.every) or self._due(settings.evaluation.every) or self.done == steps:
                        self._hear(exchange.read(), self.done - 1)
                        self._report()
                    if self._due(settings.checkpoint.every) and self.done < steps:
                        self._hear(exchange.read(), self.done - 1)  # what is not finite must not be saved
                        self._save(background=settings.checkpoint.background)
                        saved = self.done
                self._hear(exchange.read(), self.done - 1)
                self._end_check()
                if self.done > saved or self._end_save():
                    self._save(background=False)
        finally:
            self.screen.end()
        if self.done == steps:
            return Stop.NO
        why = "the minutes are over" if self.news.stop is Stop.TIME else "a signal asked for it"
        self.screen.say(
            f"stopped after {self.done} of {steps} steps, because {why}; saved in {self.checkpoints}; to go on:\n"
            f"    {resuming(self.folder, training.world)}"
        )
        return self.news.stop

    def finish(self) -> None:
        """The held-out loss at the end, a sample, and the curves."""
        if self._row.get("step") != self.done:  # the minutes ended it between two reports
            self._report()
        if "held_out" not in self._row:
            self._row["held_out"] = self.training.held_out_loss()
            self._write()
        if isinstance(self.training.model, GPT) and self.settings.evaluation.sampled:
            prompt = self.corpus.encode(self.settings.evaluation.prompt)
            tokens = sample(self.training.model, prompt, self.settings.evaluation.sampled, seed=self.settings.seed)
            self.screen.say(f"a sample:\n{self.corpus.decode(tokens.cpu())}\n")
        together(self._draw)
        self.screen.say(
            f"held-out loss {self._row['held_out']:.4f} nats a token (a uniform guess: "
            f"{math.log(self.corpus.vocab):.3f}) after {self.done} steps; log, curves.png and checkpoints are in "
            f"{self.folder}\nwhat is next: `python -m mics_models.generate {self.folder}`, `mics inspect {self.folder}`"
        )

    def _due(self, every: int) -> bool:
        return every > 0 and self.done % every == 0

    def _hear(self, news: News | None, step: int) -> None:
        """What all ranks said of a step. What is not finite ends the run: all that follows would be worthless."""
        if news is None:
            return
        self.news = news
        if news.stop is Stop.TROUBLE:
            together(self._raise_trouble)
        self._losses.append(news.loss)
        self.screen.stepped(step + 1, news.loss)
        if news.bad:
            batches = self.training.batches
            places = [
                f"in micro-step {micro_step} on rank {rank}, samples {of.start} to {of.stop - 1}"
                for micro_step, rank in news.bad[:8]
                for of in [batches.samples(step, micro_step, rank)]
            ]
            what = f"the loss of step {step + 1} is not finite {'; '.join(places)} of seed {self.settings.seed}"
        elif not math.isfinite(news.norm) and self.settings.sharding.precision != "fp16":  # which skips such a step
            of = self.training.batches.train.samples(step)
            what = (
                f"the gradient of step {step + 1} is not finite, though the losses of all ranks are, on samples "
                f"{of.start} to {of.stop - 1} of seed {self.settings.seed}"
            )
        else:
            return
        self._end_save()
        there = (self.checkpoints / "latest").is_file()
        back = f" and go on from the last checkpoint in {self.checkpoints}" if there else ""
        raise FloatingPointError(f"{what}, expected a finite one: look at these samples, or lower optimizer.lr{back}")

    def _measure_again(self) -> None:
        self.training.measure_again()
        self._since = time.perf_counter()

    def _pause(self) -> None:
        """What follows, until `_measure_again`, is no part of a step."""
        self._lap_seconds += time.perf_counter() - self._since
        self._lap_exposed += self.training.exposed()

    def _report(self) -> None:
        """Write and show what the steps since the last report came to."""
        settings, training = self.settings, self.training
        self._pause()
        steps, seconds, exposed = self.done - self._lap_steps, self._lap_seconds, self._lap_exposed
        self._lap_steps, self._lap_seconds, self._lap_exposed = self.done, 0.0, 0.0
        optimizer = training.stopwatch.lap()
        speed = steps * settings.batch.samples * settings.batch.seq / seconds
        self._row = {
            "step": self.done,
            "loss": sum(self._losses) / len(self._losses),
            "norm": self.news.norm,
            "lr": settings.optimizer.lr * rate(self.done - 1, settings.schedule),
            "tokens_per_second": speed,
            "step_seconds": seconds / steps,
            "compute": (seconds - exposed - optimizer) / steps,
            "exposed": exposed / steps,
            "optimizer": optimizer / steps,
        }
        if self.peak is not None:
            flops = training.config.flops_per_token(settings.batch.seq)
            self._row["mfu"] = speed * flops / (training.world * self.peak.flops)
        if self._due(settings.evaluation.every) or self.done == settings.schedule.steps:
            self._row["held_out"] = training.held_out_loss()
        self._losses.clear()
        self._write()
        self.screen.report(self._row, settings.schedule.steps)
        self._measure_again()

    def _write(self) -> None:
        if self.journal is not None:
            try:
                self.journal.write(self._row)
            except OSError as error:  # on rank 0 alone: the others hear of it with the next step
                self._unwritten = f"the log of {self.folder} cannot be written ({error.strerror}): make room for it"

    def _trouble(self) -> str:
        return self._unwritten or self.check.trouble

    def _raise_trouble(self) -> None:
        if trouble := self._trouble():
            raise ValueError(f"stopped after {self.done} steps: {trouble}")

    def _end_check(self) -> None:
        """Refuse to save what was trained on damaged tokens."""
        together(self._raise_trouble)
        if not all(everyone(self.check.over)):
            self.screen.say(
                "the run ends before all of its tokens were compared with their checksums: `python -m mics_models.data "
                f"verify {self.settings.data.folder}` does that"
            )

    def _end_save(self) -> str:
        """Let the save in the background end; why it failed, if it did."""
        saving, self._saving = self._saving, None
        if saving is not None:
            step, save = saving
            try:
                with refusing():
                    save.wait()
            except Refused as error:
                self.screen.say(f"the checkpoint of step {step} was not saved: {error}")
                return str(error)
        return ""

    def _save(self, *, background: bool) -> None:
        self._pause()
        failed = self._end_save()
        if failed and self._unsaved and background:  # else this save is another try
            raise Refused(f"stopped after {self.done} steps: two checkpoints in a row were not saved: {failed}")
        self._unsaved = bool(failed)
        extra = {"step": self.done, "settings": dict(flatten(self.settings)), "losses": list(self._losses)}
        with refusing(f"stopped after {self.done} steps: "):
            save = self.training.save(self.checkpoints / f"step-{self.done:08d}", extra, background=background)
        self._saving = (self.done, save) if background else None
        self._measure_again()

    def _resume(self) -> int:
        """Go on from the last checkpoint, if that was asked for; how many steps it had taken."""
        resume = self.settings.checkpoint.resume
        extra = None if resume == "never" else self.training.load(self.checkpoints)
        if extra is None and resume != "always":
            if self.settings.model.weights:
                self.training.begin_with(self.settings.model.weights)
                self.screen.say(f"beginning with the weights of {self.settings.model.weights}")
            return 0
        if extra is None:
            raise Refused(
                f"checkpoint.resume is 'always' and {self.checkpoints} has no checkpoint, expected one: begin one with "
                "checkpoint.resume=auto, or name the output of a run"
            )
        if missing := {"settings", "step", "losses"} - extra.keys():
            raise Refused(
                f"the checkpoint in {self.checkpoints} has no {', '.join(sorted(missing))}, expected one that pretrain "
                "made: name the output of a run"
            )
        now, then = dict(flatten(self.settings)), extra["settings"]
        for key in now:
            if key in then and now[key] != then[key] and key != "checkpoint.resume":
                self.screen.say(f"resuming with {key} = {now[key]!r}; the checkpoint was made with {then[key]!r}")
        if extra["step"] >= self.settings.schedule.steps:
            raise Refused(
                f"the checkpoint has taken {extra['step']} steps and schedule.steps is {self.settings.schedule.steps}, "
                "expected more: raise schedule.steps to go on"
            )
        self._losses += extra["losses"]  # so that the next report is that of a run which never stopped
        self.screen.say(f"resuming after step {extra['step']}")
        return int(extra["step"])

    def _peak(self) -> Peak | None:
        """What the MFU is of. CPU ranks share cores, so they have one only if it is told."""
        given = self.settings.log.peak_tflops
        if self.training.device.type == "cpu" and not given:
            return None
        return peak(self.training.device, self.training.compute, given)

    def _open_journal(self) -> journal.Journal | None:
        if self.training.rank:
            return None
        return journal.Journal(self.folder, first=self.done, tensorboard=self.settings.log.tensorboard)

    def _draw(self) -> None:
        self._raise_trouble()
        if self.journal is not None:
            from mics_models.training.curves import draw  # matplotlib takes a second to import

            self.journal.close()
            draw(journal.read(self.folder), self.settings.model.name, self.folder / "curves.png")
