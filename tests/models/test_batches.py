"""What a model is shown: the same in every world, masked for a BERT, cut into documents where that is asked for."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from mics_models.data import Corpus, standard_library
from mics_models.loss import IGNORED
from mics_models.training.batches import Batches, build, configure
from mics_models.training.settings import BatchSettings, DataSettings, ModelSettings, Settings


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return standard_library()


def settings(model: str = "byte-tiny", packed: bool = False, **batch: Any) -> Settings:
    batch_settings = BatchSettings(**{"samples": 8, "seq": 64, "micro_steps": 2} | batch)
    return Settings(model=ModelSettings(model), data=DataSettings(packed=packed), batch=batch_settings)


@pytest.mark.parametrize("model", ["byte-tiny", "bert-tiny"])
@pytest.mark.parametrize("world", [2, 4])
def test_a_step_takes_the_same_samples_in_every_world(corpus: Corpus, model: str, world: int) -> None:
    def step(world: int) -> dict[str, torch.Tensor]:
        told = settings(model)
        ranks = [Batches(told, configure(told.model), corpus, rank, world) for rank in range(world)]
        parts = [each.training(3, micro_step) for micro_step in range(2) for each in ranks]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    one, several = step(1), step(world)
    assert one.keys() == several.keys() == {"tokens", "targets"}
    assert all(torch.equal(one[name], several[name]) for name in one)


def test_a_bert_restores_masked_tokens_and_a_gpt_continues_them(corpus: Corpus) -> None:
    for model in ("byte-tiny", "bert-tiny"):
        told = settings(model)
        shown = Batches(told, configure(told.model), corpus, 0, 1).training(0, 0)
        chosen = shown["targets"] != IGNORED
        if model == "byte-tiny":
            assert chosen.all()
            assert torch.equal(shown["tokens"][:, 1:], shown["targets"][:, :-1])
        else:
            assert (chosen.sum(1) == round(0.15 * 64)).all()
            assert (shown["tokens"][chosen] == corpus.mask).float().mean() > 0.5


def test_packed_rows_number_their_documents(corpus: Corpus) -> None:
    told = settings(packed=True)
    shown = Batches(told, configure(told.model), corpus, 0, 1).training(0, 0)
    assert shown["documents"].shape == shown["tokens"].shape
    loss = build(configure(told.model))(**shown)
    assert loss.isfinite()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"samples": 6}, "batch.samples is 6, expected a multiple of 4: batch.micro_steps is 2 and there are 2 ranks"),
        ({"seq": 129}, "batch.seq is 129, expected at most 128, the context of byte-tiny"),
    ],
)
def test_batches_that_do_not_fit(corpus: Corpus, change: dict[str, int], sentence: str) -> None:
    told = settings(**change)
    with pytest.raises(ValueError, match=sentence):
        Batches(told, configure(told.model), corpus, 0, 2)


def test_data_that_the_model_cannot_take(corpus: Corpus) -> None:
    told = settings()
    with pytest.raises(ValueError, match="the data's vocabulary is 300, expected at most 256"):
        Batches(told, configure(told.model), replace(corpus, vocab=300), 0, 1)
    told = settings("bert-tiny")
    with pytest.raises(ValueError, match="the data's tokenizer has no token for that"):
        Batches(told, configure(told.model), replace(corpus, mask=None), 0, 1)
