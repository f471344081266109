"""Runs kernel cases on a device: check that all results are equal, look at the times from every side, judge.

On a GPU a case has four views: `device`, one call by CUDA events with the L2 emptied; `graph`, calls replayed as a
CUDA graph, without the host; `batch`, calls queued one behind the other, to the end of the last; and `launch`, how
long the host is busy with one. On a CPU there is one: `call`.
"""

from __future__ import annotations

import gc
import math
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from bench.harness import DeviceTimer, HostTimer, Ratio, Samples, Spread, Timer, Variant, captured, measure
from bench.kernel_cases import MB, Case, size_text
from bench.work import check

OURS, COPY = "mics", "copy"

BATCHED_BELOW = 32 * MB
"""Flat buffers smaller than this are seen in batches and graphs, too: there launches cost as much as the bytes."""

CALLS = 20
"""Calls in a batch or a graph."""

COPY_SHARES = {"pack": 0.92, "unpack": 0.92, "accumulate": 0.92, "square_sum": 0.92, "adamw": 0.88}
"""Goals on an H100 or H200, for flat buffers of 64 MB and more."""

SPEEDUPS = {"adamw": 1.5}
"""Goals on an H100 or H200 against the fastest idiom, likewise."""

NOISE = 0.02
"""Slower by less than this is not called slower; `ceiling.again` in every record shows how noisy its run was."""


@dataclass(frozen=True)
class View:
    """One way to look at a case: everybody's times, and ours against the fastest idiom's."""

    times: Mapping[str, Spread]
    idiom: str
    speedup: Ratio


