"""Start ranks from one process, forked once it has imported torch and all else that they need.

    python -m bench.ranks [--ranks 2] [--namespaces 5,7,9 --address 10.77.0.1 --port 29500] MODULE ARGUMENTS...

Each rank calls the module's `main` with the arguments, in torchrun's environment. When one fails the others are ended,
and the status is its own. With namespaces, open files of a Cluster's, every one is a node and has so many ranks.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from bench.cluster.namespaces import die_with_parent, enter

ROOT = Path(__file__).parents[1]

RESULT = "RESULT "
"""What the line begins with in which rank 0 says what it found."""


def report(found: Any) -> None:
    """Say, as rank 0, what was found."""
    sys.stdout.write(f"\n{RESULT}{json.dumps(found)}\n")  # in one go: other ranks print to the same file
    sys.stdout.flush()


def result(outputs: Sequence[str]) -> Any:
    """What rank 0 reported, among all that was printed."""
    (line,) = [line for text in outputs for line in text.splitlines() if line.startswith(RESULT)]
    return json.loads(line.removeprefix(RESULT))


def run(ranks: int, module: Sequence[str], timeout: float) -> Any:
    """Run a module with its arguments as ranks of this machine; what rank 0 reported.

    RuntimeError if a rank fails, TimeoutError if they take longer than `timeout` seconds; none runs on after either.
    """
    command = [sys.executable, "-m", "bench.ranks", "--ranks", str(ranks), "--port", str(free_port()), *module]
    # A group of its own, so that all of it can be ended.
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True) as running:
        try:
            output, _ = running.communicate(timeout=timeout)
        except BaseException as error:
            os.killpg(running.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise TimeoutError(f"ranks: {module[0]} took longer than {timeout:.0f} s: give it less to do") from None
            raise
    if running.returncode:
        raise RuntimeError(f"ranks: {module[0]} ended with status {running.returncode}, expected 0: see above")
    return result([output])


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def fork(ranks: int, namespaces: Sequence[int], work: Callable[[], object]) -> list[int]:
    """Fork processes that do the work and end, so many in each node; their ids."""
    gc.collect()
    gc.freeze()  # or each rank's collector would touch, and so copy, the memory that they share
    children = []
    for node, namespace in enumerate(namespaces or [None]):
        for local in range(ranks):
            child = os.fork()
            if child == 0:
                rank = node * ranks + local
                os.environ |= {"LOCAL_RANK": str(local), "RANK": str(rank), "GROUP_RANK": str(node)}
                _work_and_end(namespace, work)
            children.append(child)
    return children


def _work_and_end(namespace: int | None, work: Callable[[], object]) -> NoReturn:
    """Without the interpreter's clearing up, which would copy all that is shared: two seconds of a core each."""
    status = 1
    try:
        _end_with_parent()
        if namespace is not None:
            enter(namespace)
        work()
        status = 0
    except BaseException:  # the traceback is all that it leaves
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def _end_with_parent() -> None:
    if sys.platform == "linux":  # elsewhere a parent that is killed leaves its ranks to their timeouts
        die_with_parent()


def wait(children: Sequence[int]) -> int:
    """Wait for all, or end them once one has failed; the status of the first that did."""
    left, failed = set(children), 0
    while left:
        child, status = os.wait()
        left.discard(child)
        if failed == 0 and status:
            code = os.waitstatus_to_exitcode(status)
            failed = code if code > 0 else 128 - code
            for other in left:
                os.kill(other, signal.SIGKILL)
    return failed


def main(arguments: Sequence[str]) -> int:
    """Import, fork, wait."""
    parser = argparse.ArgumentParser(prog="python -m bench.ranks", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--ranks", type=int, default=1, help="of a node; default 1")
    parser.add_argument("--namespaces", default="", help="the nodes' open files, with commas; default: this machine")
    parser.add_argument("--address", default="127.0.0.1", help="of the first node")
    parser.add_argument("--port", type=int, default=29500, help="of the first node")
    parser.add_argument("module", help="one with a function main(words)")
    parser.add_argument("words", nargs=argparse.REMAINDER, help="its argument")
    options = parser.parse_args(arguments)
    namespaces = [int(number) for number in options.namespaces.split(",") if number]
    os.environ |= {
        "MASTER_ADDR": options.address,
        "MASTER_PORT": str(options.port),
        "WORLD_SIZE": str(options.ranks * max(1, len(namespaces))),
        "LOCAL_WORLD_SIZE": str(options.ranks),
    }
    _end_with_parent()
    work = importlib.import_module(options.module)
    return wait(fork(options.ranks, namespaces, lambda: work.main(options.words)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
