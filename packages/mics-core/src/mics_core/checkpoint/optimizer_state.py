"""An optimizer's state by the names of the parameters, whatever the optimizer, through its own state dict.

    optimizer.state.NAME.exp_avg     of the parameter's shape, cut as the parameter is
    optimizer.state.NAME.step        one number for the whole parameter, a tensor or Python's
    optimizer.param_groups           a list of settings, each with the names of its parameters

These are the names that torch's own checkpoints of optimizers have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.optim import Optimizer

from mics_core.checkpoint.contents import Cut, Name
from mics_core.checkpoint.plain import digest
from mics_core.errors import ConfigError
from mics_core.optim.adamw import AdamW
from mics_core.registry import Runtime

GROUPS = Name(("optimizer", "param_groups"))
_STATE = "optimizer.state."


@dataclass(frozen=True)
class Saved:
    """An optimizer's state, sorted by how it lies on the ranks."""

    cuts: tuple[Cut, ...]
    wholes: dict[Name, torch.Tensor]
    numbers: frozenset[str]
    """The keys under which Python's numbers are, among the wholes."""
    groups: list[dict[str, Any]]


def names(runtime: Runtime, optimizer: Optimizer) -> list[str]:
    """The names of the optimizer's parameters, in its own order."""
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(f"the optimizer is {optimizer!r}, expected a torch optimizer, or None")
    known = {
        id(parameter): slot.name
        for unit in runtime.units
        for shards in unit.parts
        for slot, parameter in zip(shards.layout.slots, shards.parameters, strict=True)
    }
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if any(id(parameter) not in known for parameter in parameters):
        raise ConfigError(
            f"the {type(optimizer).__name__} holds parameters that are not this model's: make it of the sharded "
            "model's parameters alone, and keep what else there is by names of your own"
        )
    return [known[id(parameter)] for parameter in parameters]


def collect(runtime: Runtime, optimizer: Optimizer, weights: Mapping[str, Cut]) -> Saved:
    """The state, without a copy of it."""
    called = names(runtime, optimizer)
    packed = optimizer.state_dict()
    cuts: list[Cut] = []
    wholes: dict[Name, torch.Tensor] = {}
    numbers = set()
    for number, name in enumerate(called):
        weight = weights[name]
        for key, value in packed["state"].get(number, {}).items():
            full = state_name(name, key)
            if isinstance(value, torch.Tensor) and value.dim() == 0:
                wholes[full] = value
            elif isinstance(value, (bool, int, float)):
                wholes[full] = torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
                numbers.add(key)
            elif isinstance(value, torch.Tensor) and value.shape == weight.local.shape:
                cuts.append(replace(weight, name=full, local=value))
            else:
                got = tuple(value.shape) if isinstance(value, torch.Tensor) else repr(value)
                raise ConfigError(
                    f"save: the {type(optimizer).__name__} has the state {key} of {name}, {got}, expected a tensor of "
                    f"{tuple(weight.local.shape)} or (): use an optimizer that works element by element"
                )
    groups = [
        {**_settings(group), "params": [called[number] for number in group["params"]]}
        for group in packed["param_groups"]
    ]
    return Saved(tuple(cuts), wholes, frozenset(numbers), groups)


def state_name(parameter: str, key: str) -> Name:
    """What a parameter's state is called."""
    return Name(("optimizer", "state", parameter, key))


def digests(optimizer: Optimizer) -> dict[str, str]:
    """By which ranks find out whether their groups have the same settings."""
    return {
        f"{key} of the optimizer's group {number}": digest(value)
        for number, group in enumerate(optimizer.param_groups)
        for key, value in _settings(group).items()
    }


def check_passed(caller: str, passed: Sequence[bool], ranks: Sequence[int]) -> None:
    """Raise, on all ranks alike, unless all passed an optimizer or none did."""
    having = [rank for rank, one in zip(ranks, passed, strict=True) if one]
    if having and not all(passed):
        raise ConfigError(
            f"{caller}: ranks {having} passed an optimizer and the others none, expected one from all or from none: "
            "pass each rank's own"
        )


