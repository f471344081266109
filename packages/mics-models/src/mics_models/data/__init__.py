"""Data for the models: a corpus that needs no download, prepared files of tokens, and what makes batches of either.

Sampling and masking are pure functions of a seed and the step. `python -m mics_models.data --help` prepares files.
"""

from mics_models.data.corpus import Corpus, decode, encode, standard_library
from mics_models.data.masking import mask
from mics_models.data.packing import documents
from mics_models.data.prepared import load
from mics_models.data.sampler import Sampler
from mics_models.data.token_files import open_tokens

__all__ = ["Corpus", "Sampler", "decode", "documents", "encode", "load", "mask", "open_tokens", "standard_library"]
