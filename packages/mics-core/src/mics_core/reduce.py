"""What becomes of gradients: packed and summed after every backward (hop 1), over all ranks once a step (hop 2).

NONE -> SHARDED      the first backward since the last step overwrites `sharded`, those after it add
SHARDED -> SYNCED    hop 2: `synced` holds the mean over all ranks
any -> NONE          the step has used it, or the user's zero_grad has dropped it
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from functools import partial

import torch

from mics_core.comm import Answers, World
from mics_core.errors import LifecycleError
from mics_core.ladder import Ladder, Route, Way
from mics_core.lanes import DONE, Ticket
from mics_core.ledger import Tally
from mics_core.sharding import Precision, Sharding
from mics_core.shards import Shards
from mics_core.transfer_order import Asked
from mics_kernels import accumulate, pack


class Gradient(Enum):
    """How far a unit's gradient has come."""

    NONE = "none"
    SHARDED = "sharded"
    SYNCED = "synced"


class Reduced:
    """The gradient of a unit's trained parameters."""

    def __init__(self, unit: str, shards: Shards) -> None:
        self.unit = unit
        self.shards = shards
        self.offsets = [slot.begin for slot in shards.layout.slots]
        self.gradient = Gradient.NONE
        self.used = [False] * len(self.offsets)  # which parameters took part since the last step
        self.latest: Ticket = DONE  # the last work on `sharded`
        self._version = shards.gradient_version

    def dropped(self) -> bool:
        """Whether the user's zero_grad has thrown the gradient away."""
        return self.gradient is not Gradient.NONE and all(
            parameter.grad is None for parameter, used in zip(self.shards.parameters, self.used, strict=True) if used
        )

    def check_untouched(self) -> None:
        """Raise if someone wrote into `p.grad` before it was the sum over all ranks."""
        version = self.shards.gradient_version
        if version != self._version:
            self._version = version
            raise LifecycleError(
                f"the gradient of {self.unit} was changed before it was summed over all ranks, so the change would be "
                "lost in part: drop gradients with zero_grad(set_to_none=True), and change them after "
                "mics.clip_grad_norm_"
            )

    def touchable(self) -> None:
        """From now on `p.grad` is the user's."""
        self._version = self.shards.gradient_version

    def use(self, index: int) -> None:
        """This parameter takes part in the next step."""
        self.used[index] = True
        self.shards.parameters[index].grad = self.shards.grads[index]

    def hide(self) -> None:
        """Let an optimizer find no gradient."""
        for parameter in self.shards.parameters:
            parameter.grad = None

    def forget(self) -> None:
        """Nothing has come since the last step."""
        self.hide()
        self.used = [False] * len(self.used)
        self.gradient = Gradient.NONE


