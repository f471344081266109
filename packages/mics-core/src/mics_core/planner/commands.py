"""`mics plan`, `mics simulate`, `mics cluster` and `mics probe`: what they are told, and what they print."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from shutil import get_terminal_size
from textwrap import fill
from typing import TYPE_CHECKING

from mics_core.errors import ConfigError
from mics_core.planner.cluster import Cluster
from mics_core.planner.columns import WIDTH, aligned, digits
from mics_core.planner.named_model import NamedModel
from mics_core.spec.sharding import Precision

if TYPE_CHECKING:
    from mics_core.planner.plan_table import Plan

NAMES = ("plan", "simulate", "cluster", "probe")
PRECISIONS = {"fp32": Precision.fp32(), "bf16": Precision.bf16(), "fp16": Precision.fp16()}
RECOMPUTE = {"on": True, "off": False, "auto": None}


_PLAYED = (
    "All of it is predicted. Every row has the micro-batch of mics' plan for the fewest nodes; what does not fit is "
    "played all the same, and its memory is counted as if mics ran these degrees. exposed: share of a step in which "
    "computation waits for links. kept: of the speed of a rank on the fewest nodes."
)


def add_parsers(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Teach the command `mics` these."""
    plan = commands.add_parser("plan", help="choose sharding, micro-batch and recomputation for a model on a cluster")
    simulate = commands.add_parser("simulate", help="draw how a plan scales over nodes, beside ZeRO-3, HSDP and DDP")
    for parser in (plan, simulate):
        parser.add_argument(
            "--model",
            required=True,
            metavar="MODULE:CALL",
            help="such as 'mics_models:gpt(\"gpt-100b\")'; or of a file in this folder: 'mymodel:Model(layers=80)'",
        )
        parser.add_argument(
            "--cluster", required=True, metavar="NAME:NODES", help="such as p4d.24xlarge:64, or cluster.toml:64"
        )
        parser.add_argument(
            "--global-batch",
            required=True,
            type=int,
            help="samples of a step, of all ranks; for simulate, on the fewest nodes",
        )
        parser.add_argument("--seq", required=True, type=int, help="tokens of a sample")
        parser.add_argument("--precision", choices=sorted(PRECISIONS), default="bf16")
        parser.add_argument("--recompute", choices=sorted(RECOMPUTE), default="auto", help="of units, in backwards")
    plan.add_argument(
        "--top",
        type=int,
        help="so many of those not chosen one by one, each with its reason; default: a row for each reason",
    )
    simulate.add_argument("--nodes", required=True, help="such as 2,4,8,...,64")
    kind = simulate.add_mutually_exclusive_group()
    kind.add_argument("--weak", action="store_true", help="the batch grows with the nodes; the default")
    kind.add_argument("--strong", action="store_true", help="the batch stays")
    simulate.add_argument("--out", type=Path, help="a picture of the curves, such as curves.png")
    simulate.add_argument("--picture", type=Path, help="of a step on the fewest nodes, lane by lane, such as step.png")
    simulate.add_argument("--trace", type=Path, help="the same step for ui.perfetto.dev, such as step.json")
    cluster = commands.add_parser("cluster", help="list the clusters known by name, or print one as a TOML file")
    cluster.add_argument("name", nargs="?", metavar="NAME:NODES", help="such as DGX-H100; > cluster.toml keeps it")
    probe = commands.add_parser("probe", help="measure this cluster, under torchrun, and write it down for `mics plan`")
    probe.add_argument("out", type=Path, help="such as cluster.toml; rank 0 writes it")
    probe.add_argument("--quick", action="store_true", help="fewer and smaller messages: seconds rather than minutes")


def run(given: argparse.Namespace) -> None:
    """Do what one of these commands was told, and print what it found."""
    if given.command == "probe":
        from mics_core.comm import world
        from mics_core.planner.probe import probe

        try:
            probe(given.out, quick=given.quick)
        finally:
            world.leave()
    elif given.command == "simulate":
        _simulate(given)
    elif given.command == "cluster":
        print(_listed() if given.name is None else Cluster.parse(given.name).toml(), end="")
    else:
        _show(given)


