"""Which sharding, how much memory, how fast, and why: worked out from numbers, before anything runs."""

from mics_core.planner.candidate import Candidate, System
from mics_core.planner.cluster import Cluster, Link, Transport
from mics_core.planner.memory import Memory, memory
from mics_core.planner.plan_table import Plan
from mics_core.planner.search import plan
from mics_core.planner.simulator import Prediction, simulate
from mics_core.planner.workload import Workload, trace

__all__ = [
    "Candidate",
    "Cluster",
    "Link",
    "Memory",
    "Plan",
    "Prediction",
    "System",
    "Transport",
    "Workload",
    "memory",
    "plan",
    "simulate",
    "trace",
]
