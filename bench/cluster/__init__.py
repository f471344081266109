"""An emulated cluster on one Linux machine: nodes that are network namespaces, and wires as slow as asked.

    with Cluster(nodes=4, rate_mbit=100, latency_ms=1.0) as cluster:
        run = cluster.torchrun(["train.py", "--steps", "10"], ranks_per_node=2, timeout=300)
    print(run.outputs[0], run.traffic)

`python -m bench.cluster --nodes 4 --ranks 2 --rate 100 --latency 1 -- train.py --steps 10` does the same by hand.

    namespaces.py  a namespace, the device that is its only way out, and how to be inside
    wires.py       the schedule: which frame leaves which wire when; pure, without a clock of its own
    switch.py      the process that carries frames between the devices by that schedule
    node.py        the process that runs a program in a node, and takes all of its children along when it ends
    cluster.py     the whole: set up, run, count, tear down
"""

from bench.cluster.cluster import Cluster, Fidelity, Run
from bench.cluster.namespaces import Traffic, traffic, unavailable
from bench.cluster.wires import Link

__all__ = ["Cluster", "Fidelity", "Link", "Run", "Traffic", "traffic", "unavailable"]
