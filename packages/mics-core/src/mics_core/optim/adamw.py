"""AdamW on the shards: one launch for a unit, which updates its state, rounds the new weights and starts their refresh.

`torch.optim` optimizers work, too (hooks.py lets them know when); this one reads and writes every byte once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from numbers import Real
from typing import Any

import torch

from mics_core import registry
from mics_core.errors import ConfigError, LifecycleError
from mics_core.optim import stepping
from mics_core.unit.slices import check_decay
from mics_core.unit.unit import Unit
from mics_kernels import Segments, adamw


@dataclass
class _State:
    """The optimizer's state of one unit."""

    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    steps: list[int]  # of each parameter: one that took no part in a step was not updated
    groups: list[dict[str, Any] | None]  # the parameter group that each is in
    runs: dict[object, list[_Run]] = field(default_factory=dict)  # for the present circumstances only
    skipped: torch.Tensor | None = None  # with float16, how many of the steps were skipped; on the device


@dataclass(frozen=True)
class _Run:
    """Neighbouring parameters that one launch updates."""

    members: list[int]
    groups: list[dict[str, Any]]
    span: slice
    segments: Segments | None  # one for each, where they are not all in one group
    tensors: dict[tuple[float, ...], torch.Tensor] = field(default_factory=dict)

    def each(self, name: str) -> float | torch.Tensor:
        """A number of the parameter groups: one for all, or one for each segment."""
        numbers = tuple([group[name] for group in self.groups])
        if self.segments is None or len(set(numbers)) == 1:
            return float(numbers[0])
        if numbers not in self.tensors:
            if len(self.tensors) > 8:
                self.tensors.clear()  # learning rates that differ and change
            device = self.segments.rows.device
            pinned = device.type == "cuda"
            column = torch.tensor(numbers, dtype=torch.float32, device="cpu", pin_memory=pinned)
            self.tensors[numbers] = column.to(device, non_blocking=True)
        return self.tensors[numbers]


