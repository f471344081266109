"""What a model is shown in each micro-step: a pure function of the settings, the step and the rank."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mics_models.bert import BERT, BERTConfig
from mics_models.configs import BERTS, GPTS
from mics_models.data import Corpus, Sampler, documents, mask
from mics_models.gpt import GPT, GPTConfig
from mics_models.training.settings import ModelSettings, Settings, nearest, typed

Config = GPTConfig | BERTConfig
HELD_OUT_SEED = 0
"""Of the held-out samples, always: runs with different seeds are measured on the same text."""


def configure(settings: ModelSettings) -> Config:
    """The model's configuration, with what the settings change in it."""
    known: dict[str, Config] = {**GPTS, **BERTS}
    if settings.name not in known:
        meant = nearest(settings.name, list(known))
        raise ValueError(f"settings: model.name is {settings.name!r}, an unknown model, {meant}")
    config = known[settings.name]
    fields = list(vars(config))
    changes = {}
    for key, value in settings.config.items():
        if key not in fields:
            raise ValueError(f"settings: model.config.{key} is unknown, {nearest(key, fields)}")
        changes[key] = typed(f"model.config.{key}", value, getattr(config, key))
    return replace(config, **changes)


def build(config: Config) -> GPT | BERT:
    """The model, where torch's default device says."""
    return GPT(config) if isinstance(config, GPTConfig) else BERT(config)


class Batches:
    """The micro-batches of one rank, as arguments of the model that make it return a loss."""

    def __init__(self, settings: Settings, config: Config, corpus: Corpus, rank: int, world: int) -> None:
        self._settings = settings
        self._corpus = corpus
        self._masks = isinstance(config, BERTConfig)
        self._place = (settings.batch.micro_steps, rank, world)
        batch = settings.batch
        parts = batch.micro_steps * world
        if batch.samples % parts:
            raise ValueError(
                f"settings: batch.samples is {batch.samples}, expected a multiple of {parts}: batch.micro_steps is "
                f"{batch.micro_steps} and there are {world} ranks; change one of them"
            )
        if batch.seq > config.context:
            raise ValueError(
                f"settings: batch.seq is {batch.seq}, expected at most {config.context}, the context of "
                f"{settings.model.name}: lower it, or raise model.config.context"
            )
        if corpus.vocab > config.vocab:
            raise ValueError(
                f"settings: the data's vocabulary is {corpus.vocab}, expected at most {config.vocab}, that of "
                f"{settings.model.name}: set model.config.vocab={corpus.vocab}"
            )
        if self._masks and corpus.mask is None:
            raise ValueError(
                f"settings: {settings.model.name} learns from masked tokens, and the data's tokenizer has no token for "
                "that: prepare the data with one"
            )
        self.train = Sampler(corpus.train, batch.seq, batch.samples, settings.seed)
        self.held_out = Sampler(corpus.held_out, batch.seq, batch.samples, HELD_OUT_SEED)

    def training(self, step: int, micro_step: int) -> dict[str, Tensor]:
        """What this rank trains on."""
        return self._arguments(self.train, step, micro_step)

    def evaluation(self, batch: int, micro_step: int) -> dict[str, Tensor]:
        """What this rank is measured on: always the same."""
        return self._arguments(self.held_out, batch, micro_step)

    def samples(self, step: int, micro_step: int, rank: int) -> range:
        """The numbers of the samples that a rank trains on."""
        micro_steps, _, world = self._place
        return self.train.samples(step, micro_step, micro_steps, rank, world)

    def _arguments(self, sampler: Sampler, step: int, micro_step: int) -> dict[str, Tensor]:
        tokens, targets = sampler.micro_batch(step, micro_step, *self._place)
        found = {}
        if self._settings.data.packed:
            found["documents"] = documents(tokens, self._corpus.start)
        if self._masks:
            assert self._corpus.mask is not None
            tokens, targets = mask(
                tokens,
                sampler.samples(step, micro_step, *self._place),
                seed=sampler.seed,
                mask_token=self._corpus.mask,
                vocab=self._corpus.vocab,
                share=self._settings.data.masked,
            )
        return {"tokens": tokens, "targets": targets, **found}


def to_device(arguments: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The same on the device, without waiting for it."""
    if device.type == "cpu":
        return arguments
    return {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in arguments.items()}
