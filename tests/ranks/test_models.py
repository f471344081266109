"""Any model trains under any sharding as it does in one process."""

import math
from collections.abc import Callable, Iterator
from itertools import combinations
from typing import Any
from zlib import crc32

import pytest
import torch

import mics_core as mics
import model_work as work
from depth import is_deep
from pool import Pool

CHAIN = "units one after another"
COMPILED = ("units compiled in place after they were cut", "units wrapped by torch.compile")  # dynamo takes 8 s a case


def cases() -> Iterator[Any]:
    """Every kind of model, each under one way to train where parameters come and go and micro-steps are marked.

    Its name decides which, so that a new kind leaves the others where they are, unless it says so itself.
    """
    for name, case in work.CASES.items():
        marks = [pytest.mark.filterwarnings(f"ignore:{case.ignored}")] if case.ignored else []
        if name in COMPILED:
            marks.append(pytest.mark.deep)
        runs = [run for run in work.RUNS if run.loop in case.loops]
        if not is_deep():
            short = [run for run in runs if run.loop == "accumulate" and run.degrees[0] > 1] or runs
            chosen = [run for run in short if run.degrees == case.degrees]
            runs = chosen or [short[crc32(name.encode()) % len(short)]]
        yield pytest.param(name, runs, marks=marks, id=name)


@pytest.mark.parametrize(("name", "runs"), list(cases()))
def test_trains_as_in_one_process(pool: Pool, name: str, runs: list[work.Run]) -> None:
    pool.run(4, work.trains_as_one_process, name, runs, LOCAL_WORLD_SIZE=2)


def test_trains_in_every_way(pool: Pool) -> None:
    pool.run(4, work.trains_as_one_process, CHAIN, work.RUNS, LOCAL_WORLD_SIZE=2)


@pytest.mark.cpu_ranks  # GPUs draw other numbers, and worlds of all sizes are compared
def test_drawn_weights_are_the_same_for_every_sharding_and_number_of_ranks(pool: Pool) -> None:
    """On the meta device a model costs no memory; its units are drawn and cut one by one."""
    alone, _ = pool.run(1, work.draw, (1, 1, 1))[0]
    assert all(tensor.isfinite().all() for tensor in alone.values())
    matrices = [tensor for name, tensor in alone.items() if tensor.dim() == 2 and name != "blocks.3.weight"]  # tied
    assert not any(a.shape == b.shape and torch.equal(a, b) for a, b in combinations(matrices, 2)), "modules are alike"
    for degrees in ((2, 2, 2), (1, 1, 2), (2, 2, 4), (4, 4, 4)):
        for weights, largest in pool.run(degrees[2], work.draw, degrees, LOCAL_WORLD_SIZE=2):
            assert weights.keys() == alone.keys()
            for name, weight in weights.items():
                assert torch.equal(weight, alone[name]), f"{name} differs for {degrees}"
            assert largest <= 3 * work.WIDTH**2  # the root has two matrices, and a unit one


@pytest.mark.parametrize("degrees", [(1, 1, 1), (2, 2, 4)])
def test_ranks_with_different_weights_get_rank_0s(pool: Pool, degrees: tuple[int, int, int]) -> None:
    results = pool.run(4, work.shard_unequal, degrees, LOCAL_WORLD_SIZE=2)
    first, _ = results[0]
    for before, after in results:
        assert before is first or not torch.equal(before["own"], first["own"])
        for name, tensor in after.items():
            assert torch.equal(tensor, first[name]), name


PRECISIONS = {
    "bf16": (mics.Precision.bf16(), 5e-2),
    "bf16, float32 gradients": (mics.Precision.bf16(torch.float32), 5e-2),
    "fp16": (mics.Precision.fp16(), 1e-2),
    "fp16, float16 gradients": (mics.Precision.fp16(torch.float16), 1e-2),
    "bf16 gradients only": (mics.Precision(reduce=torch.bfloat16), 2e-2),
    "fp32": (mics.Precision.fp32(), 1e-5),
}


@pytest.mark.parametrize(
    ("name", "optimizer", "degrees"),
    [
        *((name, "mics.AdamW", (2, 2, 4)) for name in PRECISIONS),
        ("bf16", "torch.AdamW", (2, 2, 4)),
        ("fp16", "SGD", (2, 2, 4)),
        ("fp16, float16 gradients", "SGD", (4, 4, 4)),  # AdamW divides a wrong factor away
    ],
)
def test_precision(pool: Pool, name: str, optimizer: str, degrees: tuple[int, int, int]) -> None:
    """In so many steps of 1e-2 a weight moves up to 0.1; a half's rounding may decide about a tenth of it."""
    precision, tolerance = PRECISIONS[name]
    for losses, off in pool.run(4, work.train_in, precision, optimizer, 8, CHAIN, degrees, LOCAL_WORLD_SIZE=2):
        assert losses[-1] < 0.9 * losses[0]
        assert off <= tolerance