class AdamW(torch.optim.Optimizer):
    """`torch.optim.AdamW` for the parameters of a sharded model, with the same arguments and the same results.

    Parameters that had no gradient on any rank since the last step are left alone, as in torch. Do not keep the values
    of `p.grad` beyond a step: the memory is used again.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        for group in self.param_groups:
            if isinstance(group["betas"], list):
                group["betas"] = tuple(group["betas"])
            _check_settings(group)
        check_decay(self)
        owners = registry.owners(parameter for group in self.param_groups for parameter in group["params"])
        if len(owners) != 1:
            raise ConfigError(
                f"AdamW: its parameters belong to {len(owners)} sharded models, expected one: call mics.shard first "
                "and pass model.parameters()"
            )
        self._runtime = owners[0]
        group_of = {id(parameter): group for group in self.param_groups for parameter in group["params"]}
        if not self._runtime.parameter_ids >= group_of.keys():
            raise ConfigError(
                "AdamW: some of its parameters are not those of the sharded model: give them an optimizer of their own"
            )
        self._states: list[tuple[Unit, _State]] = []
        for unit in self._runtime.reducer.units:
            master = unit.trained.master
            groups = [group_of.get(id(parameter)) for parameter in unit.trained.parameters]
            if any(group is not None for group in groups):
                if master.dtype != torch.float32:
                    raise ConfigError(
                        f"AdamW: the master weights of {unit.name} are {master.dtype}, expected float32: use "
                        "torch.optim.AdamW for them"
                    )
                moments = (torch.zeros_like(master), torch.zeros_like(master))
                state = _State(*moments, [0] * len(groups), groups)
                self._states.append((unit, state))
        self._runtime.clipping.leave_to(unit for unit, _ in self._states)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Not after the optimizer was made: its state lies in flat buffers."""
        if hasattr(self, "_states"):
            raise ConfigError("AdamW: add_param_group came after it was made: pass all groups at once")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the weights with the gradients of the backwards since the last step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:  # schedules change them
            _check_settings(group)
        runtime = self._runtime
        present = stepping.begin(runtime, self)
        clip, skip = runtime.clipping.factor, runtime.clipping.overflow
        for unit, state in self._states:
            if unit in present:
                self._update(unit, state, clip, skip)
                runtime.gatherer.refresh(unit)
        stepping.end(runtime, present)
        return loss

    def _update(self, unit: Unit, state: _State, clip: torch.Tensor | None, skip: torch.Tensor | None) -> None:
        shards = unit.trained
        weights = shards.to_round_into
        for run in self._runs(unit, state):
            for member in run.members:
                state.steps[member] += 1
            span = run.span
            step: float | torch.Tensor = state.steps[run.members[0]]
            if skip is not None:
                if state.skipped is None:
                    state.skipped = shards.master.new_zeros(len(state.steps))
                step = step - state.skipped[run.members[0]]
                state.skipped[run.members[0] : run.members[-1] + 1] += skip.sign()
            if span.start == span.stop:
                continue  # nothing of them is here; their steps are counted all the same, so that ranks agree
            adamw(
                shards.master[span],
                state.exp_avg[span],
                state.exp_avg_sq[span],
                shards.grad_mean[span],
                None if weights is None else weights[span],
                lr=run.each("lr"),
                step=step,
                betas=run.groups[0]["betas"],
                eps=run.groups[0]["eps"],
                weight_decay=run.each("weight_decay"),
                segments=run.segments,
                clip=clip,
                skip=skip,
            )
            element = 16 + 12 + (0 if weights is None else weights.itemsize)  # master, moments, gradient; all but it
            self._runtime.counters.moved("adamw", (span.stop - span.start) * element)

    def _runs(self, unit: Unit, state: _State) -> list[_Run]:
        """The launches for this unit: one, unless its parameters differ in step, betas or epsilon."""
        first = state.steps[0]
        settings = tuple([(group["betas"], group["eps"]) for group in self.param_groups])
        circumstances = (_taking_part(unit), tuple([step - first for step in state.steps]), settings)
        if circumstances not in state.runs:
            state.runs = {circumstances: list(_cut(unit, state))}
        return state.runs[circumstances]

    def state_dict(self) -> dict[str, Any]:
        """As torch's, of this rank's slices."""
        for unit, state in self._states:
            skipped = [0.0] * len(state.steps) if state.skipped is None else state.skipped.tolist()
            for index, (begin, end) in enumerate(unit.trained.spans):
                if state.groups[index] is not None and state.steps[index]:
                    self.state[unit.trained.parameters[index]] = {
                        "step": torch.tensor(state.steps[index] - skipped[index], device="cpu"),
                        "exp_avg": state.exp_avg[begin:end],
                        "exp_avg_sq": state.exp_avg_sq[begin:end],
                    }
        return super().state_dict()

    def memory(self) -> dict[int, dict[str, torch.Tensor]]:
        """Where the moments are, by the number that `state_dict` gives a parameter: what is written there and passed to
        `load_state_dict` is not copied.
        """
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        number_of = {id(parameter): number for number, parameter in enumerate(parameters)}
        return {
            number_of[id(parameter)]: {"exp_avg": state.exp_avg[begin:end], "exp_avg_sq": state.exp_avg_sq[begin:end]}
            for unit, state in self._states
            for parameter, (begin, end) in zip(unit.trained.parameters, unit.trained.spans, strict=True)
            if id(parameter) in number_of
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take in what `state_dict` gave on the same rank of the same sharding."""
        super().load_state_dict(state_dict)
        groups = {id(parameter): group for group in self.param_groups for parameter in group["params"]}
        for unit, state in self._states:
            state.groups = [groups.get(id(parameter)) for parameter in unit.trained.parameters]
            state.runs = {}
            state.skipped, state.steps = None, [0] * len(state.steps)
            for index, (begin, end) in enumerate(unit.trained.spans):
                loaded = self.state.get(unit.trained.parameters[index], {})
                state.steps[index] = int(loaded.get("step", 0))
                for key, flat in (("exp_avg", state.exp_avg), ("exp_avg_sq", state.exp_avg_sq)):
                    mine, value = flat[begin:end], loaded.get(key)
                    if value is None:
                        mine.zero_()
                    elif value.data_ptr() != mine.data_ptr():
                        mine.copy_(value)
        self.state.clear()  # they would be kept twice


def _check_settings(group: Mapping[str, Any]) -> None:
    """Raise unless an update with these numbers is one."""
    for name in ("lr", "eps", "weight_decay"):
        number = group[name]
        if isinstance(number, torch.Tensor):
            continue  # the host would wait for it here, and once more where the kernel takes it
        if not (isinstance(number, Real) and 0 <= float(number) < math.inf):
            raise ConfigError(f"AdamW: {name} is {number!r}, expected a finite number from 0 up")
    betas = group["betas"]
    numbers = betas if isinstance(betas, tuple) else ()
    if len(numbers) != 2 or not all(isinstance(beta, Real) and 0 <= float(beta) < 1 for beta in numbers):
        raise ConfigError(f"AdamW: betas are {betas!r}, expected two numbers from 0 to below 1")


def _taking_part(unit: Unit) -> tuple[bool, ...]:
    """Which parameters are to be updated: users may take a gradient away, and may not put another in its place."""
    shards = unit.trained
    for parameter, grad, used in zip(shards.parameters, shards.grads, unit.took_part, strict=True):
        if used and parameter.grad is not grad and parameter.grad is not None:
            raise LifecycleError(
                f"step: a gradient of {unit.name} was replaced by assignment, and mics.AdamW reads the one it was: "
                "change p.grad in place"
            )
    return tuple([used and p.grad is not None for p, used in zip(shards.parameters, unit.took_part, strict=True)])


def _cut(unit: Unit, state: _State) -> Iterator[_Run]:
    """Join neighbours that took part, as far as a launch can take them together."""
    parts, taking_part = unit.trained.spans, _taking_part(unit)

    def circumstances(index: int) -> tuple[object, ...] | None:
        group = state.groups[index]
        if not taking_part[index] or group is None:
            return None
        return state.steps[index], group["betas"], group["eps"]

    for common, neighbours in groupby(range(len(parts)), key=circumstances):
        if common is not None:
            members = list(neighbours)
            begin, end = parts[members[0]][0], parts[members[-1]][1]
            groups = [group for index in members if (group := state.groups[index]) is not None]
            segments = None
            if end > begin and any(group is not groups[0] for group in groups):
                sizes = [parts[index][1] - parts[index][0] for index in members]
                offsets = [parts[index][0] - begin for index in members]
                segments = Segments.build(offsets, sizes, unit.trained.master.device)
            yield _Run(members, groups, slice(begin, end), segments)
