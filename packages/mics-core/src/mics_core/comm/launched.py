"""What a rank asks of the system when it starts: an end with its launcher, and as many files as its world takes."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys

import torch.distributed as dist

_PR_SET_PDEATHSIG = 1
_OTHERS = 32  # files beside the connections, of six groups and a launcher's store


def end_with_the_launcher() -> None:
    """Let the kernel kill this rank when torchrun is gone, on Linux.

    Else it would train and save on beside the ranks of a second start. Nothing milder will do: a rank that saves first
    is beside them meanwhile, one that hangs stays, and the checkpoints that it has are whole at any moment. Without
    torchrun the parent may be anybody, such as a shell script that is done, so nothing is asked.
    """
    if sys.platform == "linux" and "RANK" in os.environ and dist.is_torchelastic_launched():
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def make_room_for_connections(rank: int, world: int) -> str:
    """Raise the limit of open files to what a world of this size takes; if that is not allowed, a sentence, else "".

    All ranks are in three groups, each of which has a connection to every other rank: torch's, that of questions and
    that of saves. Those of a ladder's rungs are smaller, one of a rank on each node the largest.
    """
    nodes = world // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    keeps_store = rank == 0 and not dist.is_torchelastic_launched()  # else the launcher does
    needed = len(os.listdir("/dev/fd")) + (3 + keeps_store) * world + nodes + _OTHERS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        return (
            f"init: rank {rank} may open {hard} files, expected {needed} or more for its connections to {world} ranks: "
            f"raise the limit of whoever starts it until `ulimit -Hn` tells {needed} or more"
        )
    if soft != resource.RLIM_INFINITY and soft < needed:
        wanted = needed + soft  # what the program had for its own files stays
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard)
        )
    return ""
