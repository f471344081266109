"""What a sharding costs, from integers alone: bytes that a rank holds, calls and bytes that it sends."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import nn

from mics_core.errors import ConfigError
from mics_core.spec.eight_bits import EightBits, Forms
from mics_core.spec.sharding import Precision, Sharding
from mics_core.spec.topology import Rungs, Scope, Topology
from mics_core.spec.units import UnitRule, UnitSpec, find, lay_out


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
    exact: int = 0  # of the trained ones, so many never travel in eight bits, and come last where others do


@dataclass(frozen=True)
class Formula:
    """What a rank must hold and send, for a model whose units are used one after another in one order."""

    sharding: Sharding
    precision: Precision
    rungs: Rungs
    root: UnitSize
    units: tuple[UnitSize, ...]  # without the root, in the order of use
    rank: int = 0  # whose: in eight bits those with exact elements send more

    def step(self, micro_steps: int, *, marked: bool = True) -> dict[tuple[str, str], Traffic]:
        """What one rank sends in one optimizer step; `marked` if the micro-steps came from `accumulate`.

        From the second pass on: the first one does not know the order yet, and keeps nothing for its next use.
        """
        traffic: dict[tuple[str, str], Traffic] = defaultdict(Traffic)
        for unit, gathers in self._gathers(micro_steps, marked=marked):
            times = {"gather": gathers, "hop 1": micro_steps, "hop 2": 1, "sync": 1, "refresh": 1}
            moved = [(action, unit) for action in times] + [("gather", UnitSize(unit.frozen, 0))]
            for action, size in moved:
                for level, sent in self.sends(action, size):
                    entry = traffic[action, self.rungs.name(level)]
                    entry.calls += times[action]
                    entry.bytes += times[action] * sent
        return {key: value for key, value in traffic.items() if value.calls}

    def sends(self, action: str, size: UnitSize) -> list[tuple[int, int]]:
        """The levels that an action takes a unit's trained buffer over, and the bytes that the rank sends there."""
        p, g, o, world = (*self.degrees, self.rungs.degrees[-1])
        low, high, dtype = {
            "gather": (1, p, self.precision.compute),
            "hop 1": (1, g, self.precision.reduce),
            "hop 2": (g, world, self.precision.reduce),
            "sync": (o if g < world else world, world, self.precision.reduce),
            "refresh": (p, o, self.precision.compute),
        }[action]
        sent = []
        for level in self.rungs.levels(low, high) if size.trained else ():
            below, above = self.rungs.degrees[level : level + 2]
            form = self.form(action, size, level)
            if form is None:
                sent.append((level, (above // below - 1) * (size.trained // above) * dtype.itemsize))
            else:
                sent.append((level, self._sends_coded(form, action, size.trained, below, above)))
        return sent

    def form(self, action: str, size: UnitSize, level: int) -> EightBits | None:
        """How a level carries it; None: as it is."""
        forms = Forms.of(self.precision, size.trained - size.exact)
        found = {"hop 1": forms.hop1, "hop 2": forms.hop2, "sync": forms.hop2, "refresh": forms.refresh}
        return found.get(action) if self.rungs.scope(level) is Scope.INTER else None

    def _sends_coded(self, form: EightBits, action: str, size: int, below: int, above: int) -> int:
        mine = form.nbytes(*self._range(size, above))
        if action.startswith("hop"):
            return form.nbytes(*self._range(size, below)) - mine  # to each peer its own part
        return (above // below - 1) * mine  # mine to each

    def _range(self, size: int, degree: int) -> tuple[int, int]:
        """Of the rank's piece."""
        length = size // degree
        begin = self.rungs.piece_number(self.rank, degree) * length
        return begin, begin + length

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
        g, world, node = self.sharding.grads, self.rungs.degrees[-1], self.rungs.topology.ranks_per_node
        largest = max(unit.trained for unit in (self.root, *self.units))
        coded = self._coded_actions()
        direct = "hop 2" in coded and g >= node  # rounded to eight bits from the sum itself
        wires = 0 if direct or self.precision.reduce == self.precision.master else len(self.rungs.legs(g, world))
        summed = [
            (below, above)
            for level, (below, above) in enumerate(pairwise(self.rungs.degrees))
            if self.rungs.scope(level) is Scope.INTRA or ("hop 1" if above <= g else "hop 2") not in coded
        ]
        return {
            "staging": 2 * largest * reduce if g > 1 else 0,
            "wire": wires * (largest // g) * reduce if g < world else 0,
            "received": sum((above // below - 1) * (largest // above) * reduce for below, above in summed),
            "parcels": coded.pop("hop 1", 0) + max(coded.values(), default=0),
        }

    def _coded_actions(self) -> dict[str, int]:
        """What travels in eight bits, and the bytes that its lane keeps for that. Hop 1 has a lane of its own."""
        kept: dict[str, int] = {}
        for unit in (self.root, *self.units):
            for action in ("hop 1", "hop 2", "sync", "refresh"):
                for level, _ in self.sends(action, unit):
                    form = self.form(action, unit, level)
                    if form is not None:
                        _, count = form.places(self._ranges(action, unit.trained, level))
                        kept[action] = max(kept.get(action, 0), count)
        return kept

    def _ranges(self, action: str, size: int, level: int) -> list[tuple[int, int]]:
        """What lies in memory at once: a level's whole, and in a sum what the others send for my part of it."""
        below, above = self.rungs.degrees[level : level + 2]
        arriving = above // below - 1 if action.startswith("hop") else 0
        return [self._range(size, below), *[self._range(size, above)] * arriving]

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


def formula(
    units: Sequence[UnitSpec], sharding: Sharding, precision: Precision, topology: Topology, rank: int = 0
) -> Formula:
    """Of a model that was cut into these units; the sharding is resolved."""

    def size(unit: UnitSpec) -> UnitSize:
        trained, frozen = lay_out(unit.trained, topology.world, precision), lay_out(unit.frozen, topology.world)
        # Without eight bits nothing lies apart, and a plan that weighs them takes the elements alone.
        exact = trained.size - trained.exact if precision.has_eight_bits else unit.exact(precision)
        return UnitSize(trained.size, frozen.size, exact)

    root, *others = map(size, units)
    return Formula(sharding, precision, Rungs.of(sharding, topology), root, tuple(others), rank)


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
    found = [unit.arranged(precision) for unit in find(model, units)]
    return formula(found, resolved, precision, Topology(ranks, ranks_per_node))


def check_kinds(caller: str, model: object, sharding: object, precision: object) -> None:
    """Raise unless these are what they are called."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{caller}: the model is {model!r}, expected a torch.nn.Module")
    if not isinstance(sharding, Sharding):
        raise ConfigError(f"{caller}: sharding is {sharding!r}, expected a mics.Sharding such as Sharding.mics(8)")
    if not isinstance(precision, Precision):
        raise ConfigError(f"{caller}: precision is {precision!r}, expected a mics.Precision such as Precision.bf16()")