class Reducer:
    """Takes in gradients as backwards produce them, and makes their mean over all ranks."""

    def __init__(
        self,
        everything: Sequence[Reduced],
        world: World,
        ladder: Ladder,
        sharding: Sharding,
        precision: Precision,
        tally: Tally,
    ) -> None:
        self.all = everything
        self._world = world
        self._ladder = ladder
        self._degrees = sharding
        self._tally = tally
        self._mean = 1 / world.size
        # float16 overflows in a sum over many ranks, so there the division comes before; else it comes last, once.
        self._early = precision.reduce == torch.float16
        self._hop2 = sharding.grads < world.size
        self._hop1_travels = sharding.grads > 1
        # What does not travel in hop 1 is not rounded for it.
        staged = precision.reduce if self._hop1_travels else precision.compute
        largest = max((reduced.shards.layout.size for reduced in everything), default=0)
        self._staging = _Ring(2, largest, staged)  # one is filled while the other travels
        # As many as stages, so that each stage has one at work.
        stages = len(ladder.rungs.stages(sharding.grads, world.size))
        self._wires = _Ring(stages, largest // sharding.grads, precision.reduce)
        self._stepped = False
        self.settled = False  # whether all ranks have agreed since the last gradient came
        self._answers: Answers | None = None
        self._asked: Asked | None = None  # of the order of transfers, in the same question

    def take(self, reduced: Reduced, grads: Sequence[torch.Tensor | None]) -> None:
        """Hop 1: add a backward's gradients to `sharded`, summed over the ranks that share a copy of it."""
        shards = reduced.shards
        present = [
            index
            for index, (grad, parameter) in enumerate(zip(grads, shards.parameters, strict=True))
            if grad is not None and parameter.requires_grad  # it may have been frozen since
        ]
        if not present:
            return
        overwrite = self._open(reduced, present)
        tensors = [grad for index in present if (grad := grads[index]) is not None]
        offsets = [reduced.offsets[index] for index in present]
        early = self._mean if self._early else 1.0
        late = self._mean if not self._hop2 and not self._early else 1.0
        if overwrite and not self._hop1_travels:
            self._ladder.wait(reduced.latest)
            self._pack(tensors, shards.sharded, offsets, early)
            return
        buffer, free = self._staging.next(shards.layout.size, shards.sharded.device)
        self._ladder.wait(free)
        self._pack(tensors, buffer, offsets, early)

        def add(parts: list[torch.Tensor]) -> None:
            self._tally.added(shards.sharded, parts, overwrite=overwrite)
            accumulate(shards.sharded, parts, late, overwrite=overwrite)

        if self._hop1_travels:
            way = Way(Route.HOP1, f"hop 1 of {reduced.unit}", "hop 1", 1, self._degrees.grads)
            reduced.latest = self._ladder.send_up(way, buffer, add, after=[reduced.latest])
            self._staging.busy_until(reduced.latest)
        else:
            self._ladder.wait(reduced.latest)
            add([buffer])

    def sync(self, reduced: Reduced) -> None:
        """Hop 2: from the sum over the ranks that share a copy to the mean over all."""
        reduced.gradient = Gradient.SYNCED
        if not self._hop2:
            return
        sharded = reduced.shards.sharded
        if sharded.dtype == self._wires.dtype:
            reduced.latest = self._to_the_top(reduced, sharded, reduced.latest)
            return
        wire, free = self._wires.next(sharded.numel(), sharded.device)
        link = self._ladder.link_above(self._degrees.grads)
        job = partial(self._pack, [sharded], wire, [0], 1.0)
        packed = self._ladder.send(Route.RISE, link, f"hop 2 of {reduced.unit}", job, after=[reduced.latest, free])
        reduced.latest = self._to_the_top(reduced, wire, packed)
        self._wires.busy_until(reduced.latest)

    def ask(self) -> None:
        """Begin to find the parameters that took part on any rank, so that all ranks update the same ones.

        The backward of the last micro-step ends with this, and the answer travels beside hop 2. The order of transfers
        is compared in the same message.
        """
        used = [used for reduced in self.all for used in reduced.used]
        self._asked = self._ladder.order.ask()
        self._answers = self._world.ask([*self._asked.numbers, *used], "comparing which parameters took part")

    def settle(self) -> list[Reduced]:
        """Before clipping or stepping: the units that have a gradient, each the mean over all ranks now."""
        present = [reduced for reduced in self.all if reduced.gradient is not Gradient.NONE and not reduced.dropped()]
        # A step without a backward is none, and asks: on other ranks there may have been one.
        if self.settled and (present or not self._stepped):
            return present
        for reduced in present:
            reduced.shards.check_in_place()
            reduced.check_untouched()
            if reduced.gradient is Gradient.SHARDED:
                self.sync(reduced)
        if self._answers is None:
            self.ask()
        assert self._answers is not None
        assert self._asked is not None
        answers, length = self._answers.read(), len(self._asked.numbers)
        used = iter(answers[length:])
        self._ladder.order.check(self._asked, answers[:length])
        for reduced in self.all:
            mine = [bool(next(used)) for _ in reduced.used]
            if reduced in present:
                for index, wanted in enumerate(mine):
                    if wanted and not reduced.used[index]:
                        reduced.use(index)
        for reduced in present:
            self._ladder.wait(reduced.latest)
            reduced.touchable()
        self.settled, self._answers = True, None
        return present

    def stepped(self) -> bool:
        """An optimizer has used the gradients: the next backward begins anew. False if another one had, too."""
        first, self._stepped = not self._stepped, True
        return first

    def unstepped(self) -> list[str]:
        """The units with gradients that no step has used."""
        if self._stepped:
            return []
        return [reduced.unit for reduced in self.all if reduced.gradient is not Gradient.NONE and not reduced.dropped()]

    def _to_the_top(self, reduced: Reduced, wire: torch.Tensor, ready: Ticket) -> Ticket:
        """Climb from G to the top, and from there to `synced`; `wire` is the gradient in the dtype that travels."""
        ladder, shards, what = self._ladder, reduced.shards, f"hop 2 of {reduced.unit}"
        low, high, world = self._degrees.grads, self._degrees.optimizer, self._world.size
        late = 1.0 if self._early else self._mean
        up = Way(Route.RISE, what, "hop 2", low, world)
        if high == world:
            return ladder.send_up(up, wire, partial(self._write, shards.synced, late), after=[ready])
        begin, end = ladder.range(shards.layout.size, world, within=low)
        mine = wire[begin:end]
        top = ladder.send_up(up, wire, partial(self._write, mine, late), after=[ready])
        begin, end = ladder.range(shards.layout.size, high, within=low)
        synced = wire[begin:end]
        ticket = ladder.send_down(Way(Route.FALL, what, "sync", high, world), mine, synced, after=[top])
        if wire is shards.sharded:
            return ticket
        job = partial(self._write, shards.synced, 1.0, [synced])
        return ladder.send(Route.FALL, ladder.link_above(high), what, job, after=[ticket])

    def _write(self, target: torch.Tensor, scale: float, parts: Sequence[torch.Tensor]) -> None:
        self._tally.added(target, parts, overwrite=True)
        accumulate(target, parts, scale, overwrite=True)

    def _pack(self, tensors: Sequence[torch.Tensor], out: torch.Tensor, offsets: list[int], scale: float) -> None:
        self._tally.moved("pack", sum(tensor.nbytes for tensor in tensors) + out.nbytes)
        pack(tensors, out, offsets, scale)

    def _open(self, reduced: Reduced, present: Sequence[int]) -> bool:
        """Mark which parameters have a gradient; return whether it is the first since the last step."""
        if self._stepped:
            self._stepped = False
            for other in self.all:
                other.forget()
        if reduced.dropped():
            reduced.forget()
        if reduced.gradient is Gradient.SYNCED:
            raise LifecycleError(
                f"backward: the gradient of {reduced.unit} was summed over all ranks already, so nothing can be added "
                "to it: step or zero_grad first, and if one micro-batch takes several backwards, loop over the "
                "micro-batches without mics.accumulate"
            )
        first = reduced.gradient is Gradient.NONE
        if first:
            reduced.touchable()
        else:
            reduced.check_untouched()
        reduced.gradient = Gradient.SHARDED
        self.settled, self._answers = False, None
        for index in present:
            if not reduced.used[index]:
                reduced.use(index)
        return first


class _Ring:
    """Buffers in turn for gradients on their way."""

    def __init__(self, count: int, size: int, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._size = size
        self._buffers: list[torch.Tensor] = []
        self._busy: list[Ticket] = [DONE] * count
        self._turn = 0

    def next(self, size: int, device: torch.device) -> tuple[torch.Tensor, Ticket]:
        """A buffer, and until when something travels from it."""
        if not self._buffers:
            self._buffers = [torch.empty(self._size, dtype=self.dtype, device=device) for _ in self._busy]
        self._turn = (self._turn + 1) % len(self._busy)
        return self._buffers[self._turn][:size], self._busy[self._turn]

    def busy_until(self, ticket: Ticket) -> None:
        """The buffer given last is in use until then."""
        self._busy[self._turn] = ticket
