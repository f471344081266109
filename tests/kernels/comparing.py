"""What it means for two tensors to be the same: the same bits."""

import torch

_CARRIERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's memory as integers; every NaN as the same one, for which NaN comes out is up to the hardware."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype.is_floating_point and tensor.element_size() > 1:
        tensor = torch.where(tensor.isnan(), torch.nan, tensor)
    return tensor.view(_CARRIERS[tensor.element_size()])


def assert_same_bits(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    different = (bits(got) != bits(expected)).nonzero()
    assert not len(different), (
        f"{len(different)} of {got.numel()} elements differ, first at {different[0].tolist()}: "
        f"got {got[tuple(different[0])]}, expected {expected[tuple(different[0])]}"
    )
