"""The learning rate of each step: a pure function, so that a resumed run needs nothing but its step."""

from __future__ import annotations

import math

from mics_models.training.settings import ScheduleSettings


def rate(step: int, schedule: ScheduleSettings) -> float:
    """The share of the full learning rate that step number `step` takes.

    It rises linearly in the warm-up, and ends at `last`: along a cosine, or with "wsd" after it has stayed at 1.
    """
    warmup = max(1, round(schedule.warmup * schedule.steps))
    if step < warmup:
        return (step + 1) / warmup
    falling = schedule.steps - warmup
    if schedule.kind == "wsd":
        falling = min(falling, max(1, round(schedule.decay * schedule.steps)))
    done = (step - (schedule.steps - falling)) / max(1, falling)
    if done <= 0:
        return 1.0
    shape = 1 - done if schedule.kind == "wsd" else (1 + math.cos(math.pi * min(done, 1.0))) / 2
    return schedule.last + (1 - schedule.last) * max(0.0, shape)
