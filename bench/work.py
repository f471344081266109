"""What a kernel benchmark times: one piece of work, and everybody's way to do it; and the check that all agree."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.harness import Variant

Tensors = Sequence[torch.Tensor]
BF16, FP32, INT8 = torch.bfloat16, torch.float32, torch.int8


@dataclass(frozen=True)
class Candidate(Variant):
    """A variant, and which tensors of its doing must equal the others'; `results` receives what `call` returned."""

    results: Callable[[Any], Tensors] = lambda returned: returned


@dataclass(frozen=True)
class Work:
    """One case's buffers, and everybody's way to do its work on them. What nobody writes to is shared."""

    bytes: int  # the fewest that must be read and written
    ours: Candidate
    idioms: Mapping[str, Candidate]
    tolerance: float = 0.0  # of float32 results; bf16 and integers then may be one step apart


class WrongResult(AssertionError):
    """Ours and an idiom disagree: nobody's time means anything then."""


def check(work: Work) -> dict[str, str]:
    """Call everybody once and compare; the idioms that cannot run here, and why. For fresh work only."""
    expected = [tensor.clone() for tensor in work.ours.results(work.ours.call())]
    unable = {}
    for name, idiom in work.idioms.items():
        try:
            got = idiom.results(idiom.call())
        except (NotImplementedError, RuntimeError, TypeError) as error:
            unable[name] = f"{type(error).__name__}: {error}"
            continue
        for number, (mine, theirs) in enumerate(zip(expected, got, strict=True)):
            try:
                _compare(mine, theirs, work.tolerance)
            except AssertionError as error:
                raise WrongResult(f"result {number} is not what {name} gives: {error}") from None
    if len(unable) == len(work.idioms):
        raise RuntimeError(f"no idiom runs here: {unable}")
    return unable


def _compare(mine: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    """Equal, or where rounding may differ, one step apart; a NaN is never equal, so that poison shows."""
    relative, absolute = tolerance, tolerance
    if tolerance and mine.dtype != FP32:  # a step of bf16; of fp8, whose largest is e4m3's; of int8
        relative, absolute = {BF16: (2.0**-7, 0.0), INT8: (0.0, 1.0)}.get(mine.dtype, (2.0**-3, 2.0**-9))
    if mine.dtype.itemsize == 1:
        mine, theirs = mine.to(FP32), theirs.to(FP32)
    torch.testing.assert_close(mine, theirs, rtol=relative, atol=absolute)
