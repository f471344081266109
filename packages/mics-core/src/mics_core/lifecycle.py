"""Hooks around every unit decide when it is whole, and when its gradient leaves.

    REST -> FORWARD    the first unit of a pass is called        FORWARD -> REST     the outermost unit returns
    REST -> BACKWARD   the first hook on a unit's output runs    BACKWARD -> REST    autograd's engine is done
    REST -> OPEN       full_params: modules own whole weights    REST -> LOADING     load writes to the model's memory

docs/lifecycle.md shows what each unit does in a step. Two rules explain most of the code. A unit's trained parameters
are the outputs of one autograd node, `_Whole`: its backward runs when the gradients of all of them are there, however
often the unit was called, so gradients of single parameters are not counted. And that node and its context know the
unit but no tensor of this pass, or a pass would keep itself alive.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from functools import partial
from typing import Any

import torch

from mics_core import trees
from mics_core.errors import LifecycleError
from mics_core.step.loss_scaling import LossScaling
from mics_core.step.micro_batches import Count, MicroStep
from mics_core.unit.autograd import task, whole
from mics_core.unit.gather import Gatherer
from mics_core.unit.order import Direction, Order, Use
from mics_core.unit.reduce import Reducer
from mics_core.unit.unit import Gradient, Unit
from mics_core.unit.watch import watch_inputs, watch_outputs


class Phase(Enum):
    """What the model is doing."""

    REST = "rest"
    FORWARD = "forward"
    BACKWARD = "backward"
    OPEN = "full_params"
    LOADING = "load"


class Lifecycle:
    """Owns the phase of a model, and what its units do in it."""

    def __init__(
        self,
        units: Sequence[Unit],
        gatherer: Gatherer,
        reducer: Reducer,
        compute: torch.dtype,
        scaling: LossScaling | None,
        device: torch.device,
    ) -> None:
        self.units = units
        self.phase = Phase.REST
        self.micro_step = MicroStep.UNMARKED
        self._gatherer = gatherer
        self._reducer = reducer
        self._scaling = scaling
        self._compute = compute
        names = [unit.name for unit in units]
        self._orders = {differentiated: Order(names) for differentiated in (True, False)}
        self._order = self._orders[True]
        self._count: Count | None = None
        self._entered: list[Unit] = []  # by forwards, recomputed ones too, from the outside in
        self._depth = 0  # forwards under way
        self._passes = 0  # backwards so far
        self._taken: list[tuple[Unit, int]] = []  # by this backward and not left yet, with autograd's task
        self._to_reshard: list[Unit] = []  # units of `_taken` whose gradients have arrived
        self._reentrant = False  # whether a unit was recomputed before its output's hook ran (reentrant checkpoint)
        self._received = False  # whether this backward brought a gradient
        # On the device: a backward joins the streams of its leaves at its end, and this is the only leaf.
        self._anchor = torch.empty(0, requires_grad=True, device=device)

    def mark(self, micro_step: MicroStep, count: Count | None) -> None:
        """`accumulate` says which micro-step comes, and has asked the other ranks whether theirs is the last, too."""
        self.micro_step = micro_step
        self._count = count
        self._reentrant = False

    def require_rest(self, caller: str) -> None:
        """Raise if a forward or backward is under way; one that has raised, and whose caller went on, is over."""
        if self.phase is Phase.BACKWARD and not self._recomputing():
            self._give_up_backward()  # it raised, or its last callback would have run
        if self.phase is not Phase.REST:
            raise LifecycleError(
                f"{caller}: called inside the model's {self.phase.value}, expected after it: gradients and parameters "
                "are still in use"
            )

    @contextmanager
    def within(self, phase: Phase) -> Iterator[None]:
        """Be in a phase for the block. OPEN: modules own whole parameters, and nothing is gathered for them. LOADING:
        the model's memory is overwritten, perhaps by a thread that nobody waits for any more.
        """
        self.phase = phase
        try:
            yield
        finally:
            self.phase = Phase.REST

    def free(self) -> None:
        """Nothing that was gathered ahead will be used."""
        for unit in self.units:
            self._gatherer.free(unit)

    def bring_what_users_wrote(self) -> None:
        """Parameters may be written between steps, on all ranks alike: by load_state_dict, or to clamp them."""
        for unit in self.units:
            self._bring(unit)

    # ---- forward

    def before_forward(self, unit: Unit, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Gather the unit and let its modules see whole parameters; return changed inputs, if they are to change."""
        if self.phase is Phase.OPEN:
            return None  # the modules own whole parameters
        again = self._recomputing()
        self._reentrant |= again and self.phase is Phase.REST
        differentiated = torch.is_grad_enabled()
        if not again:
            self._enter(unit, differentiated)
        self._entered.append(unit)
        self._gatherer.unshard(unit)
        if not again:
            self._prefetch()
        self._gatherer.wait_unshard(unit)
        if differentiated:
            unit.check_frozen()
        views: list[torch.Tensor] = []
        for part in unit.parts:
            watched = part.is_trained and differentiated
            views += whole(self._anchor, part.views, partial(self._gradients_came, unit)) if watched else part.views
        unit.views.show(views)
        inputs = None
        if unit.is_root and self._scaling is not None:
            inputs = args, kwargs = self._scaling.shrink((args, kwargs))
        if unit.is_root and self._compute != torch.float32:
            inputs = trees.convert((args, kwargs), self._to_compute)
        if differentiated and unit.parts and not unit.trains:
            watch_inputs(inputs or (args, kwargs), partial(self._gradients_came, unit, ()))
        return inputs

    def after_forward(self, unit: Unit, outputs: Any) -> Any:
        """Reshard the unit, and arrange for its backward to gather it again; return the outputs, if they changed."""
        # A hook of the user's may have raised before ours ran: then there is nothing to leave.
        if self.phase is Phase.OPEN or not self._entered or self._entered[-1] is not unit:
            return None
        self._entered.pop()
        again = self._recomputing()
        try:
            return self._watch(unit, outputs)
        finally:
            self._gatherer.reshard(unit, keep=not again and self._is_next(unit))
            if not again:
                self._depth -= 1
                if not self._depth:
                    self._end_forward(raised=outputs is None and sys.exception() is not None)

    def _watch(self, unit: Unit, outputs: Any) -> Any:
        begin = self._begin_hook(unit)  # which keeps the views that are in place now
        unit.show_slices()
        changed = None
        if unit.is_root and self._scaling is not None and outputs is not None:
            outputs = changed = self._scaling.enlarge(outputs)
        raised = outputs is None and sys.exception() is not None
        if torch.is_grad_enabled() and not raised:
            watch_outputs(unit, outputs, begin)
        return changed

    def _enter(self, unit: Unit, differentiated: bool) -> None:
        if not self._depth:
            self._begin_forward(differentiated)
        self._depth += 1
        self._bring(unit)
        if differentiated and unit.trains:
            unit.awaited += 1
        if not self._order.reach(Use(unit.number, Direction.FORWARD)):
            self.free()

    def _bring(self, unit: Unit) -> None:
        if unit.trained.written:
            self._gatherer.free(unit)
            unit.refreshing.wait()  # a gather or the last refresh may still read or write what is rounded into now
            unit.trained.round_master()
            self._gatherer.refresh(unit, exact=True)

    def _to_compute(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._compute) if tensor.is_floating_point() else tensor

    def _recomputing(self) -> bool:
        """Whether a forward runs inside a backward, as under a checkpoint."""
        return task() != -1

    def _begin_forward(self, differentiated: bool) -> None:
        if self.phase is Phase.LOADING:
            raise LifecycleError(
                "forward: a load of this model has failed because a disk hangs, and would still write to its memory if "
                "the disk went on: end this process, and load in a new one"
            )
        if self.phase is Phase.BACKWARD:
            self._give_up_backward()
        self.phase = Phase.FORWARD
        self._order = self._orders[differentiated]

    def _end_forward(self, *, raised: bool) -> None:
        self.phase = Phase.REST
        if self._order is self._orders[False]:
            self._order.end()
            self.free()
            self._gatherer.compare_order(wait=not raised)  # no step follows that would

    # ---- backward

    def before_backward(self, unit: Unit, views: Sequence[torch.Tensor]) -> None:
        """Gather the unit again, for what its backward reads and what a checkpoint in it recomputes."""
        if self.phase is not Phase.BACKWARD:
            self._begin_backward()
        self._reshard_finished()
        if not self._order.reach(Use(unit.number, Direction.BACKWARD)):
            self.free()
        self._gatherer.unshard(unit)
        self._taken.append((unit, task()))
        self._prefetch()
        self._gatherer.wait_unshard(unit)
        unit.views.show(views)

    def _begin_backward(self) -> None:
        if not self._passes:  # a loop sets hooks up before it begins
            for unit in self.units:
                unit.check_hooks()
        if self._count is not None:
            count, self._count = self._count, None
            count.check()  # the host waits for all hosts here; the answers had the whole forward to arrive
        self.phase = Phase.BACKWARD
        self._order = self._orders[True]
        torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)

    def _is_last(self) -> bool:
        """Whether no gradients come after those of this backward."""
        # A reentrant checkpoint runs a backward for each part of a model that is not called as a whole: nobody
        # knows how many follow, so gradients wait for the clip or step.
        return self.micro_step is MicroStep.LAST and not self._reentrant

    def _gradients_came(self, unit: Unit, grads: Sequence[torch.Tensor | None]) -> None:
        """The gradients of a unit's parameters are there, or of its inputs, where none is trained."""
        if not unit.uses:
            raise LifecycleError(
                f"{unit.name}: its backward ran without beginning at what its forward returned: return every tensor "
                "that a loss is made of, rather than keeping it in an attribute"
            )
        # A checkpoint inside the unit may run its part of the backward as a task of its own, and others follow.
        if (unit, task()) in self._taken:
            unit.show_slices()
            # Gradients of the unit's inputs may still be on their way through its parameters. The next unit's
            # backward begins with them; so the memory stays until then.
            self._to_reshard.append(unit)
            unit.awaited -= 1
        if unit.trains:
            if self._scaling is not None:
                self._scaling.check_entered()
            self._received = True
            self._reducer.hop1(unit, grads)
            if self._is_last() and unit.awaited == 0:
                self._reducer.hop2(unit)

    def _end_backward(self) -> None:
        self._order.end()
        self._reshard_finished()
        for unit, _ in self._taken:  # reached, but no gradient came for its parameters
            unit.show_slices()
            self._gatherer.reshard(unit, keep=False)
        self._taken.clear()  # at once: what follows may raise, and then no unit is to be left twice
        if self.micro_step is MicroStep.MORE_FOLLOW:
            self._prefetch()
        else:
            self.free()
        last = self._is_last() and self._received
        for unit in self._reducer.units if last else ():
            if unit.gradient is Gradient.PARTIAL:
                self._reducer.hop2(unit)
        if last:
            self._reducer.ask()
        self._rest_after_backward()

    def _give_up_backward(self) -> None:
        """A backward raised, and its caller went on: leave what it had taken."""
        for unit, _ in self._taken:
            self._gatherer.reshard(unit, keep=False)
        for unit in self.units:
            unit.views.reset()
        self._order.restart()
        self._rest_after_backward()

    def _rest_after_backward(self) -> None:
        self._taken.clear()
        self._to_reshard.clear()
        for unit in self.units:
            unit.awaited = 0
        self._received = False
        if self._scaling is not None:
            self._scaling.entered = False
        self._passes += 1
        self.phase = Phase.REST

    def _reshard_finished(self) -> None:
        for unit in self._to_reshard:
            taken = next((entry for entry in self._taken if entry[0] is unit), None)
            if taken is not None:
                self._taken.remove(taken)
                keep = self.micro_step is MicroStep.MORE_FOLLOW and self._is_next(unit)
                self._gatherer.reshard(unit, keep=keep)
        self._to_reshard.clear()

    def _begin_hook(self, unit: Unit) -> Callable[[torch.Tensor], None]:
        """The hook of a forward's outputs: the first of them in a backward gathers the unit."""
        views = unit.views.shown
        seen = -1  # the number of the last backward that came by; one graph may be used by several

        def hook(_: torch.Tensor) -> None:
            nonlocal seen
            if seen != self._passes:
                seen = self._passes
                self.before_backward(unit, views)

        return hook

    # ---- what is known in advance

    def _upcoming(self) -> Iterator[Unit]:
        again = self.micro_step is MicroStep.MORE_FOLLOW
        return (self.units[use.unit] for use in self._order.upcoming(again=again))

    def _prefetch(self) -> None:
        if self._gatherer.travels:
            self._gatherer.prefetch(self._upcoming())

    def _is_next(self, unit: Unit) -> bool:
        """Whether this unit is the next one to be used, apart from those in use now."""
        for each in self._upcoming():
            if each is unit:
                return True
            if not each.uses:
                return False
        return False
