"""Which sharding, micro-batch and recomputation: what fits, by the time that a step must take, and then simulated."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from mics_core.errors import ConfigError
from mics_core.ledger import UnitSize
from mics_core.planner.advice import advise, cluster_that_fits
from mics_core.planner.arithmetic import Arithmetic
from mics_core.planner.candidate import Candidate, System, shardings
from mics_core.planner.cluster import Cluster
from mics_core.planner.memory import Memory, formula_of, memory
from mics_core.planner.plan_table import Plan
from mics_core.planner.simulator import simulate
from mics_core.planner.ways import AS_FAST, Row, loser, preference, too_large
from mics_core.planner.workload import Sample, Workload, trace
from mics_core.sharding import Precision, Sharding
from mics_core.topology import Link, Topology
from mics_core.units import UnitRule

MOST = 1 << 40
"""Samples of a step, or tokens of a sample: products of them stay numbers that tensors can have."""

SIMULATED = 10
"""So many of the most promising shardings are simulated; the rest is known by what it must compute and send."""


@dataclass(frozen=True)
class _Fitting:
    candidate: Candidate
    memory: Memory
    bound: float  # seconds that a step takes at least
    estimate: float  # to sort by


def plan(
    model: nn.Module | Workload,
    cluster: Cluster,
    *,
    global_batch: int,
    sample: Sample | None = None,
    seq: int | None = None,
    units: UnitRule | None = None,
    precision: Precision | Sequence[Precision] | None = None,
    recompute: bool | None = None,
) -> Plan:
    """Choose how to train the model on the cluster: sharding, micro-batch, micro-steps, recomputation, prefetch.

    model: may be on the meta device, and is not changed; or what `trace` found of one.
    global_batch: samples of an optimizer step, of all ranks.
    sample: what the model is called with, as for `trace`; or `seq`, for a model of tokens and their targets.
    units, precision: as for `mics.shard`. Of several precisions the fastest is taken; they may differ in `reduce`
        alone, and changing that changes the training's rounding, so by default there is one.
    recompute: whether units' forwards are computed again in backwards; None chooses. It is the model's part to do it.

    Among shardings that take the same time within 1 % one is chosen that leaves 5 % of the memory free, then one that
    cuts nothing over a part of a node, then the one that cuts least. Raises a ConfigError that says the least that
    would do if nothing fits.
    """
    if not isinstance(model, nn.Module | Workload):
        raise ConfigError(f"plan: the model is {model!r}, expected a torch.nn.Module, or what trace found of one")
    if not isinstance(cluster, Cluster):
        raise ConfigError(
            f'plan: cluster is {cluster!r}, expected a mics.Cluster: make one with Cluster.parse("p4d.24xlarge:4"), or '
            "with Cluster.load"
        )
    precisions = _precisions(precision)
    if isinstance(model, Workload):
        workload = model
    else:
        given = sample if sample is not None else tokens_for(model, seq)
        workload = trace(model, given, units=units, precision=precisions[0], ranks=cluster.ranks)
    share = _share(global_batch, cluster)
    recomputes = (False, True) if recompute is None else (recompute,)
    fitting, losers = [], []
    for sharding in shardings(Topology(cluster.ranks, cluster.ranks_per_node)):
        found, least = _best_of(workload, cluster, sharding, precisions[0], share, recomputes)
        if found:
            fitting.append(min(found, key=lambda each: (each.estimate, each.candidate.recompute)))
        else:
            losers.append(too_large(*least, cluster))
    if not fitting:
        raise ConfigError(cluster_that_fits(workload, cluster, precisions[0], recomputes))
    rows, rest = _simulated(workload, cluster, fitting, precisions)
    winner = rows[0]
    slower = [loser(row.candidate, row.memory, winner, cluster, row.prediction.seconds) for row in rows[1:]]
    unseen = [loser(each.candidate, each.memory, winner, cluster, each.bound, least=True) for each in rest]
    return Plan(workload, cluster, tuple(rows), (*slower, *unseen, *losers), advise(rows, cluster))


def tokens_for(model: nn.Module, seq: int | None) -> Mapping[str, torch.Tensor]:
    """A batch of one row of `seq` tokens and their targets, by the names that the model's forward has for them."""
    names = inspect.signature(model.forward).parameters
    tokens = next((name for name in ("tokens", "input_ids") if name in names), None)
    targets = next((name for name in ("targets", "labels") if name in names), None)
    if tokens is None or targets is None:
        raise ConfigError(
            f"plan: {type(model).__name__} takes {list(names)}, expected tokens (or input_ids) and targets (or "
            "labels): pass what it is called with as mics.plan(sample=...)"
        )
    if type(seq) is not int or not 1 <= seq <= MOST:
        raise ConfigError(
            f"plan: seq is {seq!r}, expected the tokens of a sample, 1 to {MOST}: pass seq=..., or sample=..."
        )
    row = torch.empty(1, seq, dtype=torch.int64, device="meta")
    return {tokens: row, targets: row}


