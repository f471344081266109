"""What becomes of gradients: packed and summed after every backward (hop 1), over all ranks once a step (hop 2).

NONE -> SHARDED      the first backward since the last step overwrites `sharded`, those after it add
SHARDED -> SYNCED    hop 2: `synced` holds the mean over all ranks
any -> NONE          the step has used it, or the user's zero_grad has dropped it
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum

import torch

from mics_core.comm import Answers, World
from mics_core.errors import LifecycleError
from mics_core.ladder import Ladder, Route
from mics_core.lanes import DONE, Ticket
from mics_core.ledger import Tally
from mics_core.sharding import Precision, Sharding
from mics_core.shards import Shards
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
        self._staging = _Staging(largest, staged, ladder.wait)
        self._wire_dtype = precision.reduce
        self._wire = torch.empty(0)
        self._stepped = False
        self.settled = False  # whether all ranks have agreed since the last gradient came
        self._answers: Answers | None = None

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
        buffer = self._staging.next(shards.layout.size, shards.sharded.device)
        self._pack(tensors, buffer, offsets, early)

        def climb() -> None:
            parts = self._ladder.climb(Route.HOP1, "hop 1", buffer, 1, self._degrees.grads)
            self._tally.added(shards.sharded, parts, overwrite=overwrite)
            accumulate(shards.sharded, parts, late, overwrite=overwrite)

        if self._hop1_travels:
            what = f"hop 1 of {reduced.unit}"
            reduced.latest = self._ladder.send(Route.HOP1, what, climb, after=[reduced.latest])
            self._staging.busy_until(reduced.latest)
        else:
            self._ladder.wait(reduced.latest)
            climb()

    def sync(self, reduced: Reduced) -> None:
        """Hop 2: from the sum over the ranks that share a copy to the mean over all."""
        reduced.gradient = Gradient.SYNCED
        if self._hop2:
            what, shards = f"hop 2 of {reduced.unit}", reduced.shards
            reduced.latest = self._ladder.send(
                Route.SLOW, what, lambda: self._climb_to_the_top(shards), after=[reduced.latest]
            )

    def ask(self) -> None:
        """Begin to find the parameters that took part on any rank, so that all ranks update the same ones.

        The backward of the last micro-step ends with this, and the answer travels beside hop 2.
        """
        self._answers = self._world.ask([used for reduced in self.all for used in reduced.used])

    def settle(self) -> list[Reduced]:
        """Before clipping or stepping: the units that have a gradient, each the mean over all ranks now."""
        present = [reduced for reduced in self.all if reduced.gradient is not Gradient.NONE and not reduced.dropped()]
        if self.settled:
            return present
        for reduced in present:
            reduced.shards.check_in_place()
            reduced.check_untouched()
            if reduced.gradient is Gradient.SHARDED:
                self.sync(reduced)
        if self._answers is None:
            self.ask()
        assert self._answers is not None
        used = iter(self._answers.read())
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

    def _climb_to_the_top(self, shards: Shards) -> None:
        ladder, size, world = self._ladder, shards.layout.size, self._ladder.rungs.degrees[-1]
        low, optimizer = self._degrees.grads, self._degrees.optimizer
        late = 1.0 if self._early else self._mean
        wire = self._to_wire(shards.sharded)
        parts = ladder.climb(Route.SLOW, "hop 2", wire, low, world)
        if optimizer == world:
            self._tally.added(shards.synced, parts, overwrite=True)
            accumulate(shards.synced, parts, late, overwrite=True)
            return
        begin, end = ladder.range(size, world, within=low)
        mine = wire[begin:end]
        self._tally.added(mine, parts, overwrite=True)
        accumulate(mine, parts, late, overwrite=True)
        begin, end = ladder.range(size, optimizer, within=low)
        ladder.descend(Route.SLOW, "sync", mine, wire[begin:end], world, optimizer)
        if wire is not shards.sharded:
            self._tally.added(shards.synced, [wire[begin:end]], overwrite=True)
            accumulate(shards.synced, [wire[begin:end]], overwrite=True)

    def _to_wire(self, sharded: torch.Tensor) -> torch.Tensor:
        """The gradient in the dtype that travels: itself, or a copy that lasts until this lane's next job."""
        if sharded.dtype == self._wire_dtype:
            return sharded
        if self._wire.numel() < sharded.numel():
            self._wire = sharded.new_empty(sharded.numel(), dtype=self._wire_dtype)
        wire = self._wire[: sharded.numel()]
        self._pack([sharded], wire, [0], 1.0)
        return wire

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


class _Staging:
    """Two buffers in turn for gradients on their way: one is filled while the other travels."""

    def __init__(self, size: int, dtype: torch.dtype, wait: Callable[[Ticket], None]) -> None:
        self._size = size
        self._dtype = dtype
        self._wait = wait
        self._buffers: list[torch.Tensor] = []
        self._busy: list[Ticket] = [DONE, DONE]
        self._turn = 0

    def next(self, size: int, device: torch.device) -> torch.Tensor:
        """A buffer that nothing travels from any more."""
        if not self._buffers:
            self._buffers = [torch.empty(self._size, dtype=self._dtype, device=device) for _ in range(2)]
        self._turn = 1 - self._turn
        self._wait(self._busy[self._turn])
        return self._buffers[self._turn][:size]

    def busy_until(self, ticket: Ticket) -> None:
        """The buffer given last is in use until then."""
        self._busy[self._turn] = ticket
