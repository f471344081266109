import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mics_models.data import Sampler, documents, mask
from mics_models.data.sampler import stable_hash
from mics_models.loss import IGNORED

VOCAB, MASK = 500, 500


def masked(tokens: torch.Tensor, samples: range, seed: int = 0, share: float = 0.15) -> tuple[torch.Tensor, ...]:
    return mask(tokens, samples, seed=seed, mask_token=MASK, vocab=VOCAB, share=share)


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(VOCAB, (400, 500), generator=torch.Generator().manual_seed(1))


def test_of_fifteen_percent_four_fifths_are_hidden_a_tenth_is_random_a_tenth_stays(tokens: torch.Tensor) -> None:
    inputs, targets = masked(tokens, range(400))
    chosen = targets != IGNORED
    assert torch.equal(chosen.sum(dim=1), torch.full((400,), 75))  # 30,000 in all: 0.01 is 4 standard deviations
    hidden = (inputs == MASK).sum() / chosen.sum()
    stayed = (chosen & (inputs == tokens)).sum() / chosen.sum()
    assert hidden == pytest.approx(0.8, abs=0.01)
    assert stayed == pytest.approx(0.1 + 0.1 / VOCAB, abs=0.01)


def test_only_chosen_positions_change_and_their_targets_are_what_was_there(tokens: torch.Tensor) -> None:
    inputs, targets = masked(tokens, range(400))
    chosen = targets != IGNORED
    assert torch.equal(inputs[~chosen], tokens[~chosen])
    assert torch.equal(targets[chosen], tokens[chosen])
    assert inputs.dtype == targets.dtype == torch.int64


def test_what_is_chosen_and_drawn_is_spread_evenly(tokens: torch.Tensor) -> None:
    inputs, targets = masked(tokens, range(400))
    chosen = (targets != IGNORED).float()
    assert chosen.mean(dim=0).std().item() == pytest.approx((0.15 * 0.85 / 400) ** 0.5, rel=0.15)  # over positions
    neighbours = (chosen[:, :-1] * chosen[:, 1:]).mean().item()
    assert neighbours == pytest.approx(0.15**2, rel=0.05)
    below = (chosen[:-1] * chosen[1:]).mean().item()  # the next sample
    assert below == pytest.approx(0.15**2, rel=0.05)
    drawn = inputs[(targets != IGNORED) & (inputs != MASK) & (inputs != tokens)]
    assert drawn.float().mean().item() == pytest.approx((VOCAB - 1) / 2, rel=0.03)
    assert len(drawn.unique()) > 0.98 * VOCAB


def test_the_same_masks_for_every_world_and_number_of_micro_steps() -> None:
    sampler = Sampler(torch.arange(2000) % VOCAB, seq=30, batch=12, seed=5)
    whole = masked(sampler.micro_batch(9)[0], sampler.samples(9))
    for world, micro_steps in [(1, 2), (2, 1), (2, 3), (4, 3), (12, 1)]:
        places = [
            (9, micro_step, micro_steps, rank, world) for micro_step in range(micro_steps) for rank in range(world)
        ]
        shares = [masked(sampler.micro_batch(*place)[0], sampler.samples(*place)) for place in places]
        assert torch.equal(torch.cat([share[0] for share in shares]), whole[0])
        assert torch.equal(torch.cat([share[1] for share in shares]), whole[1])


def test_masks_depend_on_seed_and_sample_alone(tokens: torch.Tensor) -> None:
    first = masked(tokens[:4], range(7, 11))[1]
    torch.manual_seed(123)  # torch's own randomness plays no part
    assert torch.equal(masked(tokens[:4], range(7, 11))[1], first)
    assert not torch.equal(masked(tokens[:4], range(7, 11), seed=1)[1], first)
    assert not torch.equal(masked(tokens[:4], range(8, 12))[1], first)
    other = masked(tokens[4:8], range(7, 11))[1]  # other tokens, the same places
    assert torch.equal(other != IGNORED, first != IGNORED)


def test_the_noise_is_murmurs_in_exact_arithmetic() -> None:
    def mixed(bits: int) -> int:
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            bits = (bits ^ bits >> shift) * factor % 2**32
        return bits ^ bits >> 16

    sample, length = 2**40 + 3, 300
    noise = [[mixed(stable_hash(9, purpose, sample) % 2**32 ^ mixed(n)) for n in range(length)] for purpose in range(3)]
    chosen = sorted(range(length), key=noise[0].__getitem__)[:45]
    inputs, targets = masked(torch.zeros(1, length, dtype=torch.int32), range(sample, sample + 1), seed=9)
    assert sorted(chosen) == (targets[0] != IGNORED).nonzero().flatten().tolist()
    for n in chosen:
        fate = noise[1][n] % 10
        assert inputs[0, n] == (MASK if fate < 8 else noise[2][n] % VOCAB if fate == 8 else 0)


@given(length=st.integers(1, 12), share=st.floats(0.001, 1), sample=st.integers(0, 2**62), seed=st.integers(0, 2**62))
def test_at_least_one_position_of_a_sample_is_masked(length: int, share: float, sample: int, seed: int) -> None:
    targets = masked(torch.ones(1, length), range(sample, sample + 1), seed, share)[1]
    assert (targets != IGNORED).sum() == max(1, round(share * length))


def test_wrong_requests_are_refused(tokens: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="got 4 rows of tokens and 3 numbers of samples, expected a number for each"):
        masked(tokens[:4], range(3))
    for share in (0.0, 1.5):
        with pytest.raises(ValueError, match=f"got the share {share}, expected more than 0 and at most 1"):
            masked(tokens[:4], range(4), share=share)


def test_documents_are_numbered_from_their_starts() -> None:
    rows = torch.tensor([[9, 1, 2, 9, 3], [1, 9, 9, 2, 2]])
    assert documents(rows, start=9).tolist() == [[1, 1, 1, 2, 2], [0, 1, 2, 2, 2]]
    assert documents(rows, start=9).dtype == torch.int64
