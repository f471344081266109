"""The cheapest questions to a GPU, about what the runtime takes for granted and no CPU can tell.

    python -m bench.gpu.probes NOTES [--pretend]

About a minute, most of it Triton's compiler.
"""

from __future__ import annotations

import copy
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn

import mics_core as mics
from bench.gpu.device import (
    pinned_memory_is_rounded_up,
    priorities,
    streams_that_wait_for_numbers,
    versions,
    what_waits_for_all_streams,
    workspaces_of_cublas,
)
from bench.gpu.stand import Stand, arguments, ask, environment, pretended_ranks, stand
from mics_core.comm.groups import DeviceGroup, Membership
from mics_core.comm.lanes import StreamLane
from mics_core.fingerprint import fingerprint
from mics_core.lifecycle import Lifecycle
from mics_kernels import accumulate, adamw, pack, square_sum, tables


class Net(nn.Module):
    """A few blocks."""

    def __init__(self, width: int = 512, blocks: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width)) for _ in range(blocks))
        self.head = nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        loss: Tensor = self.head(x).float().square().mean()
        return loss


class Slow(torch.autograd.Function):
    """The backward begins with half a tenth of a second on its stream."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, here: Stand) -> Tensor:
        ctx.here = here  # type: ignore[attr-defined]
        return x.clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        ctx.here.sleep(0.05)  # type: ignore[attr-defined]
        return grad, None


def a_forward_on_another_stream_than_the_step(here: Stand) -> dict[str, float]:
    """How far weights are from plain PyTorch's; with two streams as with one, or gradients are read too early."""

    def train(side: object) -> float:
        whole = Net().to(here.device)
        model = mics.shard(copy.deepcopy(whole), mics.Sharding.ddp())
        pairs: list[tuple[nn.Module, torch.optim.Optimizer]] = [
            (whole, torch.optim.AdamW(whole.parameters(), lr=1e-2, eps=1e-4)),
            (model, mics.AdamW(model.parameters(), lr=1e-2, eps=1e-4)),
        ]
        for number in range(3):
            chance = torch.Generator(here.device).manual_seed(number)
            x = torch.randn(64, 512, device=here.device, generator=chance)
            for each, optimizer in pairs:
                with here.on(side):
                    loss = Slow.apply(each(x), here)  # type: ignore[no-untyped-call]
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        here.complete()
        with mics.full_params(model):
            apart = [(a - b).abs().max().item() for a, b in zip(model.parameters(), whole.parameters(), strict=True)]
        return max(apart)

    return {"one stream": train(None), "two streams": train(here.stream())}


def where_a_backward_ends(here: Stand) -> dict[str, int]:
    """How often on which thread and stream, of 300 times; wanted is always the user's stream."""
    side, seen = here.stream(), Counter[str]()
    end = Lifecycle._end_backward

    def ending(self: Lifecycle) -> None:
        thread = "main thread" if threading.current_thread() is threading.main_thread() else "autograd's thread"
        ours = side is None or torch.cuda.current_stream() == side
        seen[f"{thread}, {'the user' if ours else 'another'}'s stream"] += 1
        end(self)

    with patch.object(Lifecycle, "_end_backward", ending), here.on(side):
        model = mics.shard(Net().to(here.device), mics.Sharding.ddp())
        for _ in range(here.small(300, 3)):
            model(torch.ones(4, 512, device=here.device)).backward()
            model.zero_grad()
    here.complete()
    return dict(seen)


def memory_of_a_fingerprint(here: Stand) -> float:
    """How many times the tensor it needs for a moment."""
    x = torch.ones(here.small(1 << 28, 1 << 10), device=here.device)
    here.complete()
    here.forget_peak()
    held, _ = here.memory()
    fingerprint(x)
    return (here.peak() - held) / x.nbytes


