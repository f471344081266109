"""What a checkpoint holds beside weights and moments."""

from pathlib import Path
from typing import Any

import pytest
import torch

import contents_work as work
import mics_core as mics
from checkpoint_work import Cluster
from mics_core import ConfigError, Sharding
from pool import Pool

TWO = Cluster(2, 2, Sharding(1, 1, 2))
FOUR = Cluster(4, 2, Sharding(2, 2, 4))


def test_buffers_that_differ_come_back_to_their_ranks(pool: Pool, tmp_path: Path) -> None:
    saved = pool.run(4, work.count, FOUR, tmp_path)
    assert len({tuple(seen) for seen in saved}) == 4
    assert pool.run(4, work.count_on, FOUR, tmp_path) == saved
    assert pool.run(2, work.count_on, TWO, tmp_path) == [saved[0]] * 2


def test_random_numbers_of_torch_python_and_numpy_continue_on_each_rank(pool: Pool, tmp_path: Path) -> None:
    drawn = pool.run(2, work.draw, TWO, tmp_path, True)
    assert len(set(drawn)) == 2
    assert pool.run(2, work.draw, TWO, tmp_path, False) == drawn


def test_numbers_in_an_optimizers_state_stay_what_they_are(pool: Pool, tmp_path: Path) -> None:
    assert pool.run(4, work.keep_numbers, FOUR, tmp_path)[0] == [("step", 3), ("decay", 0.125), ("warm", True)]
    for loaded in pool.run(2, work.read_numbers, TWO, tmp_path):
        assert loaded == [("step", 4), ("decay", 0.0625), ("warm", True)]
        assert [type(value) for _, value in loaded] == [int, float, bool]


def test_an_optimizer_of_named_parameters_in_another_order(pool: Pool, tmp_path: Path) -> None:
    for before, after in pool.run(2, work.with_names, TWO, Cluster(2, 1, Sharding(2, 2, 2)), tmp_path):
        for name, expected in before.items():
            torch.testing.assert_close(after[name], expected, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("kind", [mics.AdamW, torch.optim.AdamW])
def test_loading_needs_no_memory_for_a_second_copy_of_the_moments(pool: Pool, tmp_path: Path, kind: Any) -> None:
    places = pool.run(2, work.load_again, TWO, tmp_path, kind)
    assert any(before for before, _ in places)
    assert all(after == before for before, after in places)


def test_a_buffer_that_cannot_be_overwritten_is_refused_before_it_is_saved(pool: Pool, tmp_path: Path) -> None:
    for error in pool.errors(2, work.expanded, tmp_path):
        assert type(error) is ConfigError
        assert "the buffer mask is expanded" in str(error)
    assert not list(tmp_path.iterdir())


def test_weights_that_were_two_do_not_become_one(pool: Pool, tmp_path: Path) -> None:
    for said, changed in pool.run(2, work.tie_or_not, tmp_path / "two", False):
        assert "blocks.1.weight and blocks.0.weight are one parameter here and two in" in said
        assert not changed
    for said, changed in pool.run(2, work.tie_or_not, tmp_path / "one", True):
        assert said == "loaded"
        assert changed
