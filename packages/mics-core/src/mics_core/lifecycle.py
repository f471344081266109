"""The conductor: hooks around every unit decide when it is gathered and released, and when its gradient leaves.

    REST -> FORWARD -> REST -> BACKWARD -> REST -> OPEN (in full_params) -> REST

docs/lifecycle.md has the whole table. Two rules explain most of the code. A unit's trained parameters are the outputs
of one autograd node, `Whole`: its backward runs when the gradients of all of them are there, whatever was called how
often, and nothing has to be counted. And that node and its context know the unit but no tensor of this pass, or a pass
would keep itself alive.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from mics_core import trees
from mics_core.autograd import task, whole
from mics_core.errors import LifecycleError
from mics_core.gather import Gathered, Gatherer
from mics_core.micro_batches import Count
from mics_core.order import Order, Use, Way
from mics_core.phases import MicroStep, Phase
from mics_core.reduce import Gradient, Reducer
from mics_core.scaling import Scaling
from mics_core.station import Station


class Conductor:
    """Owns the phase of a model, and what its units do in it."""

    def __init__(
        self,
        stations: Sequence[Station],
        gatherer: Gatherer,
        reducer: Reducer,
        compute: torch.dtype,
        scaling: Scaling | None,
        device: torch.device,
    ) -> None:
        self.stations = stations
        self.gatherer = gatherer
        self.reducer = reducer
        self.phase = Phase.REST
        self.micro_step = MicroStep.UNMARKED
        self.scaling = scaling
        self._compute = compute
        names = [station.gathered.unit for station in stations]
        self._orders = {differentiated: Order(names) for differentiated in (True, False)}
        self._order = self._orders[True]
        self._count: Count | None = None
        self._entered: list[Station] = []  # by forwards, recomputed ones too, from the outside in
        self._open = 0  # forwards under way
        self._passes = 0  # backwards so far
        self._taken: list[tuple[Station, int]] = []  # by this backward and not left yet, with autograd's task
        self._unannounced = False  # whether a backward recomputes units without any of their outputs having told of it
        self._received = False  # whether this backward brought a gradient
        self._finished: list[Station] = []  # those of them whose gradients are there
        # On the device: a backward joins the streams of its leaves at its end, and this is the only leaf.
        self._anchor = torch.empty(0, requires_grad=True, device=device)
        for station in stations:
            station.finish = self._finisher(station)

    def mark(self, micro_step: MicroStep, count: Count | None) -> None:
        """`accumulate` says which micro-step comes, and has asked the other ranks whether theirs is the last, too."""
        self.micro_step = micro_step
        self._count = count
        self._unannounced = False

    def busy(self) -> bool:
        """Whether a forward or backward is under way."""
        if self.phase is Phase.BACKWARD and not self._recomputing():
            self._give_up_backward()  # it raised, or its last callback would have run
        return self.phase is not Phase.REST

    def open(self) -> None:
        """Until `close`, modules own whole parameters, and nothing is gathered for them."""
        for station in self.stations:
            self.gatherer.release(station.gathered)
        self.phase = Phase.OPEN

    def close(self) -> None:
        """Modules own slices again."""
        self.phase = Phase.REST

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Until the end the model's memory is overwritten, perhaps by a thread that nobody waits for any more."""
        self.phase = Phase.LOADING
        try:
            yield
        finally:
            self.phase = Phase.REST

    def bring_what_users_wrote(self) -> None:
        """Parameters may be written between steps, on all ranks alike: by load_state_dict, or to clamp them."""
        for station in self.stations:
            self._bring(station)

    def drop_fetched(self) -> None:
        """Nothing that was gathered ahead will be used."""
        for station in self.stations:
            self.gatherer.release(station.gathered)

    # ---- forward

    def before_forward(self, station: Station, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Gather the unit and put its whole parameters in place; return changed inputs, if they are to change."""
        if self.phase is Phase.OPEN:
            return None  # the modules own whole parameters
        again = self._recomputing()
        self._unannounced |= again and self.phase is Phase.REST
        differentiated = torch.is_grad_enabled()
        if not again:
            self._enter(station, differentiated)
        self._entered.append(station)
        self.gatherer.take(station.gathered)
        if not again:
            self._fetch()
        self.gatherer.arrive(station.gathered)
        if differentiated:
            station.check_frozen()
        for part, places in station.places:
            if part.trained and differentiated:
                places.set(whole(self._anchor, part.views, station.finish))
            else:
                places.set(part.views)
        inputs = None
        if station.number == 0 and self.scaling is not None:
            inputs = args, kwargs = self.scaling.shrink((args, kwargs))
        if station.number == 0 and self._compute != torch.float32:
            inputs = trees.convert((args, kwargs), self._to_compute)
        if station.reduced is None and differentiated and station.places:
            station.watch_inputs(inputs or (args, kwargs))
        return inputs

    def after_forward(self, station: Station, outputs: Any) -> Any:
        """Release the unit, and arrange for its backward to gather it again; return the outputs, if they changed."""
        # A hook of the user's may have raised before ours ran: then there is nothing to leave.
        if self.phase is Phase.OPEN or not self._entered or self._entered[-1] is not station:
            return None
        self._entered.pop()
        again = self._recomputing()
        try:
            return self._watch(station, outputs)
        finally:
            self.gatherer.leave(station.gathered, keep=not again and self._is_next(station))
            if not again:
                self._open -= 1
                if not self._open:
                    self._end_forward(raised=outputs is None and sys.exception() is not None)

    def _watch(self, station: Station, outputs: Any) -> Any:
        begin = self._beginner(station)  # which keeps the views that are in place now
        station.clear()
        changed = None
        if station.number == 0 and self.scaling is not None and outputs is not None:
            outputs = changed = self.scaling.enlarge(outputs)
        raised = outputs is None and sys.exception() is not None
        if torch.is_grad_enabled() and not raised:
            station.watch_outputs(outputs, begin)
        return changed

    def _enter(self, station: Station, differentiated: bool) -> None:
        if not self._open:
            self._begin_forward(differentiated)
        self._open += 1
        self._bring(station)
        if differentiated and station.reduced is not None:
            station.awaited += 1
        if not self._order.reach(Use(station.number, Way.FORWARD)):
            self.drop_fetched()

    def _bring(self, station: Station) -> None:
        written = [part for part, _ in station.places if part.trained and part.written()]
        if written:  # a gather or the optimizer's refresh may still read or write what is rounded into now
            self.gatherer.release(station.gathered)
            station.gathered.refreshed.wait()
            for part in written:
                part.refresh()
            self.gatherer.refresh(station.gathered)

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
            self.drop_fetched()
            self.gatherer.compare_order(wait=not raised)  # no step follows that would

    # ---- backward

    def before_backward(self, station: Station, views: list[Sequence[torch.Tensor]]) -> None:
        """Gather the unit again, for what its backward reads and what a checkpoint in it recomputes."""
        if self.phase is not Phase.BACKWARD:
            if not self._passes:  # a loop sets hooks up before it begins
                for each in self.stations:
                    each.check_hooks()
            self._check_micro_batches()
            self.phase = Phase.BACKWARD
            self._order = self._orders[True]
            torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)
        self._let_finished_leave()
        if not self._order.reach(Use(station.number, Way.BACKWARD)):
            self.drop_fetched()
        self.gatherer.take(station.gathered)
        self._taken.append((station, task()))
        self._fetch()
        self.gatherer.arrive(station.gathered)
        for (_, places), present in zip(station.places, views, strict=True):
            places.set(present)

    def _check_micro_batches(self) -> None:
        """The answers had the whole forward to arrive."""
        if self._count is not None:
            count, self._count = self._count, None
            count.check()

    def _is_last(self) -> bool:
        """Whether no gradients come after those of this backward."""
        # A reentrant checkpoint runs a backward for each part of a model that is not called as a whole: nobody
        # knows how many follow, so gradients wait for the clip or step.
        return self.micro_step is MicroStep.LAST and not self._unannounced

    def _finisher(self, station: Station) -> Callable[..., None]:
        reduced = station.reduced

        def finish(grads: Sequence[torch.Tensor | None]) -> None:
            if not station.gathered.users:
                raise LifecycleError(
                    f"{station.gathered.unit}: its backward ran without beginning at what its forward returned: return "
                    "every tensor that a loss is made of, rather than keeping it in an attribute"
                )
            # A checkpoint inside the unit may run its part of the backward as a task of its own, and others follow.
            if (station, task()) in self._taken:
                station.clear()
                # Gradients of the unit's inputs may still be on their way through its parameters. The next unit's
                # backward begins with them; so the memory stays until then.
                self._finished.append(station)
                station.awaited -= 1
            if reduced is not None:
                if self.scaling is not None:
                    self.scaling.check_entered()
                self._received = True
                self.reducer.take(reduced, grads)
                if self._is_last() and station.awaited == 0:
                    self.reducer.sync(reduced)

        return finish

    def _end_backward(self) -> None:
        self._order.end()
        self._let_finished_leave()
        for station, _ in self._taken:  # reached, but no gradient came for its parameters
            station.clear()
            self.gatherer.leave(station.gathered, keep=False)
        self._taken.clear()
        if self.micro_step is MicroStep.MORE_FOLLOW:
            self._fetch()
        else:
            self.drop_fetched()
        last = self._is_last() and self._received
        for station in self.stations:
            station.awaited = 0
            if last and station.reduced is not None and station.reduced.gradient is Gradient.SHARDED:
                self.reducer.sync(station.reduced)
        if last:
            self.reducer.ask()
        self._received = False
        if self.scaling is not None:
            self.scaling.entered = False
        self._passes += 1
        self.phase = Phase.REST

    def _give_up_backward(self) -> None:
        """A backward raised, and its caller went on: leave what it had taken."""
        self._finished.clear()
        for station, _ in self._taken:
            self.gatherer.leave(station.gathered, keep=False)
        self._taken.clear()
        for station in self.stations:
            station.awaited = 0
            for _, places in station.places:
                places.reset()
        self._received = False
        self._order.restart()
        self._passes += 1
        self.phase = Phase.REST

    def _let_finished_leave(self) -> None:
        for station in self._finished:
            taken = next((entry for entry in self._taken if entry[0] is station), None)
            if taken is not None:
                self._taken.remove(taken)
                keep = self.micro_step is MicroStep.MORE_FOLLOW and self._is_next(station)
                self.gatherer.leave(station.gathered, keep=keep)
        self._finished.clear()

    # ---- what is known in advance

    def _upcoming(self) -> Iterator[Gathered]:
        again = self.micro_step is MicroStep.MORE_FOLLOW
        return (self.stations[use.unit].gathered for use in self._order.upcoming(again=again))

    def _fetch(self) -> None:
        if self.gatherer.travels:
            self.gatherer.fetch(self._upcoming())

    def _is_next(self, station: Station) -> bool:
        """Whether this unit is the next one to be used, apart from those in use now."""
        for gathered in self._upcoming():
            if gathered is station.gathered:
                return True
            if not gathered.users:
                return False
        return False

    def _beginner(self, station: Station) -> Callable[[torch.Tensor], None]:
        """The hook of a forward's outputs: the first of them in a backward gathers the unit."""
        whole = [places.whole for _, places in station.places]
        seen = -1  # the number of the last backward that came by; one graph may be used by several

        def hook(_: torch.Tensor) -> None:
            nonlocal seen
            if seen != self._passes:
                seen = self._passes
                self.before_backward(station, whole)

        return hook
