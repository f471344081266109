"""Which sharding, how much memory, how fast, and why: worked out from numbers, before anything runs."""

from mics_core.planner.candidate import Candidate, System
from mics_core.planner.cluster import Cluster, Link, Transport
from mics_core.planner.simulator import Event, Prediction, simulate

__all__ = ["Candidate", "Cluster", "Event", "Link", "Prediction", "System", "Transport", "simulate"]
