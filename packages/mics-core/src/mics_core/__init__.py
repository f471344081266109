"""Training of models that are cut over many ranks, with few bytes on slow links: `shard` one, and train as usual."""

from mics_core.checkpoint import load, save
from mics_core.checkpoint.weight_files import open_weights
from mics_core.checkpoint.weights import load_weights
from mics_core.comm.first_cause import publish_at_the_end, tell_failure
from mics_core.comm.world import init
from mics_core.errors import ConfigError, LifecycleError, LostRank, NoCheckpoint
from mics_core.loop import accumulate, check_replicas, clip_grad_norm_, full_params, ledger
from mics_core.optim.adamw import AdamW
from mics_core.optim.hooks import watch_optimizers
from mics_core.planner.cluster import Cluster
from mics_core.planner.search import plan
from mics_core.runtime import shard
from mics_core.spec.formula import forecast
from mics_core.spec.sharding import LossScale, Precision, Sharding
from mics_core.unit.slices import shape_of

watch_optimizers()
publish_at_the_end()

__version__ = "0.1.0"

__all__ = [
    "AdamW",
    "Cluster",
    "ConfigError",
    "LifecycleError",
    "LossScale",
    "LostRank",
    "NoCheckpoint",
    "Precision",
    "Sharding",
    "accumulate",
    "check_replicas",
    "clip_grad_norm_",
    "forecast",
    "full_params",
    "init",
    "ledger",
    "load",
    "load_weights",
    "open_weights",
    "plan",
    "save",
    "shape_of",
    "shard",
    "tell_failure",
]
