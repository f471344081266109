"""What a training loop calls besides forward, backward and step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from numbers import Real
from typing import TypeVar

import torch
from torch import nn

from mics_core import registry
from mics_core.errors import ConfigError, LifecycleError
from mics_core.fingerprint import fingerprint
from mics_core.lifecycle import Phase
from mics_core.observe.ledger import Ledger
from mics_core.optim import stepping
from mics_core.registry import Runtime
from mics_core.step.micro_batches import Count, MicroStep
from mics_core.unit.shards import Shards

Batch = TypeVar("Batch")


def accumulate(model: nn.Module, micro_batches: Iterable[Batch]) -> Iterator[Batch]:
    """The micro-batches of one optimizer step, the last one marked: hop 2 begins in its backward.

    So the slow links work while the backward computes. All ranks must bring equally many. Without it a loop is right,
    too; hop 2 then waits for the clip or step.

    >>> for batch in accumulate(model, micro_batches):                            # doctest: +SKIP
    ...     (model(**batch) / len(micro_batches)).backward()
    """
    runtime = registry.runtime_of(model, "accumulate")
    lifecycle, world = runtime.lifecycle, runtime.world
    try:
        batches = iter(micro_batches)
    except TypeError as error:
        raise ConfigError(
            f"accumulate: micro_batches is {micro_batches!r}, expected the micro-batches of a step, such as a list"
        ) from error
    length = len(micro_batches) if isinstance(micro_batches, Sized) else None
    try:
        batch = next(batches, _END)
        if batch is _END:
            Count(world, length, now=False, more=False).check()  # no backward comes that would
        first = True
        while batch is not _END:
            following = next(batches, _END)
            last = following is _END
            # Once, where it is known how many there are.
            count = Count(world, length, now=True, more=not last) if first or length is None else None
            first = False
            runtime.ladder.order.call("accumulate's next micro-batch")
            lifecycle.mark(MicroStep.LAST if last else MicroStep.MORE_FOLLOW, count)
            yield batch  # type: ignore[misc]
            batch = following
    finally:
        lifecycle.mark(MicroStep.UNMARKED, None)


_END = object()


def clip_grad_norm_(model: nn.Module, max_norm: float) -> torch.Tensor:
    """Shrink all gradients so that their 2-norm over the whole model is at most `max_norm`; returns the norm before.

    Every element counts once, however it is sharded. The norm stays on the device: reading it makes the host wait. With
    mics.AdamW gradients are multiplied as the step reads them, and `p.grad` still shows them unclipped.
    """
    if not (isinstance(max_norm, Real | torch.Tensor) and max_norm >= 0):
        raise ConfigError(
            f"clip_grad_norm_: max_norm is {max_norm!r}, expected a norm from 0 up, or infinity to measure it"
        )
    return stepping.clip(registry.runtime_of(model, "clip_grad_norm_"), float(max_norm))


def ledger(model: nn.Module) -> Ledger:
    """What this rank has sent and moved in memory since the last `reset()`, and what the formula expects of a step."""
    runtime = registry.runtime_of(model, "ledger")
    exposed = runtime.counters.exposed.seconds()  # without what only this call waits for
    runtime.wait()
    return Ledger(runtime.counters, runtime.formula, exposed)


@contextmanager
def full_params(model: nn.Module) -> Iterator[None]:
    """Inside, every parameter is whole, in the master dtype; what is changed there is kept, cut again at the end.

    All ranks must enter, and change alike. Every rank holds the whole model meanwhile. A forward computes with these
    parameters; a backward raises, and steps have to wait until the end.
    """
    runtime = registry.runtime_of(model, "full_params")
    runtime.lifecycle.require_rest("full_params")
    runtime.lifecycle.free()
    runtime.wait()
    with torch.no_grad():
        whole = [[_whole_parameters(runtime, part) for part in unit.parts] for unit in runtime.units]
    with runtime.lifecycle.within(Phase.OPEN):
        for unit, parts in zip(runtime.units, whole, strict=True):
            unit.views.register([parameter for parameters in parts for parameter in parameters])
        try:
            yield
        finally:
            changed = [unit.views.registered() for unit in runtime.units]  # also what was put in their place
            for unit in runtime.units:
                unit.views.register()
            values = [
                (part, [tensors.pop(0) for _ in part.parameters])
                for unit, tensors in zip(runtime.units, changed, strict=True)
                for part in unit.parts
            ]
            for part, tensors in values:
                part.check_shapes(tensors)
            with torch.no_grad():
                for part, tensors in values:
                    part.fill(tensors)


def _whole_parameters(runtime: Runtime, part: Shards) -> list[nn.Parameter]:
    """The master weights of all ranks, in the master dtype."""
    degree = runtime.sharding.optimizer if part.is_trained else runtime.sharding.params
    flat = part.master.new_empty(part.layout.size)
    runtime.ladder.all_gather_full(part.master, flat, degree)
    flat = flat.to(runtime.precision.master)
    parameters = [
        nn.Parameter(flat[slot.begin : slot.end].view(slot.shape), requires_grad=part.is_trained)
        for slot in part.layout.slots
    ]
    for parameter in parameters if part.is_trained else ():
        parameter.register_hook(_refuse_gradient)  # type: ignore[no-untyped-call]
    return parameters


def _refuse_gradient(_: torch.Tensor) -> None:
    raise LifecycleError(
        "full_params: a backward ran inside it, and its gradients would be lost with the whole parameters: run forward "
        "and backward outside"
    )


@torch.no_grad()
def check_replicas(model: nn.Module) -> None:
    """Raise on every rank if ranks that should hold the same bits of the weights do not."""
    runtime = registry.runtime_of(model, "check_replicas")
    runtime.lifecycle.require_rest("check_replicas")
    runtime.lifecycle.bring_what_users_wrote()
    runtime.ladder.order.compare()
    runtime.wait()
    trouble: list[str] = []
    for unit in runtime.units:
        for part in unit.parts:
            states = [("shard", part.shard, runtime.sharding.params)]
            if part.is_trained:
                states.append(("master", part.master, runtime.sharding.optimizer))
            for name, state, degree in states:
                rows = runtime.ladder.compare(fingerprint(state), degree).tolist()
                holders = runtime.ladder.rungs.replicating(runtime.world.rank, degree)
                ranks = [runtime.world.ranks[holder] for holder in holders]
                odd = [rank for rank, row in zip(ranks, rows, strict=True) if row != rows[0]]
                if odd:
                    trouble.append(f"the {name} of {unit.name} on ranks {odd} and on rank {ranks[0]}")
    found = sorted({line for lines in runtime.world.all_gather_object(trouble, "check_replicas") for line in lines})
    if found:
        raise RuntimeError(
            f"check_replicas: {'; '.join(found)} differ, expected the same bits: a rank's memory or arithmetic is at "
            "fault, or parameters were changed on some ranks only; go back to the last checkpoint"
        )
