"""What planning itself costs: the plans of the published cases, the trace of a large model, and a simulated step.

    python -m bench.planner

CPU seconds of one process, all of its threads together, as a user pays them: nothing is warmed up, and a plan traces
its model anew. Only what Python collects between two simulated steps is not theirs.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import mics_core as mics
from bench import record
from bench.harness import HostTimer, Ratio, Variant, measure
from mics_core.planner import Candidate, Workload, simulate, trace
from mics_models import gpt

BF16 = mics.Precision.bf16()


@dataclass(frozen=True)
class Case:
    """A model, and what it is trained on."""

    model: str
    cluster: str
    samples: int  # of a step
    tokens: int  # of a sample


PUBLISHED = (Case("100b", "p4d.24xlarge:64", 8192, 512), Case("175b", "p4de.24xlarge:16", 2048, 2048))
TRACED = PUBLISHED[0]
MANY, FEW = Case("175b", "p4de.24xlarge:2048", 262144, 2048), Case("175b", "p4de.24xlarge:1", 128, 2048)
"""Of a simulated step; the ranks are what differs."""

PLAN_GOAL, TRACE_GOAL, SIMULATE_GOAL = 5.0, 4.0, 2.0  # seconds


def shapes(case: Case) -> torch.nn.Module:
    """The model on the meta device."""
    with torch.device("meta"):
        return gpt(case.model)


def traced(case: Case, model: torch.nn.Module) -> Workload:
    """What a plan knows of the model."""
    row = torch.zeros(1, case.tokens, dtype=torch.int64)
    ranks = mics.Cluster.parse(case.cluster).ranks
    return trace(model, {"tokens": row, "targets": row}, precision=BF16, ranks=ranks)


def planning(case: Case) -> Variant:
    """A plan from beginning to end."""
    model, cluster = shapes(case), mics.Cluster.parse(case.cluster)
    return Variant(lambda: mics.plan(model, cluster, global_batch=case.samples, seq=case.tokens, precision=BF16))


def tracing(case: Case) -> Variant:
    """A trace alone."""
    model = shapes(case)
    return Variant(lambda: traced(case, model))


def simulating(case: Case, workload: Workload) -> Variant:
    """A step with recomputation and 8 micro-steps, optimizer state over all ranks."""
    cluster = mics.Cluster.parse(case.cluster)
    micro_batch = case.samples // (8 * cluster.ranks)
    group = min(128, cluster.ranks)
    candidate = Candidate(mics.Sharding(group, group, cluster.ranks), BF16, micro_batch, 8, recompute=True)
    # A full collection goes through all that torch brought, takes five times as long, and comes with every other step.
    return Variant(lambda: simulate(workload, cluster, candidate), restore=gc.collect)


def simulation(case: Case) -> str:
    """What tables call it."""
    return f"simulate a step of {case.model} on {mics.Cluster.parse(case.cluster).ranks:,} ranks"


def run(seconds: float) -> dict[str, Any]:
    """Time everything; plans and simulations each in rounds of their own, for they differ by a factor of a hundred."""
    plans = {f"plan {case.model} for {case.cluster}": planning(case) for case in PUBLISHED}
    trace_name = f"trace {TRACED.model}"
    timer = HostTimer(time.process_time)
    slow = measure(plans | {trace_name: tracing(TRACED)}, timer, seconds, rounds=(3, 9), warm_ups=0)
    workload = traced(MANY, shapes(MANY))  # padded for many ranks, which suits few as well
    steps = {simulation(case): simulating(case, workload) for case in (MANY, FEW)}
    quick = measure(steps, timer, seconds / 10, rounds=(7, 30), warm_ups=0)
    goals = dict.fromkeys(plans, PLAN_GOAL) | {trace_name: TRACE_GOAL, simulation(MANY): SIMULATE_GOAL}
    spreads = {name: samples.spread(name) for samples in (slow, quick) for name in samples.seconds}
    return {
        "cases": {name: {"cpu_seconds": spread, "goal": goals.get(name)} for name, spread in spreads.items()},
        "many_over_few": quick.ratio(simulation(MANY), simulation(FEW)),
        "ranks": [mics.Cluster.parse(case.cluster).ranks for case in (MANY, FEW)],
    }


def planner_table(found: Mapping[str, Any]) -> str:
    """As Markdown, from a record."""
    texts = []
    for name, case in found["cases"].items():
        spread, goal = case["cpu_seconds"], case["goal"]
        judged = ["", ""] if goal is None else [f"<= {goal:g}", "kept" if spread["median"] <= goal else "missed"]
        texts.append([name, f"{spread['median']:.3f}", f"{spread['p10']:.3f}-{spread['p90']:.3f}", *judged])
    return record.table(["", "CPU s", "10-90 %", "goal", ""], texts)


def planner_note(found: Mapping[str, Any]) -> str:
    """What many ranks cost a simulation more than few."""
    many, few = found["ranks"]
    return (
        f"A step on {many:,} ranks takes {Ratio(**found['many_over_few']).told()} times as long to simulate as one on "
        f"{few:,}."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and save; missed goals are no failure."""
    parser = argparse.ArgumentParser(prog="python -m bench.planner", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="to spend on plans; a tenth more on simulations")
    parser.add_argument("--out", type=Path, default=record.RESULTS / "cpu" / "planner.json")
    options = parser.parse_args(arguments)
    words = ["python", "-m", "bench.planner", *(sys.argv[1:] if arguments is None else arguments)]
    content = record.plain(record.stamp(words, "cpu") | run(options.seconds))
    print(f"{planner_table(content)}\n\n{planner_note(content)}")
    print(f"saved {record.save(options.out, content)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
