"""A mistake is one sentence on every rank: what, got, expected, what to do. Never a hang."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch.distributed as dist

import error_work as work
from depth import is_deep
from mics_core import ConfigError, LifecycleError, LostRank, Sharding
from pool import Pool

pytestmark = pytest.mark.cpu_ranks  # NCCL ends the process of a rank that waits too long


def said(pool: Pool, kind: type[Exception], function: Callable[..., Any], *args: Any, world: int = 2) -> list[str]:
    """The sentence of each rank."""
    errors = pool.errors(world, function, *args)
    for error in errors:
        assert type(error) is kind, error
        assert "\n" not in str(error)
    return [str(error) for error in errors]


@pytest.mark.parametrize(
    ("sharding", "per_node", "sentence"),
    [
        (Sharding(2, 1, 2), None, "params is 2, which does not divide grads, 1"),
        (Sharding(1, 1, 3), None, "optimizer is 3, which does not divide the number of ranks, 2"),
        (Sharding(0, 1, 1), None, "params is 0, expected a count of pieces"),
        (Sharding(1, 1, 1), 0, "ranks_per_node is 0, expected a divisor of the 2 ranks"),
        ("zero3", None, "sharding is 'zero3', expected a mics.Sharding"),
    ],
)
def test_wrong_degrees(pool: Pool, sharding: Any, per_node: int | None, sentence: str) -> None:
    for text in said(pool, ConfigError, work.shard_with, sharding, per_node):
        assert sentence in text


def test_ranks_that_do_not_fill_nodes(pool: Pool) -> None:
    for text in said(pool, ConfigError, work.shard_with, Sharding(1, 1, 1), 3, world=4):
        assert "ranks_per_node is 3, expected a divisor of the 4 ranks" in text


def test_a_degree_that_does_not_fill_nodes(pool: Pool) -> None:
    for text in said(pool, ConfigError, work.shard_with, Sharding(2, 2, 6), 3, world=6):
        assert "params is 2, which neither divides nor is a multiple of the 3 ranks of a node" in text


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("sharding", "sharding is (params=1, grads=1, optimizer=1) on rank 1 and (params=2, grads=2, optimizer=2)"),
        ("precision", "precision is Precision(compute=torch.bfloat16"),
        ("prefetch_bytes", "prefetch_bytes is 10 on rank 1 and None on rank 0"),
        ("units", "the models differ: rank 1 has ('unit', 'blocks.2') where rank 0 has no more"),
        ("shapes", "the models differ: rank 1 has ('blocks.1.up.weight', (64, 32)"),
        ("frozen", "the models differ: rank 1 has"),
    ],
)
def test_ranks_that_ask_for_different_things(pool: Pool, how: str, sentence: str) -> None:
    for text in said(pool, ConfigError, work.shard_differently, how):
        assert sentence in text


def test_what_is_wrong_on_one_rank_is_raised_on_all(pool: Pool) -> None:
    first, second = said(pool, ConfigError, work.shard_differently, "invalid")
    assert first == f"on rank 1: {second}"


def test_ranks_that_are_not_numbered_node_by_node(pool: Pool) -> None:
    for text in said(pool, ConfigError, work.shard_on_mixed_nodes, world=4):
        assert "ranks 0 to 1 should share a node of 2, but rank 0 is on" in text
        assert "number the ranks node by node" in text


@pytest.mark.parametrize("lengths", [[1, 2], [3, 2], [2, 1]], ids=str)
def test_ranks_with_different_numbers_of_micro_batches(pool: Pool, lengths: list[int]) -> None:
    for text in said(pool, LifecycleError, work.bring_fewer_micro_batches, lengths):
        shorter = lengths.index(min(lengths))
        assert f"ranks [{shorter}] bring fewer micro-batches than the others" in text


@pytest.mark.parametrize(
    ("kinds", "sentence"),
    [
        (["list", "generator"], "ranks [1] bring micro-batches that have no length"),
        (["generator", "list"], "ranks [0] bring micro-batches that have no length"),
        (["nothing", "list"], "ranks [0] bring fewer micro-batches than the others"),
    ],
    ids=str,
)
def test_ranks_whose_micro_batches_are_of_different_kinds(pool: Pool, kinds: list[str], sentence: str) -> None:
    for text in said(pool, LifecycleError, work.bring_micro_batches, kinds):
        assert sentence in text


@pytest.mark.parametrize(
    ("degrees", "how", "sentence"),
    [
        ((1, 1, 1), "no backward", "number 4 is accumulate's next micro-batch on rank 0 and nothing on rank 1"),
        ((1, 1, 1), "break", "is accumulate's next micro-batch on rank 0 and nothing on rank 1"),
        ((1, 1, 1), "clip", "is a step of AdamW with"),
        ((1, 1, 2), "norm", "is a clip of the norm to 1.0 on rank 0 and a clip of the norm to 0.5 on rank 1"),
        ((2, 2, 2), "rate of AdamW", "0.02"),
        ((1, 1, 2), "rate of SGD", "0.02"),
    ],
    ids=str,
)
def test_ranks_that_train_differently_hear_of_it_in_the_next_step_or_comparison(
    pool: Pool, degrees: tuple[int, int, int], how: str, sentence: str
) -> None:
    """No message is missing and none comes in another's place, so nothing else would tell."""
    for text in said(pool, LifecycleError, work.train_differently, Sharding(*degrees), how):
        assert text.startswith("ranks do different things: of what they did since they last compared, number ")
        assert sentence in text


