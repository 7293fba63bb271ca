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


def two_that_share(tensors: Sequence[Tensor], first: int | None = None) -> tuple[int, int] | None:
    """The places of two tensors in the list that have an element in common; None if there are no such two.

    Args:
        tensors: dense ones; what has no memory shares none.
        first: one of the two is to be among so many first ones; None takes any two.
    """
    spans = sorted((*span(x), i) for i, x in enumerate(tensors) if x.numel() > 0 and x.data_ptr() != 0)
    for place, (_, end, i) in enumerate(spans):
        for start, _, j in itertools.islice(spans, place + 1, None):
            if start >= end:
                break
            if first is not None and min(i, j) >= first:
                continue
            one, other = tensors[i], tensors[j]
            if (is_dense(one) and is_dense(other)) or torch.isin(addresses(one), addresses(other)).any():
                return min(i, j), max(i, j)
    return None


def read_only(tensors: Sequence[Tensor]) -> set[int]:
    """The ids of those in memory that this process may not write, such as files mapped for reading; a write ends it."""
    # Such memory is not torch's own, which can be resized.
    foreign = [x for x in tensors if x.device.type == "cpu" and has_address(x) and not x.untyped_storage().resizable()]
    if not foreign:
        return set()
    try:
        with open("/proc/self/maps") as file:
            rows = [line.split(maxsplit=2)[:2] for line in file]
    except OSError:  # no Linux
        return set()
    ranges = [tuple(int(end, 16) for end in places.split("-")) for places, mode in rows if "w" not in mode]
    return {id(x) for x in foreign if any(begin <= x.data_ptr() < end for begin, end in ranges)}


def has_address(tensor: Tensor) -> bool:
    """Whether its elements lie in one piece of memory, as those of sparse, nested and meta tensors do not."""
    return tensor.layout == torch.strided and not tensor.is_nested and tensor.data_ptr() != 0
