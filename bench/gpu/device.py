"""What a GPU, its driver and torch do, whatever the runtime asks of them: questions that probes.py asks."""

from __future__ import annotations

import gc
import os
import platform
import threading
import time
from functools import partial

import torch

from bench.gpu.stand import Stand
from mics_core.comm.staged import CudaDriver


def versions(here: Stand) -> dict[str, object]:
    """What runs here."""
    import triton  # type: ignore[import-untyped]

    found: dict[str, object] = {"torch": torch.__version__, "triton": triton.__version__, "kernel": platform.release()}
    if not here.pretends:
        about = torch.cuda.get_device_properties(here.device)
        found |= {"gpu": about.name, "uuid": str(about.uuid), "memory": about.total_memory, "L2": about.L2_cache_size}
        found |= {"nccl": torch.cuda.nccl.version(), "cuda": torch.version.cuda, "gpus": torch.cuda.device_count()}
    return found


def streams_that_wait_for_numbers(here: Stand) -> dict[str, object]:
    """What ranks that share a GPU rest on: a stream waits for a number of the host's, and only that stream does."""
    if here.pretends:
        return {}
    driver = CudaDriver(here.device)
    left, over = driver.pinned(1, torch.int32), driver.pinned(1, torch.int32)
    source, pinned = torch.arange(1 << 20, device=here.device), driver.pinned(8 << 20, torch.uint8).view(torch.int64)
    target, waiting, free = torch.zeros_like(source), here.stream(), here.stream()
    here.complete()
    with here.on(waiting):
        driver.copy(pinned, source)
        driver.write(left, 7)
        driver.wait(over, 7)
        driver.copy(target, pinned)
    deadline = time.monotonic() + 5
    while left.item() < 7 and time.monotonic() < deadline:
        time.sleep(1e-4)
    arrived = left.item() == 7 and bool((pinned == torch.arange(1 << 20)).all())
    with here.on(free):
        other = torch.ones(1, device=here.device) + 1
    free.synchronize()
    early = not waiting.query()
    pinned.mul_(2)
    over.fill_(7)
    begun = time.perf_counter()
    while not waiting.query() and time.perf_counter() - begun < 5:  # synchronize might never end
        time.sleep(1e-6)
    took = time.perf_counter() - begun
    if not waiting.query():
        raise AssertionError("the stream did not see the host's number in 5 s, and holds up all that comes next")
    found: dict[str, object] = {
        "the host saw the number, and all that was copied before it": arrived,
        "another stream went on meanwhile": other.item() == 2,
        "the stream waited": early,
        "it then took what the host had written": bool((target == 2 * source).all()),
        "microseconds from the host's number to the end": took * 1e6,
    }
    if False in found.values():
        raise AssertionError(str(found))
    return found


def what_waits_for_all_streams(here: Stand) -> dict[str, float]:
    """Seconds of calls while a stream waits for a number that comes after half a second: which of them wait, too."""
    if here.pretends:
        return {}
    driver = CudaDriver(here.device)
    calls = {
        "pinned memory": lambda: torch.empty(123 << 20, dtype=torch.uint8, pin_memory=True),
        "new memory of the device": lambda: torch.empty(1 << 30, dtype=torch.uint8, device=here.device),
        "memory given back to the device": torch.cuda.empty_cache,
    }
    found = {}
    for name, call in calls.items():
        number, stream = driver.pinned(1, torch.int32), here.stream()
        here.complete()
        with here.on(stream):
            driver.wait(number, 1)
        threading.Timer(0.5, partial(number.fill_, 1)).start()
        here.write(f"begins: {name}", "")  # the process may hang in it
        begun = time.perf_counter()
        call()
        found[name] = time.perf_counter() - begun
        stream.synchronize()
    return found


def workspaces_of_cublas(here: Stand) -> float:
    """MiB that a first product with its backward leaves in use."""
    gc.collect()
    before, _ = here.memory()
    a = torch.ones(64, 64, device=here.device, requires_grad=True)
    (a @ a).sum().backward()  # type: ignore[no-untyped-call]
    here.complete()
    del a
    gc.collect()
    return (here.memory()[0] - before) / 2**20


def pinned_memory_is_rounded_up(here: Stand) -> dict[str, float]:
    """GiB asked for, and resident."""

    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    kept = torch.ones(here.small(1181116006, 1 << 20), dtype=torch.uint8, pin_memory=not here.pretends)
    return {"asked": kept.numel() / 2**30, "resident": (resident() - before) / 2**30}


def priorities(here: Stand) -> dict[str, float]:
    """Milliseconds until a small kernel ends that was asked for while products of 8192 rows run, by priority."""
    if here.pretends:
        return {}
    a = torch.randn(8192, 8192, device=here.device, dtype=torch.bfloat16)
    small = torch.ones(1 << 16, device=here.device)
    out = torch.empty_like(a)
    torch.mm(a, a, out=out)
    found = {}
    for name, priority in {"urgent": -1, "usual": 0}.items():
        stream = here.stream(priority)
        with here.on(stream):
            small.add_(1)
        here.complete()
        took = []
        for _ in range(20):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            for _ in range(4):
                torch.mm(a, a, out=out)
            with torch.cuda.stream(stream):
                here.sleep(1e-3)  # the products are under way
                begin.record()
                small.add_(1)
                end.record()
            here.complete()
            took.append(begin.elapsed_time(end))
        found[name] = sorted(took)[len(took) // 2]
    return found
