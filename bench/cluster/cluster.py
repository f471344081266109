"""The whole emulated cluster: set up, run programs in its nodes, count what they send, tear down.

However the owner ends, all of it goes. A namespace and its device live as long as a process holds them open, and the
kernel kills the switch and the nodes' processes when the thread that made the Cluster ends: so make it in a thread
that stays, such as the main one.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from bench.cluster.namespaces import DEVICE, Traffic, address, create, inside, traffic, unavailable
from bench.cluster.wires import Link

ROOT = Path(__file__).parents[2]

MOST_NODES = 250  # of the addresses in the subnet

GRACE = 5.0
"""Seconds for the other nodes to end and say why, once one has failed: left alone, they would wait for it."""

LONGEST_TEXT = 4000
"""Characters of a failed node's output that the error repeats."""


@dataclass(frozen=True)
class Run:
    """What came of one program on every node."""

    outputs: list[str]  # by node: what it printed, to stdout and stderr; empty if it was not captured
    traffic: list[Traffic]  # by node: bytes on its wires during the run
    seconds: float


@dataclass(frozen=True)
class Fidelity:
    """What the switch did since it started, and how well it kept to its schedule: slower than that, figures lie."""

    frames: int
    dropped: int  # not addressed to any node, or refused by a device
    mean_late_ms: float  # between when a frame was due and when its node had it
    worst_late_ms: float
    cpu_seconds: float


class Cluster:
    """Nodes joined by wires; a context manager.

    Every node has `rate_mbit` up and as much down, and any two are `latency_ms` apart one way. `links` overrides that
    for some nodes.
    """

    def __init__(
        self, nodes: int, rate_mbit: float, latency_ms: float, links: Mapping[int, Link] | None = None
    ) -> None:
        if not 1 <= nodes <= MOST_NODES:
            raise ValueError(f"cluster: {nodes} nodes, expected 1 to {MOST_NODES}")
        if strange := set(links or {}) - set(range(nodes)):
            raise ValueError(f"cluster: links of nodes {sorted(strange)}, expected nodes 0 to {nodes - 1}")
        usual = Link(rate_mbit, rate_mbit, latency_ms / 2)
        self.links = [(links or {}).get(node, usual) for node in range(nodes)]
        self._namespaces: list[int] = []
        self._running: set[subprocess.Popen[str]] = set()
        self._runs = 0

    def __enter__(self) -> Cluster:
        if reason := unavailable():
            raise RuntimeError(f"cluster: {reason}")
        farthest = 2e-3 * max(link.latency_ms for link in self.links)
        with ExitStack() as undo, ExitStack() as devices:
            undo.callback(self._namespaces.clear)
            opened = []
            for node, link in enumerate(self.links):
                made = create(node, _mtu(link), _buffer(link, farthest))
                undo.callback(os.close, made.fd)
                devices.callback(os.close, made.device)  # then the switch alone has them, and they go when it does
                self._namespaces.append(made.fd)
                opened.append(made.device)
            self._control, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            undo.enter_context(self._control)
            with its:
                self._switch = _start_switch(its.fileno(), opened, self.links)
            undo.callback(self._switch.wait)
            undo.callback(self._switch.kill)
            undo.callback(_terminate, self._running)
            self.fidelity()  # it answers once it carries frames
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def address(self, node: int) -> str:
        """Where other nodes reach this one."""
        return address(node)

    def inside(self, node: int) -> AbstractContextManager[None]:
        """In here, sockets that the calling thread opens and programs that it starts are in the node's network."""
        return inside(self._namespace(node))

    def bytes(self) -> list[Traffic]:
        """What every node has sent and received so far, counted at its device."""
        counted = []
        for node in range(len(self.links)):
            with self.inside(node):
                counted.append(traffic())
        return counted

    def fidelity(self) -> Fidelity:
        """Ask the switch how well it does."""
        self._check_running()
        try:
            self._control.send(b"?")
            account = json.loads(self._control.recv(4096))
        except (OSError, ValueError):  # nobody is there, or it left without an answer
            raise RuntimeError(f"cluster: the switch ended with status {self._switch.wait()}") from None
        return Fidelity(
            frames=account["frames"],
            dropped=account["dropped"],
            mean_late_ms=1e3 * account["late"] / max(account["frames"], 1),
            worst_late_ms=1e3 * account["latest"],
            cpu_seconds=account["cpu"],
        )

    def start(
        self, node: int, program: Sequence[str], env: Mapping[str, str] | None = None, stdout: Any = None
    ) -> subprocess.Popen[str]:
        """Start a program in a node. Terminated, it goes with everything that it started; so it does with the cluster.

        It runs where and as the caller does, in the node's network and with process ids of the node's own.
        """
        namespace = self._namespace(node)
        self._running -= {running for running in self._running if running.poll() is not None}
        running = subprocess.Popen(
            [*_module("node"), str(os.getpid()), str(namespace), *program],
            env=_environment({"GLOO_SOCKET_IFNAME": DEVICE, "OMP_NUM_THREADS": "1", **(env or {})}),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=None if stdout is None else subprocess.STDOUT,
            pass_fds=[namespace],
            start_new_session=True,  # Ctrl-C is the owner's, who ends the nodes
            text=True,
        )
        self._running.add(running)
        return running

    def run(
        self,
        programs: Sequence[Sequence[str]],
        env: Mapping[str, str] | None = None,
        timeout: float = 300.0,
        capture: bool = True,
    ) -> Run:
        """Run one program in each node, the first in node 0, until all have ended.

        Without `capture` they print where the caller does. RuntimeError if one fails, TimeoutError if it takes longer
        than `timeout` seconds; nothing runs on after either.
        """
        if len(programs) > len(self.links):
            raise ValueError(f"cluster: {len(programs)} programs, expected at most one for each of {len(self.links)}")
        with ExitStack() as files:
            printed = [files.enter_context(tempfile.TemporaryFile("w+", errors="replace")) for _ in programs]
            before, begun = self.bytes(), time.monotonic()
            nodes: list[subprocess.Popen[str]] = []
            try:
                for node, program in enumerate(programs):
                    nodes.append(self.start(node, program, env, printed[node] if capture else None))
                failed = self._wait(nodes, begun + timeout)
            finally:
                _terminate(nodes)
            seconds, after = time.monotonic() - begun, self.bytes()
            outputs = [_text(file) for file in printed]
        if failed is not None:
            raise RuntimeError(
                f"cluster: node {failed} ended with status {nodes[failed].returncode}, expected 0"
                + (f"; it printed:\n{outputs[failed][-LONGEST_TEXT:]}" if capture else "")
            )
        moved = [Traffic(b.sent - a.sent, b.received - a.received) for a, b in zip(before, after, strict=True)]
        return Run(outputs, moved, seconds)

    def torchrun(
        self,
        argv: Sequence[str],
        ranks_per_node: int = 1,
        env: Mapping[str, str] | None = None,
        timeout: float = 300.0,
        capture: bool = True,
    ) -> Run:
        """Run `torchrun ... argv` on every node, as on a real cluster: see `run`."""
        launch = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={len(self.links)}"]
        # A port that no run before this one can still have.
        launch += [f"--nproc-per-node={ranks_per_node}", f"--master-addr={address(0)}"]
        launch += [f"--master-port={29500 + self._runs}"]
        self._runs += 1
        programs = [[*launch, f"--node-rank={node}", *argv] for node in range(len(self.links))]
        return self.run(programs, env, timeout, capture)

    def _wait(self, nodes: Sequence[subprocess.Popen[str]], deadline: float) -> int | None:
        """Wait until all have ended, or until one has failed and the others had their grace: which one was first."""
        failed = None
        while True:
            codes = [node.poll() for node in nodes]
            if failed is None and any(codes):
                failed = next(node for node, code in enumerate(codes) if code)
                deadline = min(deadline, time.monotonic() + GRACE)
            late = time.monotonic() > deadline
            if None not in codes or (late and failed is not None):
                return failed
            if late:
                unfinished = [node for node, code in enumerate(codes) if code is None]
                raise TimeoutError(f"cluster: nodes {unfinished} have not ended in time: ask for a longer timeout")
            if self._switch.poll() is not None:
                raise RuntimeError(f"cluster: the switch ended with status {self._switch.returncode}")
            time.sleep(0.02)

    def _check_running(self) -> None:
        if not self._namespaces:
            raise RuntimeError("cluster: it is not running: use it in `with Cluster(...) as cluster:`")

    def _namespace(self, node: int) -> int:
        self._check_running()
        if not 0 <= node < len(self._namespaces):
            raise ValueError(f"cluster: node {node}, expected 0 to {len(self._namespaces) - 1}")
        return self._namespaces[node]


