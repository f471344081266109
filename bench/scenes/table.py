"""The scenes: which clusters, which variants, how many micro-steps. Each is one run, and one file of results."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace

from bench.scenes.model import StandIn

NONE = StandIn()


@dataclass(frozen=True)
class Scene:
    """One emulated cluster, and the variants that take turns on it; ratios are to the first of them."""

    name: str
    question: str
    variants: tuple[str, ...]
    budget: int  # seconds that it may take on 2 quiet cores, start of the ranks included, DeepSpeed not
    nodes: int = 4
    ranks_per_node: int = 2
    rate_mbit: float = 100.0
    latency_ms: float = 1.0
    micro_steps: tuple[int, ...] = (4,)
    stand_in: StandIn = NONE
    precision: str = "fp32"  # as of `Terms`
    width: int = 320
    blocks: int = 4
    steps: int = 1  # in a row, between two looks at the clock
    rounds: int = 5

    @property
    def parameters(self) -> int:
        """Of the model."""
        return 2 * self.blocks * self.width**2

    def without(self, names: set[str]) -> Scene:
        """The scene without some variants."""
        return replace(self, variants=tuple(name for name in self.variants if name not in names))

    def small(self) -> Scene:
        """So small that it takes seconds: it shows that all runs, and its figures say nothing."""
        stand_in = StandIn(self.stand_in.forward / 20, self.stand_in.backward / 20)
        return replace(
            self, rate_mbit=400.0, stand_in=stand_in, width=64, blocks=2, micro_steps=(2,), steps=1, rounds=1
        )

    def write(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, text: str) -> Scene:
        """What `write` wrote."""
        told = json.loads(text)
        told |= {"variants": tuple(told["variants"]), "micro_steps": tuple(told["micro_steps"])}
        return cls(**told | {"stand_in": StandIn(**told["stand_in"])})


PEERS = ("HSDP 4", "FSDP2 full", "FSDP2 reshard 2", "ZeRO-3", "HSDP 2", "DDP")
OURS = ("mics 4,4,4", "mics 2,2,4", "mics 8,8,8", "mics 2,2,8", "mics 2,2,2", "mics 1,1,1")
COMPUTE = StandIn(0.020, 0.040)
"""A block of ours carries 0.8 MB, which take 66 ms at 100 Mbit/s."""

_PEERS = Scene(
    "peers-100",
    "A step against the peers, with nothing to hide transfers behind",
    (*PEERS, *OURS),
    budget=130,
    micro_steps=(1, 8),
    width=288,
    rounds=2,
)
_WEAK = Scene(
    "weak-1",
    "Weak scaling, with a stand-in for the computation",
    ("FSDP2 full", "ZeRO-3", "mics 2,2,-1"),
    budget=55,
    nodes=1,
    rate_mbit=50.0,
    micro_steps=(2,),
    # Two cores play up to 16 ranks, whose meetings cost 0.15 s a step however long it is. So the waits are long, and
    # there is little to send, at as low a rate: `figures.weak_note` says like what.
    stand_in=StandIn(0.800, 1.600),
    width=128,
    blocks=2,
    rounds=2,
)

_EIGHT_BITS = Scene(
    "eight-bits",
    "Eight bits between nodes, in mixed precision",
    (
        "HSDP 4",
        "HSDP 2",
        "mics 2,2,8",
        "mics 2,2,8 int8",
        "mics 2,2,8 fp32-sums",
        "mics 2,2,8 fp32-sums int8",
        "mics 2,2,8 fp32",
        "mics 2,2,8 fp32 int8",
    ),
    budget=240,
    precision="bf16",
    width=1024,
    rounds=3,
)
_WEAK_BF16 = replace(
    _EIGHT_BITS,
    name="weak-bf16-2",
    question="Weak scaling in mixed precision, with waits of 60 ms for a block and pass",
    variants=("HSDP 2", "mics 2,2,-1", "mics 2,2,-1 int8"),
    budget=60,
    nodes=2,
    rate_mbit=400.0,
    latency_ms=2.0,
    stand_in=StandIn(0.060, 0.060),
    width=320,
)

SCENES = (
    _PEERS,
    replace(_PEERS, name="peers-400", rate_mbit=400.0, micro_steps=(1, 4), budget=70),
    Scene(
        "peers-large",
        "A step of a larger model, of which the cores are a smaller part",
        ("HSDP 4", "FSDP2 full", "ZeRO-3", "DDP", "mics 4,4,4", "mics 2,2,4", "mics 2,2,8", "mics 1,1,1"),
        budget=165,
        width=512,
        rounds=3,
    ),
    Scene(
        "stand-in",
        "How near to the limit, with a stand-in for the computation",
        ("HSDP 4", "mics 4,4,4", "mics 2,2,4", "mics 2,2,8", "mics 2,2,2", "mics 1,1,1"),
        budget=85,
        stand_in=COMPUTE,
        steps=2,
        rounds=2,
    ),
    Scene(
        "hierarchy",
        "A partition group on two nodes: gathers that know the nodes against flat ones",
        ("mics 4,4,4 flat", "mics 4,4,4", "HSDP 4"),
        budget=65,
        rounds=3,
    ),
    Scene(
        "two-hops",
        "Gradients between replicas once a step against once a micro-step",
        ("mics 2,8,8", "mics 2,2,8"),
        budget=45,
        micro_steps=(1, 4),
    ),
    _WEAK,
    replace(_WEAK, name="weak-2", nodes=2, budget=75),
    replace(_WEAK, name="weak-8", nodes=8, budget=95),
    Scene(
        "ablation",
        "Each mechanism off in turn, with a stand-in for the computation",
        (
            "mics 4,4,8",
            "mics 4,4,8 flat",
            "mics 4,8,8",
            "mics 4,4,8 no-prefetch",
            "mics 4,4,8 no-overlap",
            "mics 4,4,4",
        ),
        budget=75,
        stand_in=COMPUTE,
        rounds=3,
    ),
    _EIGHT_BITS,
    _WEAK_BF16,
    replace(_WEAK_BF16, name="weak-bf16-8", nodes=8, budget=90),
)
