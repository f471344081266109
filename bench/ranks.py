"""Ranks of this machine, which torchrun starts, and what their rank 0 reports to whoever started them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from bench.record import ROOT

RESULT = "RESULT "
"""What the line begins with in which rank 0 says what it found."""


def report(found: Any) -> None:
    """Say, as rank 0, what was found."""
    sys.stdout.write(f"\n{RESULT}{json.dumps(found)}\n")  # in one go: other ranks print to the same file
    sys.stdout.flush()


def result(outputs: Sequence[str]) -> Any:
    """What rank 0 reported, among all that was printed; RuntimeError if it reported nothing."""
    lines = [line for text in outputs for line in text.splitlines() if line.startswith(RESULT)]
    if len(lines) != 1:
        raise RuntimeError(f"ranks: {len(lines)} lines begin with {RESULT}, expected one: let rank 0 call report once")
    return json.loads(lines[0].removeprefix(RESULT))


def run(ranks: int, module: Sequence[str], timeout: float) -> Any:
    """Run a module with its words under torchrun, as so many ranks; what rank 0 reported.

    What ranks print to stderr appears here. RuntimeError if one fails, TimeoutError if they take longer than `timeout`
    seconds; none runs on after either.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # where it is ignored, ranks would outlive this process
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    launch += ["--local-addr=127.0.0.1", "-m", *module]  # without a network a host's name may lead nowhere
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # of a rank: they share the cores
    if sys.platform == "linux":  # a machine without a network may know no address of its own name
        environment |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    with subprocess.Popen(launch, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as running:
        try:
            output, _ = running.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"ranks: {module[0]} took longer than {timeout:.0f} s: give it less to do") from None
        finally:
            running.terminate()  # torchrun ends its ranks then
            running.wait()
    if running.returncode:
        raise RuntimeError(f"ranks: {module[0]} ended with status {running.returncode}, expected 0: see above")
    return result([output])
