"""What a rank asks of the system when it starts: as many files as its world takes."""

from __future__ import annotations

import os
import resource

import torch.distributed as dist

_OTHERS = 32  # files beside the connections, of six groups and a launcher's store


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
