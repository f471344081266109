"""What users do, each as a function that records it and returns what is to live until the recording has been read."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import mics_core as mics
from mics_core.checkpoint.saving import _Job
from mics_core.comm.recorded import RecordedStream
from training import Model, Setting, Trainer
from watched_world import WatchedWorld

STEPS = 3
Scenario = Callable[[Setting, WatchedWorld], list[Any]]


def plain(setting: Setting, world: WatchedWorld) -> list[Any]:
    """Steps, nothing between them."""
    trainer = Trainer(setting, world)
    with world.recording.on(trainer.model):
        for _ in range(STEPS):
            trainer.step()
        mics.ledger(trainer.model)
    return [trainer]


def evaluating(setting: Setting, world: WatchedWorld) -> list[Any]:
    """A forward without gradients before, between and inside steps."""
    trainer = Trainer(setting, world)
    with world.recording.on(trainer.model):
        for _ in range(STEPS):
            trainer.evaluate()
            trainer.backward()
            trainer.evaluate()
            trainer.update()
            trainer.evaluate()
        for batch in mics.accumulate(trainer.model, trainer.batches[:3]):
            trainer.model(batch).backward()
            trainer.evaluate()
        trainer.update()
    return [trainer]


def changing(setting: Setting, world: WatchedWorld) -> list[Any]:
    """Passes that skip units: what was gathered ahead is dropped."""
    trainer = Trainer(setting, world)
    orders: list[set[int]] = [set(), set(), {1}, {1, 2}, set(), {3}, set()]
    with world.recording.on(trainer.model):
        for skipped in orders:
            trainer.model.skipped = skipped
            trainer.step()
    return [trainer]


def leaving_early(setting: Setting, world: WatchedWorld) -> list[Any]:
    """The loop over micro-batches is left before its end, and a step follows, or the gradients are dropped."""
    trainer = Trainer(setting, world)

    def leave() -> None:
        for batch in mics.accumulate(trainer.model, trainer.batches[:4]):
            trainer.model(batch).backward()
            break

    with world.recording.on(trainer.model):
        trainer.step()
        trainer.step()
        leave()
        trainer.update()
        leave()
        trainer.optimizer.zero_grad()
        trainer.step()
        trainer.backward()
        trainer.optimizer.zero_grad()  # after hop 2 began
        trainer.step()
    return [trainer]


def failing(setting: Setting, world: WatchedWorld) -> list[Any]:
    """Forwards and a backward that raise in the middle of a step."""
    trainer = Trainer(setting, world)
    with world.recording.on(trainer.model):
        trainer.step()
        trainer.step()
        trainer.model.fails_at = 2
        with suppress(ArithmeticError):
            trainer.backward()
        trainer.model.fails_at = -1
        trainer.optimizer.zero_grad()
        trainer.step()
        trainer.model.fails_at = 3
        with suppress(ArithmeticError):
            trainer.evaluate()
        trainer.model.fails_at = -1
        trainer.step()
        hook = trainer.model.blocks[2].register_forward_hook(lambda _, __, out: _Fails.apply(out))  # type: ignore[no-untyped-call]
        with suppress(ArithmeticError):
            trainer.backward()
        hook.remove()
        trainer.optimizer.zero_grad()
        trainer.step()
    return [trainer]


class _Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # noqa: ARG004
        raise ArithmeticError


def writing(setting: Setting, world: WatchedWorld) -> list[Any]:
    """Parameters are clamped right after the step, whose refresh is under way."""
    trainer = Trainer(setting, world)
    with world.recording.on(trainer.model):
        for _ in range(STEPS):
            trainer.step()
            with torch.no_grad():
                for parameter in trainer.model.parameters():
                    parameter.clamp_(-0.2, 0.2)
        trainer.step()
    return [trainer]


def averaging(setting: Setting, world: WatchedWorld) -> list[Any]:
    """Parameters and gradients are read between steps."""
    trainer = Trainer(setting, world)
    means = [p.detach().clone() for p in trainer.model.parameters()]
    with world.recording.on(trainer.model):
        for _ in range(STEPS):
            trainer.backward()
            mics.clip_grad_norm_(trainer.model, 1.0)
            trainer.said += [p.grad.square().sum() for p in trainer.model.parameters() if p.grad is not None]
            trainer.optimizer.step()
            for mean, parameter in zip(means, trainer.model.parameters(), strict=True):
                mean.lerp_(parameter.detach(), 0.1)
            trainer.optimizer.zero_grad()
    return [trainer, means]


def opening(setting: Setting, world: WatchedWorld) -> list[Any]:
    """full_params and check_replicas between steps."""
    trainer = Trainer(setting, world)
    with world.recording.on(trainer.model):
        for _ in range(2):
            trainer.step()
            with mics.full_params(trainer.model), torch.no_grad():
                for parameter in trainer.model.parameters():
                    parameter.mul_(0.9)
            trainer.evaluate()
            trainer.step()
            mics.check_replicas(trainer.model)
    return [trainer]


def saving(setting: Setting, world: WatchedWorld) -> list[Any]:
    """A checkpoint is copied right after the step, and written while the next ones go on."""
    trainer = Trainer(setting, world)
    # An index tells what all ranks wrote, and here is one rank's part alone.
    alone = patch.object(_Job, "_make_complete", lambda *_: None)
    with world.recording.on(trainer.model), tempfile.TemporaryDirectory() as folder, alone:
        for number in range(2):
            trainer.step()
            path = Path(folder) / f"step-{number}"
            save = mics.save(path, trainer.model, trainer.optimizer, background=bool(number))
            trainer.step()
            save.wait()
    return [trainer]


def twins(setting: Setting, world: WatchedWorld) -> list[Any]:
    """Two models on the same lanes, in turns."""

    def shorten(model: Model) -> None:
        model.blocks.pop(1)

    one, two = Trainer(setting, world), Trainer(setting, world, shorten)
    with world.recording.on(one.model, two.model):
        for _ in range(STEPS):
            one.backward()
            two.backward()
            one.update()
            two.evaluate()
            two.update()
    return [one, two]


def frozen(setting: Setting, world: WatchedWorld) -> list[Any]:
    """Units whose parameters are frozen, in part and all of them."""

    def freeze(model: Model) -> None:
        for parameter in (*model.blocks[1].parameters(), *model.blocks[2].get_submodule("up").parameters()):
            parameter.requires_grad = False

    trainer = Trainer(setting, world, freeze)
    with world.recording.on(trainer.model):
        for _ in range(STEPS):
            trainer.step()
            trainer.evaluate()
    return [trainer]


def own_stream(setting: Setting, world: WatchedWorld) -> list[Any]:
    """`with torch.cuda.stream(mine): train()`."""
    trainer = Trainer(setting, world)
    mine, program = RecordedStream(world.program, "the user's"), world.program
    with world.recording.on(trainer.model):
        mine.wait_stream(program.current_stream())
        with program.stream(mine):
            for _ in range(STEPS):
                trainer.step()
            trainer.evaluate()
        program.current_stream().wait_stream(mine)
        trainer.step()
    return [trainer]


def forward_elsewhere(setting: Setting, world: WatchedWorld) -> list[Any]:
    """`with torch.cuda.stream(mine): loss = model(x)`; backward and step outside.

    On a GPU a backward runs where its forward ran. At its end the caller's stream waits for the streams of the leaves,
    of which the runtime has one, and the last callbacks run on the caller's stream.
    """
    trainer = Trainer(setting, world)
    mine, program = RecordedStream(world.program, "the user's"), world.program
    caller = program.current_stream()

    def join(outside: ExitStack) -> None:
        caller.wait_stream(mine)
        outside.enter_context(program.stream(caller))

    with world.recording.on(trainer.model):
        for _ in range(STEPS):
            for batch in trainer.micro_batches():
                mine.wait_stream(caller)
                with ExitStack() as outside, program.stream(mine):
                    end = partial(join, outside)
                    loss: Tensor = _Ends.apply(trainer.model(batch), end)  # type: ignore[no-untyped-call]
                    loss.backward()  # type: ignore[no-untyped-call]
            trainer.update()
    return [trainer]


class _Ends(torch.autograd.Function):
    """Its callback is the first one at the end of a backward."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, end: Callable[[], None]) -> Tensor:
        ctx.end = end
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        torch.autograd.Variable._execution_engine.queue_callback(ctx.end)
        return grad, None


def compiled(setting: Setting, world: WatchedWorld) -> list[Any]:
    """A block whose operators come out of torch.compile."""

    def compile_it(model: Model) -> None:
        model.blocks[1].compile(backend="aot_eager")

    trainer = Trainer(setting, world, compile_it)
    with warnings.catch_warnings(), world.recording.on(trainer.model):
        warnings.simplefilter("ignore")  # the compiler's own
        for _ in range(STEPS):
            trainer.step()
    return [trainer]


SCENARIOS: dict[str, Scenario] = {
    each.__name__: each
    for each in (
        plain,
        evaluating,
        changing,
        leaving_early,
        failing,
        writing,
        averaging,
        opening,
        saving,
        twins,
        frozen,
        own_stream,
        forward_elsewhere,
        compiled,
    )
}