def test_ranks_that_meet_in_different_calls(pool: Pool) -> None:
    for text in said(pool, LifecycleError, work.meet_in_different_calls):
        assert text.startswith("ranks meet in different calls: save on rank 0 and check_replicas on rank 1: make")


@pytest.mark.parametrize("how", ["gather", "exchange"])
def test_messages_of_different_lengths_end_no_process(pool: Pool, how: str) -> None:
    for rank, error in enumerate(pool.errors(2, work.send_messages_of_different_lengths, how)):
        assert f"nothing came from rank {1 - rank} on level test" in str(error)


@pytest.mark.parametrize("what", ["accumulate", "clip", "full_params"])
def test_a_model_that_is_not_sharded(pool: Pool, what: str) -> None:
    for text in said(pool, LifecycleError, work.use_before_shard, what):
        assert "call mics.shard" in text


def test_an_optimizer_over_parameters_that_are_not_sharded(pool: Pool) -> None:
    for text in said(pool, ConfigError, work.use_before_shard, "AdamW"):
        assert "call mics.shard first" in text


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_an_optimizer_made_before_shard(pool: Pool, kind: str) -> None:
    for text in said(pool, LifecycleError, work.old_optimizer, kind):
        assert f"this {kind} holds parameters that mics.shard has replaced" in text


@pytest.mark.parametrize(
    ("degrees", "marked", "kind", "first"),
    [
        ((1, 1, 1), False, "SGD", True),
        ((1, 1, 1), True, "mics.AdamW", False),
        ((2, 2, 4), False, "mics.AdamW", False),
        ((2, 2, 4), True, "SGD", True),
        ((4, 4, 4), False, "SGD", False),
        ((4, 4, 4), True, "mics.AdamW", True),
    ],
    ids=str,
)
def test_a_penalty_on_slices_is_refused_on_every_rank_and_training_goes_on(
    pool: Pool, degrees: tuple[int, int, int], marked: bool, kind: str, first: bool
) -> None:
    for text in pool.run(4, work.penalise_slices, degrees, marked, kind, first, LOCAL_WORLD_SIZE=2):
        assert "a gradient came to this rank's slice of it, as of a penalty over model.parameters()" in text


def test_a_step_inside_a_backward(pool: Pool) -> None:
    for text in said(pool, LifecycleError, work.step_inside_backward):
        assert "step: called inside the model's backward" in text


def test_a_step_inside_a_forward(pool: Pool) -> None:
    for text in said(pool, LifecycleError, work.step_inside_forward):
        assert "step: called inside the model's forward" in text


def test_a_parameter_changed_while_it_is_gathered(pool: Pool) -> None:
    for text in said(pool, LifecycleError, work.change_while_gathered):
        assert "blocks.0: a parameter was changed in place while it was gathered" in text


def test_a_model_sharded_twice(pool: Pool) -> None:
    for text in said(pool, ConfigError, work.shard_twice):
        assert "sharded already" in text


def test_parameters_that_are_not_floating_point(pool: Pool) -> None:
    for text in said(pool, ConfigError, work.shard_integers):
        assert "count is torch.int32" in text


@pytest.mark.parametrize("kind", ["Adafactor", "SGD"])
def test_an_optimizer_that_cannot_work_on_slices_or_takes_a_closure(pool: Pool, kind: str) -> None:
    for text in said(pool, ConfigError, work.optimize_with, kind):
        assert "looks at whole tensors" in text or "got a closure" in text