UNKNOWN = Ratio(math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class Outcome:
    """What came of a case."""

    op: str
    scene: str
    size: int
    bytes: int = 0
    gb_per_s: float = math.nan
    of_copy: Ratio = UNKNOWN  # share of the bandwidth of a copy in the same rounds
    views: Mapping[str, View] = field(default_factory=dict)
    unable: Mapping[str, str] = field(default_factory=dict)  # idioms and graphs that cannot run here, and why
    missed: Sequence[str] = ()  # goals
    error: str = ""

    @property
    def name(self) -> str:
        """What tables call it."""
        return f"{self.op} {self.scene} {size_text(self.size)}"


def gpu_timers(device: torch.device) -> dict[str, Timer]:
    """A timer for each view of a case on a GPU."""
    wait = partial(torch.cuda.synchronize, device)
    return {
        "device": DeviceTimer(device),
        "launch": HostTimer(before=wait),
        "batch": HostTimer(calls=CALLS, before=wait, after=wait),
        "graph": DeviceTimer(device, calls=CALLS, flush=False),
    }


class Bench:
    """A device, with what timing on it needs: made once, used by every case."""

    def __init__(self, device: torch.device, seconds: float, largest_copy: int = 0) -> None:
        self.device = device
        self.seconds = seconds  # for the rounds of one case
        self.gpu = device.type == "cuda"
        self.hopper = self.gpu and any(name in torch.cuda.get_device_name(device) for name in ("H100", "H200"))
        bytes_each = largest_copy or (1024 if self.gpu else 128) * MB
        self._source = torch.randint(256, (bytes_each,), dtype=torch.uint8, device=device)
        self._target = torch.empty_like(self._source)
        self.timers: Mapping[str, Timer] = gpu_timers(device) if self.gpu else {"call": HostTimer()}

    @property
    def main_view(self) -> str:
        """The view that bandwidths are read from."""
        return next(iter(self.timers))

    def copy(self, moved: int) -> tuple[Variant, int]:
        """A copy that moves `moved` bytes, read and written together, or as many as there is room for."""
        half = min(max(1, moved // 2), self._source.numel())
        return Variant(partial(self._target[:half].copy_, self._source[:half])), 2 * half

    def ceiling(self) -> dict[str, Any]:
        """The bandwidth of a large copy, measured twice at once: how far the two lie apart is the noise of this run."""
        copy, moved = self.copy(2 * self._source.numel())
        twice = {COPY: copy, "again": Variant(copy.call)}
        samples = measure(twice, self.timers[self.main_view], self.seconds)
        speed = moved / samples.spread(COPY).median / 1e9
        return {"bytes": moved, "gb_per_s": speed, "again": samples.ratio("again", COPY)}

    def run(self, case: Case) -> Outcome:
        """Check that everybody's results are equal, then time; an error becomes part of the outcome."""
        blank = Outcome(case.line.op, case.line.scene, case.size)
        try:
            outcome = self._judged(case, self._run(case, blank))
        except Exception as error:  # whatever one case does, the others are still worth having
            summary, trace = f"{type(error).__name__}: {error}"[:2000], traceback.format_exc()[-4000:]
            outcome = replace(blank, error=f"{summary}\n{trace}")
        gc.collect()  # here, and not in the middle of a measurement or of a capture
        if self.gpu and self.alive():
            torch.cuda.empty_cache()
        return outcome

    def alive(self) -> bool:
        """Whether the device still computes: after some errors no later call in this process succeeds."""
        try:
            return torch.ones(1, device=self.device).item() == 1
        except RuntimeError:
            return False

    def _run(self, case: Case, blank: Outcome) -> Outcome:
        work = case.build(self.device)
        unable = check(work)
        copy, copied = self.copy(work.bytes)
        able = {name: idiom for name, idiom in work.idioms.items() if name not in unable}
        everybody: dict[str, Variant] = {OURS: work.ours, **able}
        views, samples = {}, self._measure(self.main_view, everybody | {COPY: copy})
        views[self.main_view] = _view(samples)
        if self.gpu:
            views["launch"] = _view(self._measure("launch", everybody, 0.2))
        if self.gpu and case.size < BATCHED_BELOW:
            views["batch"] = _view(self._measure("batch", everybody, 0.5))
            graphs = self._captured(everybody, unable)
            if OURS in graphs and len(graphs) > 1:
                views["graph"] = _view(self._measure("graph", graphs, 0.5))
        share = samples.ratio(COPY, OURS)
        part = work.bytes / copied  # 1 but for the largest, whose copy has no room
        return replace(
            blank,
            bytes=work.bytes,
            gb_per_s=work.bytes / samples.spread(OURS).median / 1e9,
            of_copy=Ratio(share.value * part, share.low * part, share.high * part),
            views=views,
            unable=unable,
        )

    def _measure(self, view: str, variants: Mapping[str, Variant], share: float = 1.0) -> Samples:
        return measure(variants, self.timers[view], share * self.seconds)

    def _captured(self, variants: Mapping[str, Variant], unable: dict[str, str]) -> dict[str, Variant]:
        graphs = {}
        for name, variant in variants.items():
            if variant.capturable:
                try:
                    graphs[name] = captured(variant, CALLS, self.device)
                except RuntimeError as error:
                    unable[f"{name} in a graph"] = str(error)[:1000]
        return graphs

    def _judged(self, case: Case, outcome: Outcome) -> Outcome:
        missed = [f"{name}: {why}" for name, why in outcome.unable.items() if name == f"{OURS} in a graph"]
        for name, view in outcome.views.items():
            slower = view.speedup.value < 1 - NOISE and view.speedup.high < 1
            if slower and name != "launch":
                missed.append(f"{name}: {1 / view.speedup.value:.2f}x the time of {view.idiom}")
        if self.hopper and case.line.roofline and case.size >= 64 * MB:
            wanted = COPY_SHARES.get(case.line.op, 0.0)
            if outcome.of_copy.value < wanted:
                missed.append(f"{outcome.of_copy.value:.2f} of a copy's bandwidth, not {wanted}")
            wanted, main = SPEEDUPS.get(case.line.op, 0.0), outcome.views[self.main_view]
            if main.speedup.value < wanted:
                missed.append(f"{main.speedup.value:.2f}x as fast as {main.idiom}, not {wanted}x")
        return replace(outcome, missed=missed)


def _view(samples: Samples) -> View:
    idiom = samples.fastest([name for name in samples.seconds if name not in (OURS, COPY)])
    return View(
        {name: samples.spread(name) for name in samples.seconds},
        idiom,
        samples.ratio(idiom, OURS),
    )


def run_all(
    bench: Bench, chosen: Iterable[Case], report: Callable[[Outcome], object], deadline: float = math.inf
) -> list[str]:
    """Run the cases in their order and report each; return the names of those that time, or a dead GPU, left out."""
    dropped, dead = [], False
    for case in chosen:
        if dead or time.monotonic() > deadline:
            dropped.append(case.name)
            continue
        outcome = bench.run(case)
        dead = bool(outcome.error) and not bench.alive()
        report(outcome)
    return dropped