def _simulate(given: argparse.Namespace) -> None:
    from mics_core.planner import curve_picture, scaling, timeline

    nodes = counts(given.nodes)
    for option, suffix in (("out", ".png"), ("picture", ".png"), ("trace", ".json")):
        if getattr(given, option) is not None:
            _check_out(option, getattr(given, option), suffix)  # before minutes of work
    plan = _plan(given, Cluster.parse(given.cluster).with_nodes(nodes[0]))
    kind = scaling.Scaling.STRONG if given.strong else scaling.Scaling.WEAK
    points = scaling.curves(plan.workload, plan.cluster, plan.chosen, nodes, kind)
    title = (
        f"{NamedModel.parse(given.model)} on {plan.cluster.name}, {given.precision}, "
        f"micro-batch {plan.micro_batch}{', recomputed' if plan.recompute else ''}\n"
        f"{given.global_batch:,} samples of {given.seq:,} tokens a step"
        f"{'' if given.strong else f' on {nodes[0]} nodes, as many a rank on more'}"
    )
    print(f"{title}\n\n{scaling.table(points)}\n\n{fill(_PLAYED, _width())}")
    if given.out is not None:
        curve_picture.draw(points, given.out, title)
        print(given.out)
    for path, write in ((given.picture, timeline.draw), (given.trace, timeline.write_trace)):
        if path is not None:
            write(plan.best[0].prediction, path)
            print(path)


def _listed() -> str:
    from mics_core.planner import presets
    from mics_core.planner.this_machine import THIS

    rows: list[tuple[str, ...]] = [("name", "ranks a node", "GB a rank", "TFLOP/s", "GB/s inside", "between nodes")]
    for known in map(Cluster.preset, presets.NAMES):
        speed = max(known.flops.values())
        numbers = (known.memory, speed / 1e3, known.intra.bandwidth, known.inter.bandwidth)
        rows.append((known.name, str(known.ranks_per_node), *(digits(number / 1e9) for number in numbers)))
    said = (
        f"A name stands for one node, NAME:8 for 8. {THIS!r} looks at this one, and `mics probe cluster.toml` "
        "under torchrun measures yours. `mics cluster NAME` prints all numbers, and where each is from."
    )
    return f"{aligned(rows, (0,))}\n\n{fill(said, _width())}\n"


def _check_out(option: str, path: Path, suffix: str) -> None:
    if path.suffix != suffix or path.is_dir():
        raise ConfigError(f"--{option} is {str(path)!r}, expected a file whose name ends in {suffix}: name one")
    folder = path.absolute().parent
    if not folder.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise ConfigError(f"--{option} is {path}, which cannot be written: name a file in a folder of yours")


def _width() -> int:
    """Of the terminal."""
    return max(40, get_terminal_size((WIDTH, 1)).columns)


def _show(given: argparse.Namespace) -> None:
    if given.top is not None and given.top < 1:
        raise ConfigError(f"--top is {given.top}, expected at least 1: so many of those not chosen are shown")
    plan = _plan(given, Cluster.parse(given.cluster))
    print(plan.table(given.top, _width()))
    print()
    if program := NamedModel.parse(given.model).program():
        print(plan.command(program))
    else:
        print(plan.command())
        print(plan.call())


def counts(text: str) -> list[int]:
    """Numbers of nodes, fewest first: "2,4,8", or "2,4,...,64" for those between by the same factor."""
    try:
        *given, last = text.split(",")
        between = given[-1:] == ["..."]
        numbers = [int(part) for part in (given[:-1] if between else given)]
        if between:
            factor, left = divmod(numbers[-1], numbers[-2])
            if left or factor < 2:
                raise ValueError
            while numbers[-1] * factor < int(last):
                numbers.append(numbers[-1] * factor)
        numbers.append(int(last))
        if numbers != sorted(set(numbers)) or numbers[0] < 1:
            raise ValueError
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise ConfigError(
            f"--nodes is {text!r}, expected whole numbers in increasing order, such as 2,4,8, or 2,4,...,64 for those "
            "between by the same factor: correct it"
        ) from error
    return numbers


def _plan(given: argparse.Namespace, cluster: Cluster) -> Plan:
    from mics_core.planner.search import plan

    return plan(
        NamedModel.parse(given.model).build(),
        cluster,
        global_batch=given.global_batch,
        seq=given.seq,
        precision=PRECISIONS[given.precision],
        recompute=RECOMPUTE[given.recompute],
    )
