"""A masked language model learns what hides behind the masks."""

import pytest
import torch

from mics_models.data import standard_library
from mics_models.loss import IGNORED
from mics_models.pretrain import Training
from mics_models.training.batches import Batches, configure
from mics_models.training.settings import (
    BatchSettings,
    ModelSettings,
    OptimizerSettings,
    ScheduleSettings,
    Settings,
)

STEPS = 800


@pytest.mark.deep  # half a minute of training
def test_a_bert_guesses_masked_bytes_far_better_than_by_their_frequency() -> None:
    told = Settings(
        model=ModelSettings("bert-tiny", config={"layers": 1, "hidden": 256, "heads": 4, "init_std": 0.05}),
        batch=BatchSettings(samples=32, seq=32, micro_steps=1),
        optimizer=OptimizerSettings(lr=3e-3),
        schedule=ScheduleSettings(steps=STEPS),
    )
    corpus = standard_library()
    batches = Batches(told, configure(told.model), corpus, 0, 1)
    training = Training(told, batches, torch.device("cpu"))
    for step in range(STEPS):
        training.step(step)
    right, by_frequency, total = 0, 0, 0
    commonest = torch.bincount(corpus.train[: 1 << 20].long()).argmax()
    with torch.no_grad():
        for number in range(40):
            batch = training.batches.evaluation(number, 0)
            hidden = batch["targets"] != IGNORED
            truth = batch["targets"][hidden]
            guesses = training.model(batch["tokens"]).tokens.argmax(-1)[hidden]
            right += int((guesses == truth).sum())
            by_frequency += int((truth == commonest).sum())
            total += len(truth)
    assert total > 5000
    assert right / total > by_frequency / total + 0.15, (right / total, by_frequency / total)
