"""Reference models in plain torch, one file each; `python -m mics_models.pretrain` trains one."""

from mics_models.bert import BERT, BERTConfig
from mics_models.configs import BERTS, GPTS
from mics_models.gpt import GPT, GPTConfig
from mics_models.loss import chunked_cross_entropy
from mics_models.sampling import sample

__version__ = "0.1.0"

__all__ = ["BERT", "BERTS", "GPT", "GPTS", "BERTConfig", "GPTConfig", "chunked_cross_entropy", "sample"]