def _start_switch(control: int, devices: Sequence[int], links: Sequence[Link]) -> subprocess.Popen[bytes]:
    told = json.dumps([control, devices, [astuple(link) for link in links]])
    return subprocess.Popen(
        [*_module("switch"), told], env=_environment({}), stdin=subprocess.DEVNULL, pass_fds=[control, *devices]
    )


def _mtu(link: Link) -> int:
    """A frame takes a millisecond: long enough for few to be handled, short enough for others to wait for it."""
    return max(9000, min(60_000, round(max(link.up_mbit, link.down_mbit) * 1e6 / 8 * 1e-3)))


def _buffer(link: Link, farthest: float) -> int:
    """Bytes of twice a round trip, and of the tenth of a second that a program may wait for a core.

    A part of it is the kernel's own, so the window is smaller. Much more would keep a wire busy long after a
    connection is closed.
    """
    return max(32 * _mtu(link), round(max(link.up_mbit, link.down_mbit) * 1e6 / 8 * (0.1 + 4 * farthest)))


def _module(name: str) -> list[str]:
    return [sys.executable, "-P", "-m", f"bench.cluster.{name}"]  # -P: not what lies in the current folder


def _environment(more: Mapping[str, str]) -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return dict(os.environ) | {"PYTHONPATH": os.pathsep.join(paths)} | dict(more)


def _terminate(nodes: Collection[subprocess.Popen[str]]) -> None:
    """End what still runs: all are told before any is waited for."""
    for node in nodes:
        if node.poll() is None:
            node.send_signal(signal.SIGTERM)
    for node in nodes:
        node.wait()


def _text(file: Any) -> str:
    file.seek(0)
    return str(file.read())
