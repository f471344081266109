"""Reference models learn the same under every sharding as in one process of plain PyTorch."""

import math
from functools import cache
from itertools import combinations_with_replacement

import pytest
import torch

import pretraining_work as work
from depth import is_deep
from mics_models.training.batches import Batches, build, configure
from mics_models.training.news import Stop
from mics_models.training.schedule import rate
from placing import Place
from pool import Pool

RANKS = 4
RUNS = [("gpt", (2, 2, 4)), ("bert", (1, 2, 4))]
if is_deep():
    chains = list(combinations_with_replacement((1, 2, 4), 3))  # each divides the next
    RUNS = [(name, chain) for name in ("gpt", "bert") for chain in chains]


@cache
def plain(name: str, packed: bool) -> list[float]:
    """The losses of PyTorch alone, on all ranks' batches, with the weights that one rank draws."""
    told = work.settings(name, (1, 1, 1), packed=packed)
    config = configure(told.model)
    model = build(config)
    model.load_state_dict(work.start(told))
    batches = [Batches(told, config, work.corpus(), rank, RANKS) for rank in range(RANKS)]
    decayed, others = ([p for p in model.parameters() if (p.ndim > 1) is matrix] for matrix in (True, False))
    groups = [{"params": decayed, "weight_decay": told.optimizer.weight_decay}, {"params": others, "weight_decay": 0.0}]
    betas = (told.optimizer.beta1, told.optimizer.beta2)
    optimizer = torch.optim.AdamW(groups, betas=betas, eps=told.optimizer.eps)
    found = []
    for step in range(work.STEPS):
        total = 0.0
        for micro_step in range(told.batch.micro_steps):
            for each in batches:
                loss = model(**each.training(step, micro_step)) / (RANKS * told.batch.micro_steps)
                loss.backward()
                total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), told.optimizer.clip)
        for group in optimizer.param_groups:
            group["lr"] = told.optimizer.lr * rate(step, told.schedule)
        optimizer.step()
        optimizer.zero_grad()
        found.append(total)
    return found


def near(pool: Pool) -> float:
    """How far losses may be from the CPU's, relatively: a GPU has other products, and an attention of its own."""
    return 1e-4 if pool.place(RANKS) is Place.CPU else 1e-3


@pytest.mark.parametrize(("name", "degrees"), RUNS, ids=str)
def test_twenty_steps_have_the_losses_of_plain_pytorch(pool: Pool, name: str, degrees: tuple[int, int, int]) -> None:
    expected = plain(name, packed=False)
    assert expected[-1] < expected[0] - 0.3, "the reference learns nothing, so nothing is shown"
    for found in pool.run(RANKS, work.losses, work.settings(name, degrees)):
        assert found == pytest.approx(expected, rel=near(pool))


@pytest.mark.parametrize("name", ["bert", pytest.param("gpt", marks=pytest.mark.deep)])
def test_packed_documents_have_the_losses_of_plain_pytorch(pool: Pool, name: str) -> None:
    for found in pool.run(RANKS, work.losses, work.settings(name, (2, 2, 4), packed=True)):
        assert found == pytest.approx(plain(name, packed=True), rel=near(pool))
    assert plain(name, packed=True) != plain(name, packed=False)


def test_all_ranks_hear_which_loss_and_norm_was_bad_and_that_one_wants_to_leave(pool: Pool) -> None:
    assert pool.run(2, work.tell_news) == [(((2, 1),), math.inf, Stop.SIGNAL)] * 2


def test_a_mistake_on_one_rank_is_refused_by_all(pool: Pool) -> None:
    assert pool.run(3, work.refuse, "work") == ["on rank 1: no such folder"] * 3
    assert (
        pool.run(3, work.refuse, "agree")
        == ["seed is 1 on rank 1 and 0 on rank 0, expected the same everywhere: tell all ranks alike"] * 3
    )