def tables_and_memory_in_steady_steps(here: Stand) -> list[tuple[int, int, int]]:
    """Tables of addresses, bytes in use and bytes taken after each of 12 steps; all should stand still soon."""
    rows = []
    with pretended_ranks(8, 3):
        model = mics.shard(Net(256), mics.Sharding(2, 2, 8), ranks_per_node=2, precision=mics.Precision.bf16())
        optimizer = mics.AdamW(model.parameters())
        batches = list(torch.zeros(3, 8, 256, device=here.device))
        for _ in range(here.small(12, 2)):
            for batch in mics.accumulate(model, batches):
                model(batch).backward()
            mics.clip_grad_norm_(model, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            here.complete()
            rows.append((len(tables._SCRATCH), *here.memory()))
    return rows


def nccl_in_place_on_a_lane(here: Stand) -> dict[str, object]:
    """One rank: is an output inside the input accepted, on which stream are the kernels, and what does a group cost?"""
    if here.pretends:
        return {}
    names = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    with environment(**names, GLOO_SOCKET_IFNAME="lo", NCCL_SOCKET_IFNAME="lo"):
        device = mics.init()
        try:
            free = torch.cuda.mem_get_info()[0]
            group = DeviceGroup(Membership((0,), 0, "probe"), dist.new_group([0], backend="nccl"))
            lane = StreamLane(here.stream(-1), torch.cuda)
            buffer = torch.randn(1 << 20, device=device)
            want = buffer.clone()

            def job() -> None:
                group.all_gather(buffer, buffer)
                group.exchange(buffer)
                buffer.add_(0)  # a kernel that surely runs, to see the lane's stream

            lane.submit("probe", job).wait()
            torch.cuda.synchronize()
            with torch.profiler.profile() as seen:
                lane.submit("probe", job).wait()
                torch.cuda.synchronize()
            kernels = [
                (event.name()[:40], event.device_resource_id())
                for event in seen.profiler.kineto_results.events()  # type: ignore[union-attr]
                if "CUDA" in str(event.device_type())
            ]
            took = (free - torch.cuda.mem_get_info()[0]) / 2**20
            found = {"equal": buffer.equal(want), "MiB of the first group": took, "kernels and streams": kernels}
            if not found["equal"]:
                raise AssertionError(str(found))
            return found
        finally:
            dist.destroy_process_group()


def launches(here: Stand) -> dict[str, dict[str, float]]:
    """Microseconds of the host for a call on small buffers, and seconds of the first, which compiles."""
    flat = torch.empty(65_536, device=here.device)
    grads = [torch.randn(4096, device=here.device).bfloat16() for _ in range(12)]
    state = list(torch.zeros(4, 65_536, device=here.device).unbind())
    weights = flat.bfloat16()
    calls = {
        "pack": lambda: pack(grads, flat, [4096 * n for n in range(12)]),
        "accumulate": lambda: accumulate(flat, [weights], overwrite=True),
        "square_sum": lambda: square_sum(flat),
        "adamw": lambda: adamw(*state, weights, lr=1e-3, step=1),
    }
    found = {}
    for name, call in calls.items():
        first = here.seconds(call)
        rounds = here.small(500, 2)
        begun = time.perf_counter()
        for _ in range(rounds):
            call()
        found[name] = {"us": (time.perf_counter() - begun) / rounds * 1e6, "first": first}
        here.complete()
    return found


QUESTIONS = (
    versions,
    workspaces_of_cublas,
    a_forward_on_another_stream_than_the_step,
    where_a_backward_ends,
    tables_and_memory_in_steady_steps,
    nccl_in_place_on_a_lane,
    priorities,
    memory_of_a_fingerprint,
    pinned_memory_is_rounded_up,
    launches,
    streams_that_wait_for_numbers,  # a stream that never sees the number holds up all that comes after
    what_waits_for_all_streams,  # last: one that waits with Python's lock waits for ever
)


def main(words: Sequence[str] | None = None) -> int:
    """Ask all."""
    return 0 if ask(stand(arguments(__doc__).parse_args(words)), QUESTIONS) else 1


if __name__ == "__main__":
    sys.exit(main())