def test_a_backward_after_gradients_were_summed(pool: Pool) -> None:
    for text in said(pool, LifecycleError, work.backward_after_clip):
        assert "was summed over all ranks already" in text
        assert "step or zero_grad first" in text


def test_outputs_in_which_no_tensor_can_be_found(pool: Pool) -> None:
    for text in said(pool, LifecycleError, work.return_nothing_to_watch):
        assert "0: forward returned Opaque, in which no tensor can be found" in text


def test_a_copy_of_a_sharded_model(pool: Pool) -> None:
    for text in said(pool, LifecycleError, work.run_a_copy):
        assert "is a copy of a sharded model's" in text


@pytest.mark.parametrize(
    ("how", "sentence"),
    [("AdamW", "some of its parameters are not those of the sharded model"), ("group", "pass all groups at once")],
)
def test_an_optimizer_over_parameters_from_elsewhere(pool: Pool, how: str, sentence: str) -> None:
    for text in said(pool, ConfigError, work.optimize_a_stranger, how):
        assert sentence in text


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("gradient early", "was changed before it was summed over all ranks"),
        ("gradient replaced", "was replaced by assignment"),
        ("half", "was replaced after mics.shard"),
        ("data", "was replaced after mics.shard"),
    ],
)
def test_changes_that_would_be_lost(pool: Pool, how: str, sentence: str) -> None:
    for text in said(pool, LifecycleError, work.meddle, how):
        assert sentence in text


def test_a_backward_inside_full_params(pool: Pool) -> None:
    for text in said(pool, LifecycleError, work.misuse_full_params, "backward"):
        assert "its gradients would be lost" in text


def test_another_shape_inside_full_params(pool: Pool) -> None:
    for text in said(pool, ConfigError, work.misuse_full_params, "shape"):
        assert "blocks.0.up.weight was replaced by a tensor of shape (3, 3)" in text


def test_a_meta_model_that_leaves_a_parameter_unfilled(pool: Pool) -> None:
    for text in said(pool, ConfigError, work.shard_unfilled):
        assert "reset_parameters() of Unfilled leaves its bias unfilled" in text


def test_a_unit_that_returns_its_parameter(pool: Pool) -> None:
    for text in said(pool, LifecycleError, work.return_a_parameter):
        assert "0: its forward returned one of its parameters" in text


def test_a_rank_that_stays_away_is_named_with_unit_and_level(pool: Pool) -> None:
    first, second = pool.errors(2, work.stay_away)
    assert str(second) == "was away"
    for word in ("gather of the root failed on rank 0", "nothing came from rank 1", "1-2 inside nodes"):
        assert word in str(first)


SAME, REVERSED, SWAPPED = (0, 1, 2), (2, 1, 0), (1, 0, 2)


ORDERS = {
    "one reversed": [SAME, REVERSED, SAME, SAME],
    "one swaps two": [SAME, SAME, SAME, SWAPPED],
    "each drops another": [(0, 1), (0, 2), (1, 2), (0, 1)],
}
WAYS = [((2, 2, 4), True), ((4, 4, 4), True), ((1, 4, 4), False)]
CASES = [(*way, orders) for way, orders in zip(WAYS, ORDERS.values(), strict=True)]
if is_deep():
    CASES = [(*way, orders) for way in [*WAYS, ((2, 2, 2), False), ((2, 2, 2), True)] for orders in ORDERS.values()]


@pytest.mark.parametrize(("degrees", "marked", "orders"), CASES, ids=str)
def test_ranks_that_use_units_in_different_orders_hear_of_it_before_a_step(
    pool: Pool, degrees: tuple[int, int, int], marked: bool, orders: list[tuple[int, ...]]
) -> None:
    """Their sizes agree, so every message arrives, in another unit's place."""
    job = partial(work.use_in_orders, evaluate=False)
    sentences = said(pool, LifecycleError, job, Sharding(*degrees), orders, marked, world=4)
    assert len(set(sentences)) == 1
    assert "ranks use units in different orders: of the transfers" in sentences[0]
    assert "blocks." in sentences[0]
    assert "on rank 0 and the" in sentences[0]


def test_ranks_that_evaluate_in_different_orders_hear_of_it_before_the_forward_returns(pool: Pool) -> None:
    job = partial(work.use_in_orders, evaluate=True)
    for text in said(pool, LifecycleError, job, Sharding.mics(4), [SAME, SAME, REVERSED, SAME], False, world=4):
        assert "the gather of blocks.0 on rank 0 and the gather of blocks.2 on rank 2" in text


