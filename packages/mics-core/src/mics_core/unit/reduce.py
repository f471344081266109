"""What becomes of gradients: packed and summed over G ranks in each backward (hop 1), over all once a step (hop 2).

NONE -> PARTIAL      hop1: the first backward since the last step overwrites `grad_sum`, those after it add
PARTIAL -> FINAL     hop2 is handed over: `grad_mean` holds the mean of all ranks after `unit.reducing`
any -> NONE          the first backward after a step that used it, or after the user's zero_grad dropped it
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from mics_core.comm.counters import Counters
from mics_core.comm.ladder import Coding, Ladder, Route, Transfer
from mics_core.comm.lanes import DONE, Work
from mics_core.comm.parcel import Addends, Parcel, add_up
from mics_core.comm.questions import Answers
from mics_core.comm.transfer_order import Question
from mics_core.comm.world import World
from mics_core.errors import LifecycleError
from mics_core.spec.sharding import Precision, Sharding
from mics_core.spec.topology import Scope
from mics_core.unit.unit import Gradient, Unit
from mics_kernels import pack


class Reducer:
    """Takes in gradients as backwards produce them, and makes their mean over all ranks."""

    def __init__(
        self,
        units: Sequence[Unit],
        world: World,
        ladder: Ladder,
        sharding: Sharding,
        precision: Precision,
        counters: Counters,
    ) -> None:
        self.units = [unit for unit in units if unit.trains]
        self._world = world
        self._ladder = ladder
        self._sharding = sharding
        self._counters = counters
        self._mean = 1 / world.size
        # float16 overflows in a sum over many ranks, so there the division comes before; else it comes last, once.
        self._early = precision.reduce == torch.float16
        self._hop2 = sharding.grads < world.size
        self._hop1_travels = sharding.grads > 1
        largest = max((unit.trained.layout.size for unit in self.units), default=0)
        self._staging = _Ring(2, largest, precision.reduce)  # one is filled while the other travels
        # One for each leg, so that each leg has one at work.
        legs = len(ladder.rungs.legs(sharding.grads, world.size))
        self._wires = _Ring(legs, largest // sharding.grads, precision.reduce)
        self._stepped = False
        self.agreed = False  # whether all ranks have agreed since the last gradient came
        self._asked: tuple[Question, Answers] | None = None

    def hop1(self, unit: Unit, grads: Sequence[torch.Tensor | None]) -> None:
        """Add a backward's gradients to `grad_sum`, summed over the ranks that share a copy of it."""
        shards = unit.trained
        present = [
            (index, grad)
            for index, (grad, parameter) in enumerate(zip(grads, shards.parameters, strict=True))
            if grad is not None and parameter.requires_grad  # it may have been frozen since
        ]
        if not present:
            return
        overwrite = self._open(unit, [index for index, _ in present])
        offsets, tensors = [shards.layout.slots[index].begin for index, _ in present], [grad for _, grad in present]
        early = self._mean if self._early else 1.0
        late = self._mean if not self._hop2 and not self._early else 1.0
        if not self._hop1_travels:
            self._ladder.wait(unit.reducing)  # hop 2 of the last step may still read `grad_sum`
            self._pack(tensors, shards.grad_sum, offsets, early, add=not overwrite)
            return
        buffer, busy = self._staging.next(shards.layout.size, shards.grad_sum.device)
        self._ladder.wait(busy)
        self._pack(tensors, buffer, offsets, early)

        def add(addends: Addends) -> None:
            self._counters.added(shards.grad_sum, addends, overwrite=overwrite)
            add_up(shards.grad_sum, addends, late, overwrite=overwrite)

        what, form = f"hop 1 of {unit.name}", shards.forms.hop1
        transfer = Transfer(Route.HOP1, what, "hop 1", 1, self._sharding.grads, form)
        unit.reducing = self._ladder.reduce_scatter_async(transfer, buffer, add, after=[unit.reducing])
        self._staging.busy_until(unit.reducing)

    def hop2(self, unit: Unit) -> None:
        """From the sum over the ranks that share a copy to the mean over all."""
        unit.gradient = Gradient.FINAL
        if not self._hop2:
            return
        grad_sum = unit.trained.grad_sum
        scope = self._ladder.scope_above(self._sharding.grads)
        # What travels in eight bits from the start is rounded once, from the sum itself.
        if grad_sum.dtype == self._wires.dtype or (unit.trained.forms.hop2 and scope is Scope.INTER):
            unit.reducing = self._to_the_top(unit, grad_sum, unit.reducing)
            return
        wire, busy = self._wires.next(grad_sum.numel(), grad_sum.device)
        job = partial(self._pack, [grad_sum], wire, [0], 1.0)
        packed = self._ladder.submit(Route.HOP2, scope, f"hop 2 of {unit.name}", job, after=[unit.reducing, busy])
        unit.reducing = self._to_the_top(unit, wire, packed)
        self._wires.busy_until(unit.reducing)

    def ask(self) -> tuple[Question, Answers]:
        """Begin to find the parameters that took part on any rank, so that all ranks update the same ones.

        The backward of the last micro-step ends with this, and the answer travels beside hop 2. The order of transfers
        is compared in the same message.
        """
        used = [used for unit in self.units for used in unit.took_part]
        question = self._ladder.order.question()
        answers = self._world.max_async([*question.numbers, *used], "comparing which parameters took part")
        self._asked = question, answers
        return self._asked

    def finish(self) -> list[Unit]:
        """Before clipping or stepping: the units that have a gradient, each the mean over all ranks now."""
        present = [unit for unit in self.units if unit.has_gradient()]
        # A step without a backward is none, and asks: on other ranks there may have been one.
        if self.agreed and (present or not self._stepped):
            return present
        for unit in present:
            unit.trained.check_in_place()
            unit.check_grads_untouched()
            if unit.gradient is Gradient.PARTIAL:
                self.hop2(unit)
        question, answers = self._asked or self.ask()
        largest, length = answers.read(), len(question.numbers)  # the host waits here, until all hosts have asked
        self._ladder.order.check(question, largest[:length])
        used = iter(largest[length:])
        for unit in self.units:
            for index, mine in enumerate(unit.took_part):
                if next(used) and not mine and unit in present:
                    unit.take_part(index)
        for unit in present:
            self._ladder.wait(unit.reducing)
            unit.allow_writes()
        self.agreed, self._asked = True, None
        return present

    def mark_stepped(self) -> bool:
        """An optimizer has used the gradients, so the next backward begins anew; return whether it is the first to."""
        first, self._stepped = not self._stepped, True
        return first

    def unstepped(self) -> list[str]:
        """The units with gradients that no step has used."""
        return [] if self._stepped else [unit.name for unit in self.units if unit.has_gradient()]

    def reset(self) -> None:
        """Drop all gradients."""
        for unit in self.units:
            unit.reset_gradient()

    def _to_the_top(self, unit: Unit, wire: torch.Tensor, ready: Work) -> Work:
        """Reduce-scatter from G to the top, and from there to `grad_mean`; `wire` is the gradient in the dtype that
        travels.
        """
        ladder, shards, what = self._ladder, unit.trained, f"hop 2 of {unit.name}"
        low, high, world = self._sharding.grads, self._sharding.optimizer, self._world.size
        late = 1.0 if self._early else self._mean
        up = Transfer(Route.HOP2, what, "hop 2", low, world, shards.forms.hop2)
        if high == world:
            return ladder.reduce_scatter_async(up, wire, partial(self._write, shards.grad_mean, late), after=[ready])
        begin, end = ladder.range(shards.layout.size, world, within=low)
        mine = wire[begin:end]
        top = ladder.reduce_scatter_async(up, wire, partial(self._write, mine, late), after=[ready])
        begin, end = ladder.range(shards.layout.size, high, within=low)
        mean = wire[begin:end]
        down = Transfer(Route.REFRESH, what, "sync", high, world, shards.forms.hop2)
        coding = Coding(lambda parcel: parcel.fill(mine), _restore)
        work = ladder.all_gather_async(down, mine, mean, after=[top], coding=coding)
        if wire is shards.grad_sum:
            return work
        job = partial(self._write, shards.grad_mean, 1.0, [mean])
        return ladder.submit(Route.REFRESH, ladder.scope_above(high), what, job, after=[work])

    def _write(self, target: torch.Tensor, scale: float, addends: Addends) -> None:
        self._counters.added(target, addends, overwrite=True)
        add_up(target, addends, scale, overwrite=True)

    def _pack(
        self, tensors: Sequence[torch.Tensor], out: torch.Tensor, offsets: list[int], scale: float, *, add: bool = False
    ) -> None:
        elements = sum(tensor.numel() for tensor in tensors)
        written = 2 * elements * out.itemsize if add else out.nbytes
        self._counters.moved("pack", sum(tensor.nbytes for tensor in tensors) + written)
        pack(tensors, out, offsets, scale, add=add)

    def _open(self, unit: Unit, present: Sequence[int]) -> bool:
        """Mark which parameters have a gradient; return whether it is the first since the last step."""
        if self._stepped:
            self._stepped = False
            self.reset()
        if unit.dropped():
            unit.reset_gradient()
        if unit.gradient is Gradient.FINAL:
            raise LifecycleError(
                f"backward: the gradient of {unit.name} was summed over all ranks already, so nothing can be added to "
                "it: step or zero_grad first, and if one micro-batch takes several backwards, loop over the "
                "micro-batches without mics.accumulate"
            )
        first = unit.gradient is Gradient.NONE
        if first:
            unit.allow_writes()
        else:
            unit.check_grads_untouched()
        unit.gradient = Gradient.PARTIAL
        self.agreed, self._asked = False, None
        for index in present:
            if not unit.took_part[index]:
                unit.take_part(index)
        return first


def _restore(mean: torch.Tensor, came: Parcel) -> None:
    add_up(mean, [came], overwrite=True)


class _Ring:
    """Buffers in turn for gradients on their way."""

    def __init__(self, count: int, size: int, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._size = size
        self._buffers: list[torch.Tensor] = []
        self._busy: list[Work] = [DONE] * count
        self._turn = 0

    def next(self, size: int, device: torch.device) -> tuple[torch.Tensor, Work]:
        """A buffer, and the work that reads it until it is over: wait for that before you fill it."""
        if not self._buffers:
            self._buffers = [torch.empty(self._size, dtype=self.dtype, device=device) for _ in self._busy]
        self._turn = (self._turn + 1) % len(self._busy)
        return self._buffers[self._turn][:size], self._busy[self._turn]

    def busy_until(self, work: Work) -> None:
        """The buffer given last is in use until then."""
        self._busy[self._turn] = work
