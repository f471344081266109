"""Run a program in a node: `python -m bench.cluster.node OWNER NAMESPACE PROGRAM ARGUMENTS...`.

Two processes stand between the owner and the program. The outer one moves into the node and dies with the owner. The
inner one dies with the outer one, and is the first process of a numbering of its own: whatever the program started,
in whatever session, the kernel ends with it. So a node has its own process ids, as a real one has.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import NoReturn

from bench.cluster.namespaces import die_with_parent, enter, mount_proc, own_processes


def main(words: list[str]) -> NoReturn:
    """Be the outer process, then the inner one."""
    owner, namespace, program = int(words[0]), int(words[1]), words[2:]
    die_with_parent()
    if os.getppid() != owner:  # who died before the kernel knew what that means
        sys.exit(1)
    enter(namespace)
    os.close(namespace)
    own_processes()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # until there is an inner process to end
    inner = os.fork()
    if inner == 0:
        die_with_parent()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        mount_proc()
        os._exit(_run(program))
    signal.signal(signal.SIGTERM, lambda *_: os.kill(inner, signal.SIGKILL))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    _, status = os.waitpid(inner, 0)  # returns when all processes of the node's program are gone
    sys.exit(_code(status))


def _run(program: list[str]) -> int:
    try:
        running = subprocess.Popen(program)
    except OSError as error:
        print(f"cannot run {program[0]}: {error}", file=sys.stderr, flush=True)
        return 127
    while True:  # orphans become children of the first process, which has to bury them
        process, status = os.wait()
        if process == running.pid:
            return _code(status)


def _code(status: int) -> int:
    """An exit status as a shell would give it."""
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    main(sys.argv[1:])
