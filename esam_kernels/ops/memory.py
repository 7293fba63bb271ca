"""Where tensors lie in memory, and which of them share elements."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from .reference import is_dense


def span(tensor: Tensor) -> tuple[int, int]:
    """The addresses that its elements lie between."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def addresses(tensor: Tensor) -> Tensor:
    """The address of each of its bytes, int64."""
    places = torch.zeros((), dtype=torch.int64, device="cpu")
    for size, stride in zip(tensor.shape, tensor.stride()):
        places = places[..., None] + torch.arange(size, device="cpu") * stride
    size = tensor.element_size()
    return tensor.data_ptr() + (places.flatten()[:, None] * size + torch.arange(size, device="cpu")).flatten()


def two_that_share(tensors: Sequence[Tensor]) -> tuple[int, int] | None:
    """The places of two tensors in the list that have an element in common; None if there are no such two."""
    spans = sorted((*span(x), i) for i, x in enumerate(tensors) if x.numel() > 0 and x.device.type != "meta")
    for place, (_, end, i) in enumerate(spans):
        for start, _, j in itertools.islice(spans, place + 1, None):
            if start >= end:
                break
            one, other = tensors[i], tensors[j]
            if (is_dense(one) and is_dense(other)) or torch.isin(addresses(one), addresses(other)).any():
                return min(i, j), max(i, j)
    return None