def check(runtime: Runtime, optimizer: Optimizer, kind: str | None, groups: list[dict[str, Any]]) -> None:
    """Raise unless the state of an optimizer of this kind, with these groups, can be given to this one."""
    mine = type(optimizer).__name__
    if kind is None:
        raise ConfigError(f"load: the checkpoint holds no optimizer, got a {mine}: pass None, or another checkpoint")
    if kind != mine:
        raise ConfigError(f"load: the checkpoint's optimizer is {kind}, got {mine}: make the same one")
    saved = {name for group in groups for name in group["params"]}
    called = set(names(runtime, optimizer))
    if saved != called:
        odd = min(saved ^ called)
        where = "the checkpoint's optimizer alone" if odd in saved else "this optimizer alone"
        raise ConfigError(f"load: {odd} belongs to {where}: make the optimizer of the same parameters as when saved")


def settings(runtime: Runtime, optimizer: Optimizer, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """This optimizer's groups with the settings that their parameters had, as its `load_state_dict` takes them."""
    had = {name: group for group in groups for name in group["params"]}
    called = iter(names(runtime, optimizer))
    result, number = [], 0
    for group in optimizer.param_groups:
        members = [next(called) for _ in group["params"]]
        for name in members:
            if _settings(had[name]) != _settings(had[members[0]]):
                raise ConfigError(
                    f"load: {members[0]} and {name} are in one group of this {type(optimizer).__name__}, and had "
                    "different settings when saved: make the same groups"
                )
        taken = _settings(had[members[0]]) if members else {}
        if isinstance(optimizer, AdamW) and (taken.get("amsgrad") or taken.get("maximize")):
            raise ConfigError(
                "load: the checkpoint's AdamW has amsgrad or maximize, which mics.AdamW has not: use torch.optim.AdamW"
            )
        numbers = list(range(number, number + len(members)))
        number += len(members)
        result.append({**group, **taken, "params": numbers})
    return result


@dataclass(frozen=True)
class Wanted:
    """Memory to read an optimizer's state into: by the number of the parameter and the key, and sorted as it lies."""

    state: dict[int, dict[str, Any]]
    cuts: tuple[Cut, ...]
    wholes: dict[str, torch.Tensor]

    def state_dict(self, groups: list[dict[str, Any]], numbers: set[str]) -> dict[str, Any]:
        """What has been read, as the optimizer takes it; `numbers` are the keys of what was Python's."""
        state = {
            number: {key: value.item() if key in numbers else value for key, value in entry.items()}
            for number, entry in self.state.items()
        }
        return {"state": state, "param_groups": groups}


def wanted(
    runtime: Runtime,
    optimizer: Optimizer,
    weights: Mapping[str, Cut],
    stored: Mapping[str, torch.dtype],
    scalars: set[str],
) -> Wanted:
    """Memory for what is stored, given the dtype of each stored tensor and which keys are single numbers.

    It is the optimizer's own where that fits, so that moments are not in memory twice.
    """
    numbers = {name: number for number, name in enumerate(names(runtime, optimizer))}
    own = optimizer.memory() if isinstance(optimizer, AdamW) else optimizer.state_dict()["state"]
    state: dict[int, dict[str, Any]] = {}
    cuts: list[Cut] = []
    wholes: dict[str, torch.Tensor] = {}
    for full, dtype in stored.items():
        if full.startswith(_STATE):
            name, _, key = full.removeprefix(_STATE).rpartition(".")
            weight = weights[name]
            local = own.get(numbers[name], {}).get(key)
            if key in scalars:
                local = torch.empty((), dtype=dtype)
            elif not isinstance(local, torch.Tensor) or (local.shape, local.dtype) != (weight.local.shape, dtype):
                local = torch.empty_like(weight.local, dtype=dtype)
            state.setdefault(numbers[name], {})[key] = local
            if key in scalars:
                wholes[full] = local
            else:
                cuts.append(replace(weight, name=state_name(name, key), local=local))
    return Wanted(state, tuple(cuts), wholes)


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group without the parameters, and without the names that torch keeps of those that came with names."""
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}
