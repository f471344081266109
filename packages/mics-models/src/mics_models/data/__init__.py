"""Data for the models: a corpus that needs no download, and a sampler that is a pure function of the step."""

from mics_models.data.corpus import Corpus, decode, encode, standard_library
from mics_models.data.sampler import Sampler

__all__ = ["Corpus", "Sampler", "decode", "encode", "standard_library"]
