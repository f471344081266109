"""The process between the nodes: reads frames off their devices, and writes each to its target's when it is due.

Started by Cluster, with the devices' and a control socket's descriptors. Each message on the control socket is
answered with what the switch did so far; when that socket closes, the switch ends.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import socket
import sys
import time
from dataclasses import dataclass
from typing import NoReturn

from bench.cluster.namespaces import SUBNET, die_with_parent
from bench.cluster.wires import Frame, Link, Network

LARGEST = 65536  # bytes; no IP packet is larger
BATCH = 16
"""Frames read from one device before others get their turn."""

PATIENCE = 64 * 2**20
"""Bytes under way from one node, beyond which the rest waits in the kernel. TCP's windows keep it far below."""


LEAD = 1e-4
"""Seconds that everything is done ahead of its time, because to wake up a process, here or in a node, takes about that
long. Only delays shrink by it; what the wires carry in a second does not change."""


@dataclass
class Account:
    """What the switch did, and how well."""

    frames: int = 0
    dropped: int = 0  # not for any node, or refused by a device
    late: float = 0.0  # seconds between due and delivered: the sum
    latest: float = 0.0  # and the worst

    def as_json(self) -> bytes:
        """The account, and the processor time that the switch has used."""
        return json.dumps(vars(self) | {"cpu": time.process_time()}).encode()


class Switch:
    """The loop."""

    def __init__(self, devices: list[int], network: Network, control: socket.socket) -> None:
        self.devices = devices
        self.network = network
        self.control = control
        self.account = Account()
        self._nodes = {device: node for node, device in enumerate(devices)}

    def run(self) -> None:
        """Carry frames until the control socket closes."""
        network, control, held = self.network, self.control.fileno(), self.network.held
        while True:
            self._deliver()
            reading = [device for node, device in enumerate(self.devices) if held[node] < PATIENCE]
            wait = network.next_time() - LEAD - time.monotonic()
            # select's timeout is in microseconds; poll's and epoll's are in milliseconds.
            ready, _, _ = select.select([control, *reading], (), (), min(max(wait, 0.0), 3600.0))
            for descriptor in ready:
                if descriptor != control:
                    self._read(descriptor)
                elif not self._answer():
                    return

    def _deliver(self) -> None:
        account = self.account
        for due, frame in self.network.advance(time.monotonic() + LEAD):
            try:
                os.write(self.devices[frame.target], frame.data)
            except OSError:
                account.dropped += 1
                continue
            late = max(time.monotonic() - due, 0.0)
            account.frames += 1
            account.late += late
            account.latest = max(account.latest, late)

    def _read(self, device: int) -> None:
        source = self._nodes[device]
        for _ in range(BATCH):
            try:
                data = os.read(device, LARGEST)
            except BlockingIOError:
                return
            target = data[19] - 1  # the last byte of the packet's destination
            if data[0] >> 4 == 4 and data[16:19] == SUBNET and 0 <= target < len(self.devices):
                self.network.enter(Frame(data, source, target), time.monotonic())
            else:
                self.account.dropped += 1

    def _answer(self) -> bool:
        if not self.control.recv(1):
            return False
        self.control.send(self.account.as_json())
        return True


def _be_prompt() -> None:
    """Run before every other process: ranks compute on all cores, and a frame must not wait for a time slice."""
    gc.disable()  # there are no cycles here, and a collection would be a pause
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except OSError:
        with contextlib.suppress(OSError):
            os.nice(-20)


def main(words: list[str]) -> NoReturn:
    """The switch, as its owner starts it: the control socket, the devices, and the links as JSON."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the owner's affair, who then closes the socket
    control, devices, links = json.loads(words[0])
    _be_prompt()
    with socket.socket(fileno=control) as asked:
        Switch(devices, Network([Link(*link) for link in links]), asked).run()
    sys.exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
