"""What a sharding costs, from integers alone: bytes that a rank holds, calls and bytes that it sends."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import nn

from mics_core.errors import ConfigError
from mics_core.spec.layout import Layout
from mics_core.spec.sharding import Precision, Sharding
from mics_core.spec.topology import Rungs, Topology
from mics_core.spec.units import Member, UnitRule, UnitSpec, find


@dataclass
class Traffic:
    """So many calls, and so many bytes that this rank sent in them."""

    calls: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class UnitSize:
    """Elements of a unit's flat buffers, padding included."""

    trained: int
    frozen: int


@dataclass(frozen=True)
class Formula:
    """What a rank must hold and send, for a model whose units are used one after another in one order."""

    sharding: Sharding
    precision: Precision
    rungs: Rungs
    root: UnitSize
    units: tuple[UnitSize, ...]  # without the root, in the order of use

    def step(self, micro_steps: int, *, marked: bool = True) -> dict[tuple[str, str], Traffic]:
        """What one rank sends in one optimizer step; `marked` if the micro-steps came from `accumulate`.

        From the second pass on: the first one does not know the order yet, and keeps nothing for its next use.
        """
        traffic: dict[tuple[str, str], Traffic] = defaultdict(Traffic)
        for unit, gathers in self._gathers(micro_steps, marked=marked):
            times = {"gather": gathers, "hop 1": micro_steps, "hop 2": 1, "sync": 1, "refresh": 1}
            moved = [(action, unit.trained) for action in times] + [("gather", unit.frozen)]
            for action, size in moved:
                for level, piece in self.sends(action, size):
                    below, above = self.rungs.degrees[level : level + 2]
                    entry = traffic[action, self.rungs.name(level)]
                    entry.calls += times[action]
                    entry.bytes += times[action] * (above // below - 1) * piece
        return {key: value for key, value in traffic.items() if value.calls}

    def sends(self, action: str, size: int) -> list[tuple[int, int]]:
        """The levels that an action takes a unit's buffer over, and the bytes that a rank sends to each peer there."""
        p, g, o, world = (*self.degrees, self.rungs.degrees[-1])
        low, high, dtype = {
            "gather": (1, p, self.precision.compute),
            "hop 1": (1, g, self.precision.reduce),
            "hop 2": (g, world, self.precision.reduce),
            "sync": (o if g < world else world, world, self.precision.reduce),
            "refresh": (p, o, self.precision.compute),
        }[action]
        levels = self.rungs.levels(low, high) if size else range(0)
        return [(level, size // self.rungs.degrees[level + 1] * dtype.itemsize) for level in levels]

    @property
    def degrees(self) -> tuple[int, int, int]:
        """P, G and O."""
        return self.sharding.params, self.sharding.grads, self.sharding.optimizer

    def at_rest(self) -> dict[str, int]:
        """Bytes that one rank holds between steps, with the state of mics.AdamW."""
        compute, master = self.precision.compute, self.precision.master
        p, g, o = self.degrees
        trained = sum(unit.trained for unit in (self.root, *self.units))
        frozen = sum(unit.frozen for unit in (self.root, *self.units))
        return {
            "shard": (trained + frozen) // p * compute.itemsize,
            "master": 0 if master == compute else trained // o * master.itemsize,
            "sharded": trained // g * master.itemsize,
            "optimizer": 2 * trained // o * 4,
        }

    def gathered(self, prefetch_units: int = 1) -> int:
        """Bytes of whole units that one rank holds at most: the root, one in use, and the largest so often ahead."""
        if self.sharding.params == 1:
            return 0
        root, *units = (each.trained + each.frozen for each in (self.root, *self.units))
        largest = max(units, default=0)
        most = min(root + sum(units), root + largest + prefetch_units * max(root, largest))
        return most * self.precision.compute.itemsize

    def working(self) -> dict[str, int]:
        """Bytes that one rank keeps for gradients on their way, once there were several micro-steps.

        What arrives is summed out of place on CPUs only: NCCL does that itself.
        """
        reduce = self.precision.reduce.itemsize
        g, world = self.sharding.grads, self.rungs.degrees[-1]
        largest = max(unit.trained for unit in (self.root, *self.units))
        wires = len(self.rungs.legs(g, world)) if self.precision.reduce != self.precision.master and g < world else 0
        return {
            "staging": 2 * largest * reduce if g > 1 else 0,
            "wire": wires * (largest // g) * reduce,
            "received": sum(
                (above // below - 1) * (largest // above) * reduce for below, above in pairwise(self.rungs.degrees)
            ),
        }

    def memory(self) -> int:
        """Bytes that one rank holds at most, activations apart."""
        return sum(self.at_rest().values()) + self.gathered() + sum(self.working().values())

    def _gathers(self, micro_steps: int, *, marked: bool) -> Iterable[tuple[UnitSize, int]]:
        """How often each unit is gathered: for forward and backward, unless it is kept because it comes next.

        The last unit of a forward begins the backward; the first one ends it, and begins the next micro-step. The root
        is around both.
        """
        passes_kept = micro_steps - 1 if marked else 0
        yield self.root, micro_steps - passes_kept
        last = len(self.units) - 1
        for number, unit in enumerate(self.units):
            kept = (micro_steps if number == last else 0) + (passes_kept if number == 0 else 0)
            yield unit, 2 * micro_steps - kept


def formula(units: Sequence[UnitSpec], sharding: Sharding, precision: Precision, topology: Topology) -> Formula:
    """Of a model that was cut into these units; the sharding is resolved."""

    def elements(members: tuple[Member, ...]) -> int:
        shapes = [(member.name, tuple(member.parameter.shape)) for member in members]
        return Layout.plan(shapes, topology.world).size

    root, *others = (UnitSize(elements(unit.trained), elements(unit.frozen)) for unit in units)
    return Formula(sharding, precision, Rungs.of(sharding, topology), root, tuple(others))


def forecast(
    model: nn.Module,
    sharding: Sharding,
    *,
    ranks: int,
    ranks_per_node: int,
    units: UnitRule | None = None,
    precision: Precision | None = None,
) -> Formula:
    """The bytes that a rank will hold and send, by the formula that `ledger` compares with what is counted.

    Nothing is sent and nothing changes, also for a model on the meta device; the arguments mean what they mean to
    `shard`.
    """
    precision = Precision.fp32() if precision is None else precision
    check_kinds("forecast", model, sharding, precision)
    resolved = sharding.resolve(ranks)
    return formula(find(model, units), resolved, precision, Topology(ranks, ranks_per_node))


def check_kinds(caller: str, model: object, sharding: object, precision: object) -> None:
    """Raise unless these are what they are called."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{caller}: the model is {model!r}, expected a torch.nn.Module")
    if not isinstance(sharding, Sharding):
        raise ConfigError(f"{caller}: sharding is {sharding!r}, expected a mics.Sharding such as Sharding.mics(8)")
    if not isinstance(precision, Precision):
        raise ConfigError(f"{caller}: precision is {precision!r}, expected a mics.Precision such as Precision.bf16()")
