"""Random numbers that are the same in every run."""

import torch


def seeded(seed: int) -> torch.Generator:
    """For tensors of the device on which they are made if none is named: on GPUs that is the rank's."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)
