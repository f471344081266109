"""A unit of a sharded model on one rank: its memory, whether it is whole, how far its gradient is, what modules see."""

from __future__ import annotations

from enum import Enum
from typing import Any

from mics_core.comm.lanes import DONE, Work
from mics_core.errors import LifecycleError
from mics_core.spec.units import UnitSpec
from mics_core.unit.shards import Shards
from mics_core.unit.slices import check_hooks
from mics_core.unit.views import ParamViews


class ShardedState(Enum):
    """Whether a unit is gathered. gather.py owns the transitions."""

    SHARDED = "sharded"
    UNSHARDING = "unsharding"
    UNSHARDED = "unsharded"


class Gradient(Enum):
    """How far a unit's gradient has come. reduce.py owns the transitions."""

    NONE = "none"
    PARTIAL = "partial"
    FINAL = "final"


class Unit:
    """Parameters that travel together, and all that is known of them."""

    def __init__(self, number: int, spec: UnitSpec, trained: Shards, frozen: Shards) -> None:
        self.number = number
        self.name = str(spec)
        self.module = spec.module
        self.trained = trained
        self.parts = [part for part in (trained, frozen) if part.parameters]
        self.views = ParamViews(self.parts)
        self.nbytes = sum(part.nbytes for part in self.parts)
        self.stays_whole = all(part.stays_whole for part in self.parts)  # with P = 1 whole units stay in memory
        self.left_behind: list[tuple[dict[str, Any], str]] | None = (
            None  # attributes that hold outputs; None: not looked yet
        )

        self.state = ShardedState.UNSHARDED if self.stays_whole else ShardedState.SHARDED
        self.uses = 0  # forwards and backwards that are using it now
        self.unsharding: Work = DONE  # the last gather; where a whole unit rests, the last refresh
        self.refreshing: Work = DONE  # until then `shard` holds old weights
        self.lost = False  # it did not arrive: an error is on its way up, and a late message may still write here

        self.gradient = Gradient.NONE
        self.took_part = [False] * len(trained.parameters)  # which parameters took part since the last step
        self.reducing: Work = DONE  # the last work on `sharded`
        self.awaited = 0  # backwards that the forwards of this pass have announced
        self._grads_version = trained.gradient_version

    @property
    def is_root(self) -> bool:
        """Whether it has what no other unit has, and its module is the model."""
        return self.number == 0

    @property
    def trains(self) -> bool:
        """Whether it has parameters that are trained."""
        return bool(self.took_part)

    def show_slices(self) -> None:
        """Let modules see what they saw before, and raise if someone wrote into the whole parameters."""
        self.views.restore()
        for part in self.parts:
            part.check_unchanged(self.name)

    # ---- the gradient, as an optimizer finds it

    def dropped(self) -> bool:
        """Whether the user's zero_grad has thrown the gradient away."""
        return self.gradient is not Gradient.NONE and all(
            parameter.grad is None
            for parameter, used in zip(self.trained.parameters, self.took_part, strict=True)
            if used
        )

    def has_gradient(self) -> bool:
        """Whether there is one for the next step."""
        return self.gradient is not Gradient.NONE and not self.dropped()

    def take_part(self, index: int) -> None:
        """This parameter takes part in the next step."""
        self.took_part[index] = True
        self.trained.parameters[index].grad = self.trained.grads[index]

    def hide_grads(self) -> None:
        """Let an optimizer find no gradient."""
        for parameter in self.trained.parameters:
            parameter.grad = None

    def reset_gradient(self) -> None:
        """No backward has come since the last step."""
        self.hide_grads()
        self.took_part = [False] * len(self.took_part)
        self.gradient = Gradient.NONE

    def allow_writes(self) -> None:
        """From now on `p.grad` is the user's."""
        self._grads_version = self.trained.gradient_version

    def check_grads_untouched(self) -> None:
        """Raise if someone wrote into `p.grad` before it was the sum over all ranks."""
        version, self._grads_version = self._grads_version, self.trained.gradient_version
        if version != self._grads_version:
            raise LifecycleError(
                f"the gradient of {self.name} was changed before it was summed over all ranks, so the change would be "
                "lost in part: drop gradients with zero_grad(set_to_none=True), and change them after "
                "mics.clip_grad_norm_"
            )

    # ---- what users may not have done

    def check_frozen(self) -> None:
        """Raise if a parameter that was frozen when the model was cut is to be trained now."""
        for part in self.parts:
            if not part.is_trained and any(parameter.requires_grad for parameter in part.parameters):
                raise LifecycleError(
                    f"{self.name}: a parameter that was frozen at mics.shard requires a gradient now, and has no "
                    "memory for one: let it require gradients before mics.shard, and freeze it after"
                )

    def check_hooks(self) -> None:
        """Raise if a user waits for the gradient of a slice: none comes there."""
        for slot, parameter in zip(self.trained.layout.slots, self.trained.parameters, strict=True):
            check_hooks(slot.name, parameter)
