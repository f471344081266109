"""Text from a GPT that a run has trained: `python -m mics_models.generate runs/NAME --prompt "def "`.

The function for programs is `mics_models.sample`.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.distributed.checkpoint.state_dict_loader import load as load_checkpoint

from mics_models.data import load, standard_library
from mics_models.gpt import GPT, GPTConfig
from mics_models.sampling import sample
from mics_models.training import settings
from mics_models.training.batches import configure


def latest(run: Path) -> Path:
    """The newest checkpoint of a run's folder."""
    pointer = run / "checkpoints" / "latest"
    if not pointer.is_file():
        raise ValueError(f"generate: {run} has no checkpoint, expected the folder of a run: name one that has saved")
    return run / "checkpoints" / pointer.read_text().strip()


def load_model(config: GPTConfig, checkpoint: Path) -> GPT:
    """The model with a checkpoint's weights, whole, in this process."""
    with torch.device("meta"):  # nothing is drawn that the checkpoint overwrites
        model = GPT(config)
    model.to_empty(device="cpu")
    with warnings.catch_warnings():  # it warns that it does what `no_dist` asks for
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        load_checkpoint({"model": model.state_dict()}, checkpoint_id=checkpoint, no_dist=True)  # in place
    return model.eval()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m mics_models.generate", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path, help="the folder of a run")
    parser.add_argument("--checkpoint", type=Path, help="another one than its latest")
    parser.add_argument("--prompt", default="\ndef ")
    parser.add_argument("--tokens", type=int, default=240)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(arguments)
    try:
        checkpoint = chosen.checkpoint or latest(chosen.run)
        told = settings.read(chosen.run / "settings.toml", ())
        config = configure(told.model)
        if not isinstance(config, GPTConfig):
            raise ValueError(f"generate: {told.model.name} restores masked tokens, expected a GPT: name a run of one")
        if not (checkpoint / ".metadata").is_file():
            raise ValueError(f"generate: {checkpoint} is no checkpoint, expected one of the run's: name it")
        corpus = load(Path(told.data.folder)) if told.data.folder else standard_library()
        model = load_model(config, checkpoint).to("cuda" if torch.cuda.is_available() else "cpu")
        prompt = corpus.encode(chosen.prompt)
        tokens = sample(model, prompt, chosen.tokens, temperature=chosen.temperature, seed=chosen.seed)
    except (ValueError, OSError) as error:
        parser.error(str(error).removeprefix("generate: "))
    print(corpus.decode(tokens.cpu()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
