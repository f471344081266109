"""What one cluster has saved another loads, bit for bit, and trains on with."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import checkpoint_work as work
from checkpoint_work import Cluster, Setting
from depth import draws
from mics_core import Sharding
from pool import Pool

# Means over ranks are added in another order with other degrees, and half precision rounds what is added.
NEAR = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 2e-3}
EIGHT_BITS = "bf16, int8 between nodes"


@st.composite
def clusters(draw: st.DrawFn) -> Cluster:
    per_node = draw(st.sampled_from([1, 2, 3, 4]))
    world = per_node * draw(st.sampled_from([n for n in (1, 2, 3, 4) if n * per_node in (1, 2, 3, 4, 6, 8)]))
    fits = [d for d in range(1, world + 1) if world % d == 0 and (d % per_node == 0 or per_node % d == 0)]
    optimizer = draw(st.sampled_from(fits))
    grads = draw(st.sampled_from([d for d in fits if optimizer % d == 0]))
    params = draw(st.sampled_from([d for d in fits if grads % d == 0]))
    return Cluster(world, per_node, Sharding(params, grads, optimizer))


def differing(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    assert found.keys() == expected.keys()
    return [name for name in found if not torch.equal(found[name], expected[name])]


@draws(4, 20)
@given(
    before=clusters(),
    after=clusters(),
    setting=st.builds(
        Setting, st.sampled_from(["mics.AdamW", "AdamW", "SGD", "Adagrad"]), st.sampled_from(["fp32", "bf16", "fp16"])
    ),
    background=st.booleans(),
)
def test_any_sharding_loads_what_any_other_saved(
    pool: Pool,
    tmp_path_factory: pytest.TempPathFactory,
    before: Cluster,
    after: Cluster,
    setting: Setting,
    background: bool,
) -> None:
    folder = tmp_path_factory.mktemp("runs")
    saved = pool.run(before.world, work.save, before, setting, folder, background)[0]
    loaded = pool.run(after.world, work.load, after, setting, folder)[0]
    assert not differing(loaded[0], saved[0])
    near = NEAR[setting.precision]
    for name, expected in saved[2].items():
        torch.testing.assert_close(loaded[2][name], expected, atol=near, rtol=near, msg=name)


@draws(2, 10)
@given(
    cluster=clusters(),
    optimizer=st.sampled_from(["mics.AdamW", "AdamW", "SGD"]),
    precision=st.sampled_from(["fp32", "bf16", "fp16"]),
)
def test_the_same_sharding_continues_bit_for_bit_with_the_same_random_numbers(
    pool: Pool, tmp_path_factory: pytest.TempPathFactory, cluster: Cluster, optimizer: str, precision: str
) -> None:
    folder, setting = tmp_path_factory.mktemp("runs"), Setting(optimizer, precision, dropout=0.3)
    saved = pool.run(cluster.world, work.save, cluster, setting, folder, False)
    loaded = pool.run(cluster.world, work.load, cluster, setting, folder)
    for before, after in zip(saved, loaded, strict=True):
        assert not differing(after[0], before[0])
        assert after[1] == before[1]
        assert not differing(after[2], before[2])


def test_weights_that_follow_in_eight_bits_are_state_and_others_round_the_masters(pool: Pool, tmp_path: Path) -> None:
    """Bit for bit in the same sharding; in others, and in another precision, the masters are the same."""
    setting = Setting(precision=EIGHT_BITS)
    spread, close = Cluster(4, 2, Sharding(2, 2, 4)), Cluster(4, 2, Sharding(2, 2, 2))
    before = pool.run(4, work.go_on, spread, setting, tmp_path)
    for (losses, weights), (expected, held) in zip(
        pool.run(4, work.come_back, spread, setting, tmp_path), before, strict=True
    ):
        assert losses == expected
        assert not differing(weights, held)
    for cluster, precision in ((close, EIGHT_BITS), (spread, "bf16"), (Cluster(2, 1, Sharding(1, 2, 2)), EIGHT_BITS)):
        for _, weights in pool.run(cluster.world, work.come_back, cluster, Setting(precision=precision), tmp_path):
            for name, weight in weights.items():
                torch.testing.assert_close(weight, before[0][1][name], atol=3e-2, rtol=3e-2, msg=name)


def test_a_checkpoint_without_shown_weights_begins_with_rounded_masters(pool: Pool, tmp_path: Path) -> None:
    spread = Cluster(4, 2, Sharding(2, 2, 4))
    before = pool.run(4, work.go_on, spread, Setting(precision="bf16"), tmp_path)
    for _, weights in pool.run(4, work.come_back, spread, Setting(precision=EIGHT_BITS), tmp_path):
        for name, weight in weights.items():
            torch.testing.assert_close(weight, before[0][1][name], atol=3e-2, rtol=3e-2, msg=name)


def test_what_users_wrote_before_a_save_is_what_a_load_computes_with(pool: Pool, tmp_path: Path) -> None:
    spread, setting = Cluster(4, 2, Sharding(2, 2, 4)), Setting(precision=EIGHT_BITS)
    before = pool.run(4, work.write_and_save, spread, setting, tmp_path)
    after = pool.run(4, work.load_and_look, spread, setting, tmp_path)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
