"""Text from a GPT that a run has trained: `python -m mics_models.generate runs/NAME --prompt "def "`.

The function for programs is `mics_models.sample`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from mics_core.checkpoint import read_weights
from mics_models.data import load, standard_library
from mics_models.gpt import GPT, GPTConfig
from mics_models.sampling import sample
from mics_models.sentences import sentence
from mics_models.training.batches import configure
from mics_models.training.settings import read as read_settings


def load_model(config: GPTConfig, checkpoint: Path) -> GPT:
    """The model with a checkpoint's weights, whole, in this process. No pickle of it is run, and damage is found."""
    with torch.device("meta"):  # nothing is drawn that the checkpoint overwrites
        model = GPT(config)
    try:
        model.load_state_dict(read_weights(checkpoint), assign=True)
    except RuntimeError as error:  # torch's, of names and shapes, has several lines
        raise ValueError(" ".join(str(error).split())) from error
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
        settings = read_settings(chosen.run / "settings.toml", ())
        config = configure(settings.model)
        if not isinstance(config, GPTConfig):
            name = settings.model.name
            raise ValueError(f"generate: {name} restores masked tokens, expected a GPT: name a run of one")
        model = load_model(config, chosen.checkpoint or chosen.run).to("cuda" if torch.cuda.is_available() else "cpu")
        corpus = load(Path(settings.data.folder)) if settings.data.folder else standard_library()
        prompt = corpus.encode(chosen.prompt)
        tokens = sample(model, prompt, chosen.tokens, temperature=chosen.temperature, seed=chosen.seed)
    except (ValueError, OSError) as error:
        print(f"generate: {sentence(error).removeprefix('generate: ')}", file=sys.stderr)
        return 2
    print(corpus.decode(tokens.cpu()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
