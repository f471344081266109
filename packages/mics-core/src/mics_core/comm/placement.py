"""Where ranks are: on which node and GPU, with how much memory, and whether they share a GPU, which NCCL refuses."""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Sequence

import torch

from mics_core.errors import ConfigError


def place(device: torch.device) -> str:
    """The GPU as NCCL tells it from others, by host and number; "" on a CPU. Two ranks at one place share a GPU."""
    if device.type != "cuda":
        return ""
    host = os.environ.get("NCCL_HOSTID") or socket.gethostname()
    return f"{host}, GPU {torch.cuda.get_device_properties(device).uuid}"


def shared(places: Sequence[str], ranks: Sequence[int]) -> bool:
    """Whether ranks share GPUs; raises a ConfigError where some do and others have one of their own, or none."""
    counts = Counter(places)
    if "" in counts and len(counts) > 1:
        without, having = places.index(""), next(number for number, at in enumerate(places) if at)
        raise ConfigError(
            f"rank {ranks[without]} has no GPU and rank {ranks[having]} has one ({places[having]}): give every "
            'rank a GPU, or none by CUDA_VISIBLE_DEVICES=""'
        )
    fewest, most = min(counts.values()), max(counts.values())
    if places[0] and fewest < most and fewest == 1:
        alone = next(number for number, at in enumerate(places) if counts[at] == 1)
        one, other, *_ = (number for number, at in enumerate(places) if counts[at] > 1 and at == _fullest(counts))
        raise ConfigError(
            f"ranks {ranks[one]} and {ranks[other]} share a GPU ({places[one]}), and rank {ranks[alone]} has "
            f"one of its own ({places[alone]}): start as many ranks on every GPU, one for NCCL"
        )
    return bool(places[0]) and most > 1


def _fullest(counts: Counter[str]) -> str:
    ((at, _),) = counts.most_common(1)
    return at


def node_name() -> str:
    """What tells this rank's node from others: the host, and torchrun's number of the node on it."""
    return f"{socket.gethostname()}/{os.environ.get('GROUP_RANK', '0')}"


def ranks_per_node(names: Sequence[str], *, whole_world: bool) -> int:
    """How many ranks a node has: as torchrun says, else as the nodes' names tell."""
    if whole_world and "LOCAL_WORLD_SIZE" in os.environ:
        return min(int(os.environ["LOCAL_WORLD_SIZE"]), len(names))
    return len(names) // len(set(names))


def rank_memory(device: torch.device, sharing: int) -> int:
    """A rank's bytes, where so many ranks share its GPU, or the machine whose CPUs they compute on."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // sharing
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // sharing


def check_placement(names: Sequence[str], per_node: int, ranks: Sequence[int]) -> None:
    """Raise if ranks that count as one node are on several."""
    for place, name in enumerate(names):
        first = place - place % per_node
        if names[first] != name:
            raise ConfigError(
                f"ranks {ranks[first]} to {ranks[first + per_node - 1]} should share a node of {per_node}, but rank "
                f"{ranks[first]} is on {names[first]} and rank {ranks[place]} on {name}: number the ranks node by "
                "node, as torchrun does"
            )