@pytest.mark.parametrize(
    ("degrees", "times", "raising"),
    [
        ((2, 2, 2), [2, 2, 0, 0], []),  # one copy evaluates alone
        ((2, 2, 4), [1, 1, 3, 3], []),
        ((2, 2, 2), [1, 1, 1, 1], [1]),
        ((4, 4, 4), [2, 2, 2, 2], [0, 3]),
        ((1, 4, 4), [0, 1, 2, 3], [2]),
    ],
    ids=str,
)
def test_the_ranks_of_one_copy_may_evaluate_without_the_others_and_raise_when_all_is_gathered(
    pool: Pool, degrees: tuple[int, int, int], times: list[int], raising: list[int]
) -> None:
    for found, expected in pool.run(4, work.evaluate_apart, degrees, times, raising):
        assert found == expected


def test_what_differs_in_gathers_alone_is_told(pool: Pool) -> None:
    """Of ranks 2 and 3, which hold another copy than rank 0: all hear of it, also those that are not concerned."""
    job = work.freeze_blocks_and_use_in_orders
    for text in said(pool, LifecycleError, job, [SAME, SAME, SAME, REVERSED], world=4):
        assert "is the gather of blocks.0 on rank 2 and the gather of blocks.2 on rank 3" in text


def test_what_was_asked_before_an_evaluation_is_told_after_it(pool: Pool) -> None:
    for text in said(pool, LifecycleError, work.evaluate_before_a_step_in_another_order, world=4):
        assert "blocks." in text
        assert "on rank 1" in text


def test_where_nothing_travels_ranks_may_use_units_in_any_order(pool: Pool) -> None:
    orders = [SAME, REVERSED, SWAPPED, SAME]
    assert all(pool.run(4, partial(work.use_in_orders, evaluate=False), Sharding(1, 1, 1), orders, False))
    assert all(pool.run(4, partial(work.use_in_orders, evaluate=True), Sharding(1, 4, 4), orders, False))


def test_ranks_that_cannot_connect_say_so(pool: Pool) -> None:
    for rank, text in enumerate(said(pool, LostRank, work.cannot_connect)):
        assert text == f"connecting ranks for test failed on rank {rank}: connection refused"


def test_the_others_name_the_error_of_the_rank_that_ended_first(pool: Pool) -> None:
    first, second, third = pool.errors(3, work.raise_in_a_forward)
    assert str(second) == "was ended"
    for rank, error in ((0, first), (2, third)):
        said = (
            f"gather of the root failed on rank {rank} after rank 1 raised ValueError: no such luck: nothing came from"
        )
        assert type(error) is LostRank
        assert str(error).startswith(said)


PROGRAM = """
import sys, torch, mics_core as mics
mics.init()
model = mics.shard(torch.nn.Linear(100, 100), mics.Sharding.ddp())
optimizer = mics.AdamW(model.parameters())
for step in range(2):
    if step and torch.distributed.get_rank() == 1:
        raise KeyError("no such luck")
    model(torch.ones(1, 100)).sum().backward()
    optimizer.step()
"""


def programs(program: str) -> list[str]:
    """The last line of each of three ranks' errors, without a launcher, which would end them before they say it."""
    # As torchrun does: a store that a rank kept would go with it.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    world = {"WORLD_SIZE": 3, "LOCAL_WORLD_SIZE": 3, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
    world["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            env=os.environ | {name: str(value) for name, value in (world | {"RANK": rank, "LOCAL_RANK": rank}).items()},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    try:
        return [rank.communicate(timeout=600)[1].strip().splitlines()[-1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


@pytest.mark.deep
def test_programs_whose_first_rank_raised_say_so_at_the_beginning_of_their_errors() -> None:
    errors = programs(PROGRAM)
    assert errors[1].endswith("KeyError: 'no such luck'")
    for number in (0, 2):
        assert f"failed on rank {number} after rank 1 raised KeyError: 'no such luck': " in errors[number]


@pytest.mark.deep
def test_all_ranks_hear_that_one_may_not_open_enough_files() -> None:
    few = "import os, resource\nif os.environ['RANK'] == '1': resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))\n"
    for error in programs(few + PROGRAM):
        assert re.search(r"ConfigError: init: rank 1 may open 40 files, expected \d+ or more for its", error)
