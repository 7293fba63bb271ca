"""Tensors of CUDA graphs, such as those of ``torch.compile(mode="reduce-overhead")``: the next run overwrites them."""

import torch
from torch import Tensor


def outlasting(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it if it lies in a graph's memory, for who needs it when the graph has run again."""
    # As torch's own graphs say of their outputs to autograd.
    return tensor.clone() if torch._C._is_cached_tensor(tensor) else tensor  # type: ignore[attr-defined]