def _precisions(precision: Precision | Sequence[Precision] | None) -> Sequence[Precision]:
    if precision is None:
        return [Precision.fp32()]
    several = precision if isinstance(precision, Sequence) else [precision]
    right = bool(several) and all(isinstance(each, Precision) for each in several)
    if not right or len({(each.compute, each.master) for each in several}) != 1:
        raise ConfigError(
            f"plan: precision is {precision!r}, expected one mics.Precision, or several that differ in reduce alone: "
            "plan for each compute dtype apart"
        )
    return several


def _share(global_batch: int, cluster: Cluster) -> int:
    whole = type(global_batch) is int
    if not whole or not 1 <= global_batch <= MOST or global_batch % cluster.ranks:
        given = global_batch if whole else 1
        near = max(1, (min(given, MOST) + cluster.ranks // 2) // cluster.ranks) * cluster.ranks
        raise ConfigError(
            f"plan: global_batch is {global_batch!r}, expected a multiple of the {cluster.ranks} ranks, so that each "
            f"has equally many samples, and at most {MOST}: take {near}, for example"
        )
    return global_batch // cluster.ranks


def _best_of(
    workload: Workload,
    cluster: Cluster,
    sharding: Sharding,
    precision: Precision,
    share: int,
    recomputes: Sequence[bool],
) -> tuple[list[_Fitting], tuple[Candidate, Memory]]:
    """The largest micro-batch that fits, with and without recomputation; and what takes least memory."""
    sizes = [1 << power for power in range(share.bit_length()) if share % (1 << power) == 0]
    small = Candidate(sharding, precision, 1, share, recomputes[-1], prefetch_units=0)
    state = memory(workload, small, cluster)
    least = small, state
    found = []
    for recompute in recomputes:
        for size in reversed(sizes):
            ahead = Candidate(sharding, precision, size, share // size, recompute)
            live = workload.live(size, recompute=recompute)
            if state.total - state.activations + live > cluster.memory:
                continue
            held = memory(workload, ahead, cluster)
            if held.total > cluster.memory:
                ahead = replace(ahead, prefetch_units=0)
                held = replace(state, activations=live)
            found.append(_Fitting(ahead, held, *_times(workload, cluster, ahead)))
            break
    return found, least


def _times(workload: Workload, cluster: Cluster, candidate: Candidate) -> tuple[float, float]:
    """Seconds that a step takes at least: the arithmetic's, or those of one link; and those to sort by."""
    arithmetic = Arithmetic(cluster, candidate, System.MICS)
    works = [arithmetic.unit(workload.root, root=True), *(arithmetic.unit(unit) for unit in workload.units)]
    compute = candidate.micro_steps * sum(work.forward + work.backward for work in works)
    formula = formula_of(workload, candidate, cluster)
    traffic = replace(formula, units=merged(formula.units)).step(candidate.micro_steps)
    links = {Link.NODE: 0.0, Link.NET: 0.0}
    names = {formula.rungs.name(step): formula.rungs.link(step) for step in range(len(formula.rungs.degrees) - 1)}
    for (_, rung), moved in traffic.items():
        links[names[rung]] += moved.bytes
    inside = links[Link.NODE] / cluster.intra.bandwidth
    between = links[Link.NET] * min(cluster.ranks_per_node, cluster.ranks) / cluster.inter.bandwidth
    longest = max(compute, inside, between)
    return longest, longest + 0.1 * (compute + inside + between - longest)


def merged(units: tuple[UnitSize, ...]) -> tuple[UnitSize, ...]:
    """Three that send what all do: the first and the last are gathered less often, those between them all alike."""
    if len(units) <= 3:
        return units
    middle = UnitSize(sum(unit.trained for unit in units[1:-1]), sum(unit.frozen for unit in units[1:-1]))
    return units[0], middle, units[-1]


def _simulated(
    workload: Workload, cluster: Cluster, fitting: list[_Fitting], precisions: Sequence[Precision]
) -> tuple[list[Row], list[_Fitting]]:
    """The most promising ones, the choice first, and those that were not simulated."""
    fitting = sorted(fitting, key=lambda each: each.estimate)
    rows: list[Row] = []
    rest: list[_Fitting] = []
    best = float("inf")
    for each in fitting:
        if len(rows) == SIMULATED or each.bound > AS_FAST * best:
            rest.append(each)
            continue
        rows.append(Row(each.candidate, simulate(workload, cluster, each.candidate), each.memory))
        best = min(best, rows[-1].prediction.seconds)
    rows.sort(key=lambda row: row.prediction.seconds)
    near = (row for row in rows if row.prediction.seconds <= AS_FAST * best)
    chosen = min(near, key=lambda row: preference(row.candidate, row.memory, cluster))
    varied = [chosen]
    for prefetch in (chosen.candidate.prefetch_units, 2) if chosen.candidate.sharding.params > 1 else (1,):
        for precision in precisions:
            candidate = replace(chosen.candidate, prefetch_units=prefetch, precision=precision)
            held = memory(workload, candidate, cluster)
            if candidate != chosen.candidate and held.total <= cluster.memory:
                varied.append(Row(candidate, simulate(workload, cluster, candidate), held))
    fastest = min(varied, key=lambda row: row.prediction.seconds)
    if fastest.prediction.seconds * AS_FAST >= chosen.prediction.seconds:
        fastest = chosen
    return [fastest, *(row for row in rows if row is not chosen)], rest
