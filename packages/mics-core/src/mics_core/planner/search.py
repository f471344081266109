"""Which sharding, micro-batch and recomputation: what fits is estimated, and the most promising of it is simulated."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from mics_core.errors import ConfigError
from mics_core.planner.advice import advise, cluster_that_fits
from mics_core.planner.candidate import Candidate
from mics_core.planner.cluster import Cluster
from mics_core.planner.eight_bits import weigh
from mics_core.planner.estimate import Estimate, Estimates
from mics_core.planner.memory import Memory, memory
from mics_core.planner.plan_table import Plan
from mics_core.planner.simulator import simulate
from mics_core.planner.ways import AS_FAST, Row, loser, preference, too_large
from mics_core.planner.workload import Sample, Workload, trace
from mics_core.spec.sharding import Precision, Sharding
from mics_core.spec.topology import Topology, shardings
from mics_core.spec.units import UnitRule

MOST = 1 << 40
"""Samples of a step, or tokens of a sample: products of them stay numbers that tensors can have."""

FASTEST = 10
"""So many shardings are simulated because their estimates are least."""

PREFERRED = 8
"""So many more at most because they are preferred, and their estimates are near the least."""

NEAR = 1.03
"""Of ways that are as fast, estimates agree within 3 %."""


@dataclass(frozen=True)
class _Fitting:
    candidate: Candidate
    memory: Memory
    estimate: Estimate


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
    units, precision: as for `mics.shard`. Of several precisions the fastest is taken; they may differ in `reduce`,
        `between_nodes` and `hop1_between_nodes` alone, and changing these changes the training's rounding, so by
        default there is one. What torch.int8 between nodes would bring to the choice is said, and never chosen.
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
    estimates = Estimates(workload, cluster)
    fitting, losers = [], []
    for sharding in shardings(Topology(cluster.ranks, cluster.ranks_per_node)):
        found, least = _best_of(workload, cluster, estimates, sharding, precisions[0], share, recomputes)
        if found:
            fitting.append(min(found, key=lambda each: (each.estimate.likely, each.candidate.recompute)))
        else:
            losers.append(too_large(*least, cluster))
    if not fitting:
        raise ConfigError(cluster_that_fits(workload, cluster, precisions[0], recomputes))
    fitting.sort(key=lambda each: each.estimate.likely)
    rows = _simulated(workload, cluster, fitting)
    winner = _chosen(workload, cluster, rows, precisions)
    others = [row for row in rows if row.candidate.sharding != winner.candidate.sharding]
    seen = {row.candidate.sharding for row in rows}
    rest = [each for each in fitting if each.candidate.sharding not in seen]
    slower = [loser(row.candidate, row.memory, winner, cluster, row.prediction.seconds) for row in others]
    unseen = [loser(each.candidate, each.memory, winner, cluster, each.estimate.least, least=True) for each in rest]
    best = (winner, *others)
    return Plan(
        workload, cluster, best, (*slower, *unseen, *losers), advise(best, cluster), weigh(workload, winner, cluster)
    )


def tokens_for(model: nn.Module, seq: int | None) -> Mapping[str, torch.Tensor]:
    """A batch of one row of `seq` tokens and their targets, by the names that the model's forward has for them."""
    names = inspect.signature(model.forward).parameters
    tokens = next((name for name in ("tokens", "input_ids") if name in names), None)
    targets = next((name for name in ("targets", "labels") if name in names), None)
    if tokens is None or targets is None:
        raise ConfigError(
            f"plan: {type(model).__name__} takes {list(names)}, expected tokens (or input_ids) and targets (or "
            "labels): plan it in a program, where mics.plan(..., sample=...) takes what the model is called with"
        )
    if type(seq) is not int or not 1 <= seq <= MOST:
        raise ConfigError(
            f"plan: seq is {seq!r}, expected the tokens of a sample, 1 to {MOST}: correct it, or in a program pass "
            "sample=..."
        )
    row = torch.empty(1, seq, dtype=torch.int64, device="meta")
    return {tokens: row, targets: row}


def _precisions(precision: Precision | Sequence[Precision] | None) -> Sequence[Precision]:
    if precision is None:
        return [Precision.fp32()]
    several = precision if isinstance(precision, Sequence) else [precision]
    right = bool(several) and all(isinstance(each, Precision) for each in several)
    if not right or len({(each.compute, each.master, each.exact) for each in several}) != 1:
        raise ConfigError(
            f"plan: precision is {precision!r}, expected one mics.Precision, or several that differ in what travels "
            "alone: plan for each compute dtype apart"
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
    estimates: Estimates,
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
            found.append(_Fitting(ahead, held, estimates.of(ahead)))
            break
    return found, least


def _simulated(workload: Workload, cluster: Cluster, fitting: Sequence[_Fitting]) -> list[Row]:
    """The fastest by their estimates, then preferred ones until one is as fast; sorted by what the simulation says."""
    rows: dict[Sharding, Row] = {}
    best = float("inf")

    def seconds(each: _Fitting) -> float:
        nonlocal best
        found = rows.get(each.candidate.sharding)
        if found is None:
            found = Row(each.candidate, simulate(workload, cluster, each.candidate), each.memory)
            rows[each.candidate.sharding] = found
            best = min(best, found.prediction.seconds)
        return found.prediction.seconds

    near = [each for each in fitting if each.estimate.likely <= NEAR * fitting[0].estimate.likely]
    for each in fitting[:FASTEST]:
        if each.estimate.least <= AS_FAST * best:
            seconds(each)
    for each in sorted(near, key=lambda each: preference(each.candidate, each.memory, cluster)):
        if each.estimate.least <= AS_FAST * best and seconds(each) <= AS_FAST * best:
            break
        if len(rows) == FASTEST + PREFERRED:
            break
    return sorted(rows.values(), key=lambda row: row.prediction.seconds)


def _chosen(workload: Workload, cluster: Cluster, rows: Sequence[Row], precisions: Sequence[Precision]) -> Row:
    """The preferred one of the fastest, with what else may make it faster."""
    near = [row for row in rows if row.prediction.seconds <= AS_FAST * rows[0].prediction.seconds]
    chosen = min(near, key=lambda row: preference(row.candidate, row.memory, cluster))
    varied = [chosen]
    for prefetch in (chosen.candidate.prefetch_units, 2) if chosen.candidate.sharding.params > 1 else (1,):
        for precision in precisions:
            candidate = replace(chosen.candidate, prefetch_units=prefetch, precision=precision)
            held = memory(workload, candidate, cluster)
            if candidate != chosen.candidate and held.total <= cluster.memory:
                varied.append(Row(candidate, simulate(workload, cluster, candidate), held))
    fastest = min(varied, key=lambda row: row.prediction.seconds)
    return fastest if fastest.prediction.seconds * AS_FAST < chosen.prediction.seconds else chosen
