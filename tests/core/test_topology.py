"""Rungs and pieces: integers only."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mics_core import ConfigError, Sharding
from mics_core.spec.topology import Rungs, Scope, Topology


@st.composite
def ladders(draw: st.DrawFn) -> Rungs:
    """Up to 96 ranks, with any degrees that fill nodes."""
    per_node = draw(st.integers(1, 12))
    world = per_node * draw(st.integers(1, 8))
    fits = [d for d in range(1, world + 1) if world % d == 0 and (d % per_node == 0 or per_node % d == 0)]
    optimizer = draw(st.sampled_from(fits))
    grads = draw(st.sampled_from([d for d in fits if optimizer % d == 0]))
    params = draw(st.sampled_from([d for d in fits if grads % d == 0]))
    return Rungs.of(Sharding(params, grads, optimizer), Topology(world, per_node))


@given(rungs=ladders())
def test_each_level_is_wholly_inside_nodes_or_wholly_between_them(rungs: Rungs) -> None:
    topology = rungs.topology
    for level in rungs.levels(1, topology.world):
        for rank in range(topology.world):
            peers = rungs.members(rank, level)
            nodes, places = zip(*(divmod(peer, topology.ranks_per_node) for peer in peers), strict=True)
            assert len(set(nodes)) == (1 if rungs.scope(level) is Scope.INTRA else len(peers))
            assert len(set(places)) == (len(peers) if len(set(nodes)) == 1 else 1)


@given(rungs=ladders())
def test_peers_agree_on_who_they_are(rungs: Rungs) -> None:
    for level in rungs.levels(1, rungs.topology.world):
        for rank in range(rungs.topology.world):
            peers = rungs.members(rank, level)
            assert len(peers) == rungs.degrees[level + 1] // rungs.degrees[level]
            assert peers[rungs.digits(rank)[level]] == rank
            assert all(rungs.members(peer, level) == peers for peer in peers)


@given(rungs=ladders())
def test_going_down_a_level_the_pieces_of_peers_lie_side_by_side_in_their_order(rungs: Rungs) -> None:
    for level in rungs.levels(1, rungs.topology.world):
        low, high = rungs.degrees[level : level + 2]
        for rank in range(rungs.topology.world):
            first = rungs.piece_number(rank, low) * (high // low)
            assert [rungs.piece_number(peer, high) for peer in rungs.members(rank, level)] == list(
                range(first, first + high // low)
            )


@given(rungs=ladders())
def test_every_degree_ranks_in_a_row_hold_one_copy_and_the_replication_groups_the_same_piece(rungs: Rungs) -> None:
    world = rungs.topology.world
    for degree in rungs.degrees:
        for first in range(0, world, degree):
            assert sorted(rungs.piece_number(rank, degree) for rank in range(first, first + degree)) == list(
                range(degree)
            )
        for rank in range(world):
            replicas = rungs.replicating(rank, degree)
            assert rank in replicas
            assert {rungs.piece_number(other, degree) for other in replicas} == {rungs.piece_number(rank, degree)}
            assert len(replicas) == world // degree


def test_the_example_of_the_docstring() -> None:
    rungs = Rungs.of(Sharding(2, 2, 4), Topology(8, 2))
    assert rungs.degrees == (1, 2, 4, 8)
    assert rungs.digits(6) == (0, 1, 1)
    assert [rungs.name(level) for level in rungs.levels(1, 8)] == [
        "1-2 inside nodes",
        "2-4 between nodes",
        "4-8 between nodes",
    ]
    assert rungs.members(6, 1) == (4, 6)


def test_a_node_is_a_rung_whatever_the_degrees() -> None:
    assert Rungs.of(Sharding(1, 1, 1), Topology(64, 8)).degrees == (1, 8, 64)
    assert Rungs.of(Sharding(1, 1, 4), Topology(4, 8)).degrees == (1, 4)  # a node that is not full


@pytest.mark.parametrize(("world", "per_node"), [(6, 4), (4, 0), (4, -2)])
def test_nodes_must_be_whole_and_of_one_size(world: int, per_node: int) -> None:
    with pytest.raises(ConfigError, match=f"ranks_per_node is {per_node}, expected a divisor of the {world} ranks"):
        Topology(world, per_node)


def test_a_copy_must_fill_nodes_or_share_one_evenly() -> None:
    with pytest.raises(ConfigError, match="grads is 4, which neither divides nor is a multiple of the 6 ranks"):
        Rungs.of(Sharding(2, 4, 12), Topology(12, 6))
