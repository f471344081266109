"""The one measuring tool: variants of the same work, run interleaved, and compared by their medians.

Machines drift: clocks change, neighbours come and go. So variants are never timed one after the other. Every round
calls each of them once, the next round begins with another one, and a ratio comes with an interval from its rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch

WARM_UPS = 3
PATIENCE = 3.0
"""Seconds beyond those asked for, that the least number of rounds may take."""

RESAMPLES = 400
"""Bootstrap resamples behind an interval: its ends move by less than the interval is wide."""


def nothing() -> None:
    """What a variant does between its calls when they use nothing up."""


@dataclass(frozen=True)
class Variant:
    """One way to do the work."""

    call: Callable[[], Any]
    restore: Callable[[], Any] = nothing  # puts back what a call used up; runs before every timed call, untimed
    capturable: bool = True  # whether a CUDA graph may record it


class Timer(Protocol):
    """Something that runs a variant and says how long one call took."""

    def seconds(self, variant: Variant) -> float:
        """Restore and call the variant; the seconds of one call."""


@dataclass(frozen=True)
class HostTimer:
    """Time by the host's clock: on a CPU what a call costs; on a GPU what a launch costs, or a batch to its end.

    `before` runs before the clock starts and `after` before it stops: a device's synchronisation, or nothing.
    """

    clock: Callable[[], float] = time.perf_counter
    calls: int = 1
    before: Callable[[], object] = nothing
    after: Callable[[], object] = nothing

    def seconds(self, variant: Variant) -> float:
        """The mean of `calls` calls, one behind the other."""
        variant.restore()
        self.before()
        start = self.clock()
        for _ in range(self.calls):
            variant.call()
        self.after()
        return (self.clock() - start) / self.calls


@dataclass
class DeviceTimer:
    """Time by a CUDA device's own events, so that what the host needs for a launch stays out.

    Before the events a kernel only waits, for longer than the host needs to queue the call: the device finds the
    whole call queued when it gets there. Nothing between the events waits for the host.
    """

    device: torch.device
    calls: int = 1  # how many calls one variant.call() stands for
    flush: bool = True  # empty the L2 first, or inputs that fit in it are read from there
    # Weak: a variant holds its buffers, and gigabytes of them must go when its case is over.
    _queueing: MutableMapping[Variant, float] = field(default_factory=WeakKeyDictionary)

    LONGEST_WAIT = 0.05
    """Seconds: a call that takes longer to queue (it compiles, it waits) is not worth idling for."""

    def __post_init__(self) -> None:
        with torch.cuda.device(self.device):
            event: Callable[..., Any] = torch.cuda.Event  # whose constructor has no types
            self._start, self._stop = event(enable_timing=True), event(enable_timing=True)
            # Written, not only read: the L2 is left full of lines that must go to memory, as in a running model. A
            # clean L2 would take in as many bytes of the first kernel for nothing.
            size = 4 * torch.cuda.get_device_properties(self.device).L2_cache_size if self.flush else 0
            self._other = torch.randint(256, (size,), dtype=torch.uint8, device=self.device)

    def seconds(self, variant: Variant) -> float:
        """Device time of one call."""
        with torch.cuda.device(self.device):
            variant.restore()
            if self.flush:
                self._other.bitwise_not_()
            wait = min(1.5 * self._queueing.get(variant, 0.0) + 20e-6, self.LONGEST_WAIT)
            torch.cuda._sleep(int(wait * 2e9))  # type: ignore[no-untyped-call]  # in cycles, of at most 2 GHz
            self._start.record()
            begun = time.perf_counter()
            variant.call()
            self._queueing[variant] = time.perf_counter() - begun
            self._stop.record()
            self._stop.synchronize()
            milliseconds: float = self._start.elapsed_time(self._stop)
            return milliseconds * 1e-3 / self.calls


def captured(variant: Variant, calls: int, device: torch.device) -> Variant:
    """`calls` calls of a variant as one CUDA graph: on the device they follow each other without the host.

    The calls before the capture compile kernels, fill tables and load libraries, on the stream that will be captured.
    """
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):  # restored if a capture fails
        side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                variant.call()
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            for _ in range(calls):
                variant.call()
    return Variant(graph.replay, variant.restore)


def order(names: Sequence[str], turn: int) -> list[str]:
    """The names, begun with another one each turn: whatever a place in the round costs, all pay it as often."""
    first = turn % len(names)
    return [*names[first:], *names[:first]]


def quantile(seconds: Sequence[float], share: float) -> float:
    """The value that `share` of the samples do not exceed, interpolated; 0.5 gives the median."""
    return torch.tensor(seconds, dtype=torch.float64).quantile(share).item()


@dataclass(frozen=True)
class Spread:
    """How long one variant took, in seconds."""

    median: float
    p10: float
    p20: float
    p80: float
    p90: float
    rounds: int


@dataclass(frozen=True)
class Ratio:
    """How many times as long one variant took as another, by medians, and an interval that holds it 19 times of 20."""

    value: float
    low: float
    high: float

    def told(self, digits: int = 2) -> str:
        """With its interval; one that holds 1, and whose ends differ by a factor of two, tells nothing."""
        said = f"{self.value:.{digits}f} ({self.low:.{digits}f}-{self.high:.{digits}f})"
        return f"{said} tells nothing" if self.low < 1 < self.high and self.high > 2 * self.low else said


@dataclass(frozen=True)
class Samples:
    """Seconds of every variant in every round; the rounds of all are the same ones."""

    seconds: Mapping[str, Sequence[float]]

    def spread(self, name: str) -> Spread:
        """Median and quantiles of one variant."""
        samples = self.seconds[name]
        median, p10, p20, p80, p90 = (quantile(samples, share) for share in (0.5, 0.1, 0.2, 0.8, 0.9))
        return Spread(median, p10, p20, p80, p90, len(samples))

    def ratio(self, name: str, base: str) -> Ratio:
        """Time of `name` over time of `base`.

        The interval is a bootstrap over rounds: both sides of a resampled ratio come from the same rounds, so what
        slowed a whole round down cancels.
        """
        pair = torch.tensor([self.seconds[name], self.seconds[base]], dtype=torch.float64)
        middle = pair.quantile(0.5, dim=1)
        rounds = pair.shape[1]
        # Seeded here: the same samples always have the same interval.
        picks = torch.randint(rounds, (RESAMPLES, rounds), generator=torch.Generator().manual_seed(0))
        medians = pair[:, picks].quantile(0.5, dim=2)
        low, high = (medians[0] / medians[1]).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        return Ratio((middle[0] / middle[1]).item(), low, high)

    def fastest(self, names: Sequence[str]) -> str:
        """The name with the smallest median."""
        return min(names, key=lambda name: quantile(self.seconds[name], 0.5))


def measure(
    variants: Mapping[str, Variant],
    timer: Timer,
    seconds: float,
    *,
    rounds: tuple[int, int] = (7, 200),
    warm_ups: int = WARM_UPS,
    clock: Callable[[], float] = time.perf_counter,
) -> Samples:
    """Time the variants round by round until `seconds` have passed, at least `rounds[0]` and at most `rounds[1]`.

    Where even the least number would take PATIENCE longer than that, three rounds must do.
    """
    names = list(variants)
    for variant in variants.values():
        for _ in range(warm_ups):
            timer.seconds(variant)
    samples: dict[str, list[float]] = {name: [] for name in names}
    least, most = rounds
    begun = clock()
    turn = 0
    while turn < most:
        passed = clock() - begun
        if (turn >= least and passed >= seconds) or (turn >= 3 and passed >= seconds + PATIENCE):
            break
        for name in order(names, turn):
            samples[name].append(timer.seconds(variants[name]))
        turn += 1
    return Samples(samples)