def test_float64_shows_that_only_rounding_differs(pool: Pool) -> None:
    assert max(pool.run(4, work.exact_in_float64, "torch.AdamW", LOCAL_WORLD_SIZE=2)) < 1e-12
    assert max(pool.run(4, work.exact_in_float64, "SGD", LOCAL_WORLD_SIZE=2)) < 1e-12


@pytest.mark.parametrize("optimizer", ["mics.AdamW", "torch.AdamW", "SGD"])
def test_an_overflow_on_one_rank_skips_the_step_on_all(pool: Pool, optimizer: str) -> None:
    for scales, moved, off in pool.run(4, work.overflow, optimizer, LOCAL_WORLD_SIZE=2):
        assert scales == [512.0, 256.0, 256.0, 512.0, 512.0, 1024.0, 1024.0]
        assert moved == 0
        assert off < 2e-3  # four steps of 1e-2; a step that was skipped must not count for AdamW's bias correction


WEIGHTS = sum(parameter.numel() for parameter in work.Fragile().parameters())


@pytest.mark.parametrize("degrees", [(2, 2, 4), *([(1, 1, 1), (4, 4, 4)] if is_deep() else [])], ids=str)
@pytest.mark.parametrize(
    ("precision", "bad", "optimizer", "clipped", "lost"),
    [
        ("fp32", torch.nan, "mics.AdamW", False, 1),
        ("fp32", torch.inf, "SGD", True, 1),  # all others are multiplied by 0
        ("bf16", torch.nan, "torch.AdamW", True, WEIGHTS),
        ("bf16", torch.nan, "mics.AdamW", True, WEIGHTS),
        ("fp16", torch.nan, "mics.AdamW", False, 0),
        ("fp16", torch.inf, "SGD", True, 0),
    ],
)
def test_what_is_not_finite_on_one_rank_is_so_on_all_and_a_loop_can_leave_the_step_out(
    pool: Pool, degrees: tuple[int, int, int], precision: str, bad: float, optimizer: str, clipped: bool, lost: int
) -> None:
    """Without a loss scale the step is taken, as in one process."""
    job = work.not_finite, degrees, precision, bad, optimizer, clipped
    for norm, gone, off in pool.run(4, *job, LOCAL_WORLD_SIZE=2):
        assert not math.isfinite(norm)
        assert gone == lost
        assert off == 0


def test_two_optimizers_of_one_model_change_the_loss_scale_once_a_step(pool: Pool) -> None:
    assert pool.run(2, work.two_optimizers_overflow) == [[512.0, 1024.0]] * 2


@pytest.mark.parametrize(
    ("case", "loss"),
    [
        (CHAIN, work.once),
        ("a model fed with its own output", work.chained),
    ],
)
def test_the_loss_scale_is_nowhere_to_be_seen(
    pool: Pool, case: str, loss: Callable[[work.Case, torch.Tensor], torch.Tensor]
) -> None:
    for norm, grad, norm_alone, grad_alone in pool.run(2, work.half, case, loss):
        torch.testing.assert_close(norm, norm_alone, rtol=2e-2, atol=0)
        torch.testing.assert_close(grad.float(), grad_alone, rtol=0, atol=2e-2 * grad_alone.abs().max().item())


@pytest.mark.parametrize("cases", [(CHAIN, CHAIN), (CHAIN, "no parameters on the root")])
def test_two_models_that_feed_each_other(pool: Pool, cases: tuple[str, str]) -> None:
    for _ in range(3):  # whose messages meet is a matter of luck
        assert max(pool.run(2, work.two_models, cases)) < work.RELATIVE


def test_clips_add_up(pool: Pool) -> None:
    for moved in pool.run(2, work.clip_often, (0.5, 0.1, 0.3)):
        assert moved == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize(
    ("refused", "words"),
    [
        (work.into_a_dict, "forward returned"),
        (work.thaw, "frozen"),
        (work.change_in_forward, "changed in place"),
        (work.sparse, "sparse"),
        (work.zero_without_a_step, "set_to_none=True"),
        (work.half_by_parts, "call the model itself"),
        (work.batch_norm_in_half, "BatchNorm2d"),
    ],
)
def test_what_cannot_be_trained_is_said_clearly(pool: Pool, refused: Callable[[], None], words: str) -> None:
    for error in pool.errors(2, refused):
        assert isinstance(error, mics.LifecycleError | mics.ConfigError), error
        assert words in str(error)
