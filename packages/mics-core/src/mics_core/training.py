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
from mics_core.ledger import Ledger
from mics_core.micro_batches import Count
from mics_core.phases import MicroStep
from mics_core.runtime import Runtime
from mics_core.shards import Shards

Batch = TypeVar("Batch")


def accumulate(model: nn.Module, micro_batches: Iterable[Batch]) -> Iterator[Batch]:
    """The micro-batches of one optimizer step, the last one marked: its backward sends gradients between replicas.

    So the slow links work while the backward computes. All ranks must bring equally many. Without it a loop is right,
    too; gradients then travel at the clip or step.

    >>> for batch in accumulate(model, micro_batches):                            # doctest: +SKIP
    ...     (model(**batch) / len(micro_batches)).backward()
    """
    runtime = registry.runtime_of(model, "accumulate")
    conductor, world = runtime.conductor, runtime.world
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
            conductor.mark(MicroStep.LAST if last else MicroStep.MORE_FOLLOW, count)
            yield batch  # type: ignore[misc]
            batch = following
    finally:
        conductor.mark(MicroStep.UNMARKED, None)


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
    return registry.runtime_of(model, "clip_grad_norm_").clip(float(max_norm))


def ledger(model: nn.Module) -> Ledger:
    """What this rank has sent and moved in memory since the last `reset()`, and what the formula expects of a step."""
    runtime = registry.runtime_of(model, "ledger")
    exposed = runtime.tally.standstill.seconds()  # without what only this call waits for
    runtime.wait()
    return Ledger(runtime.tally, runtime.formula, exposed)


@contextmanager
def full_params(model: nn.Module) -> Iterator[None]:
    """Inside, every parameter is whole, in the master dtype; what is changed there is kept, cut again at the end.

    All ranks must enter, and change alike. Every rank holds the whole model meanwhile. A forward computes with these
    parameters; a backward raises, and steps have to wait until the end.
    """
    runtime = registry.runtime_of(model, "full_params")
    runtime.rest("full_params")
    runtime.wait()
    stations = runtime.conductor.stations
    with torch.no_grad():
        whole = [
            (part, places, _whole_parameters(runtime, part)) for station in stations for part, places in station.places
        ]
    runtime.conductor.open()
    for _, places, parameters in whole:
        places.own(parameters)
    try:
        yield
    finally:
        changed = [places.owned() for _, places, _ in whole]  # also what was put in their place
        for _, places, _ in whole:
            places.register()
        runtime.conductor.close()
        with torch.no_grad():
            for (part, _, _), values in zip(whole, changed, strict=True):
                part.check_shapes(values)
            for (part, _, _), values in zip(whole, changed, strict=True):
                part.fill(values)


def _whole_parameters(runtime: Runtime, part: Shards) -> list[nn.Parameter]:
    """The master weights of all ranks, in the master dtype."""
    flat = _gather_master(runtime, part).to(runtime.precision.master)
    parameters = [
        nn.Parameter(flat[slot.begin : slot.end].view(slot.shape), requires_grad=part.trained)
        for slot in part.layout.slots
    ]
    for parameter in parameters if part.trained else ():
        parameter.register_hook(_refuse_gradient)  # type: ignore[no-untyped-call]
    return parameters


def _refuse_gradient(_: torch.Tensor) -> None:
    raise LifecycleError(
        "full_params: a backward ran inside it, and its gradients would be lost with the whole parameters: run forward "
        "and backward outside"
    )


def _gather_master(runtime: Runtime, part: Shards) -> torch.Tensor:
    """The master weights of all ranks side by side."""
    degree = runtime.sharding.optimizer if part.trained else runtime.sharding.params
    flat = part.master.new_empty(part.layout.size)
    runtime.ladder.assemble(part.master, flat, degree)
    return flat


@torch.no_grad()
def check_replicas(model: nn.Module) -> None:
    """Raise on every rank if ranks that should hold the same bits of the weights do not."""
    runtime = registry.runtime_of(model, "check_replicas")
    runtime.rest("check_replicas")
    runtime.conductor.bring_what_users_wrote()
    runtime.ladder.order.compare()
    runtime.wait()
    trouble: list[str] = []
    for station in runtime.conductor.stations:
        for part in station.gathered.shards:
            states = [("shard", part.shard, runtime.sharding.params)]
            if part.trained:
                states.append(("master", part.master, runtime.sharding.optimizer))
            for name, state, degree in states:
                rows = runtime.ladder.compare(fingerprint(state), degree).tolist()
                holders = runtime.ladder.rungs.replicating(runtime.world.rank, degree)
                ranks = [runtime.world.ranks[holder] for holder in holders]
                odd = [rank for rank, row in zip(ranks, rows, strict=True) if row != rows[0]]
                if odd:
                    trouble.append(f"the {name} of {station.gathered.unit} on ranks {odd} and on rank {ranks[0]}")
    found = sorted({line for lines in runtime.world.tell(trouble, "check_replicas") for line in lines})
    if found:
        raise RuntimeError(
            f"check_replicas: {'; '.join(found)} differ, expected the same bits: a rank's memory or arithmetic is at "
            "fault, or parameters were changed on some ranks only; go back to the last checkpoint"
        )
