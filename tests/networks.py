"""Networks and batches that are tiny, so that hundreds of steps take no time."""

import copy
import random
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn

from esam_kernels import ESAM, batch_closure

cross_entropy = nn.CrossEntropyLoss(reduction="none")

BASES = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
}


def mlp(*extra: nn.Module, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Four features to three classes; what is extra stands in the middle and sees eight features."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), *extra, nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def batches(
    count: int, size: int = 8, seed: int = 0, dtype: torch.dtype = torch.float32
) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 4, generator=generator).to(dtype), torch.randint(3, (size,), generator=generator))
        for _ in range(count)
    ]


def train(model: nn.Module, optimizer: ESAM, data: Iterable[tuple[Tensor, Tensor]]) -> None:
    for inputs, targets in data:
        optimizer.step(batch_closure(model, cross_entropy, inputs, targets))


def values(model: nn.Module) -> list[Tensor]:
    """Copies of all weights and buffers."""
    return [tensor.detach().clone() for tensor in (*model.parameters(), *model.buffers())]


def same(these: Iterable[Tensor], those: Iterable[Tensor]) -> bool:
    """Whether all bits are the same."""
    these, those = list(these), list(those)
    return len(these) == len(those) and all(
        a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.isnan(), b.isnan())
        for a, b in zip(these, those)
    )


def grads(model: nn.Module) -> list[Tensor | None]:
    return [None if param.grad is None else param.grad.clone() for param in model.parameters()]


def perturbed(model: nn.Module, loss: Callable[[nn.Module], Tensor], rho: float) -> nn.Module:
    """A copy of the model at w + e with beta = 1, computed here from the definition; loss is that of pass 1."""
    moved = copy.deepcopy(model)
    params = [param for param in moved.parameters() if param.requires_grad]
    ascent = torch.autograd.grad(loss(moved), params, allow_unused=True)
    norm = torch.stack([g.double().square().sum() for g in ascent if g is not None]).sum().sqrt()
    with torch.no_grad():
        for param, g in zip(params, ascent):
            if g is not None:
                param += rho * g / (norm.to(param.dtype) + 1e-12)
    return moved


def random_state() -> tuple:
    """Of every generator that a forward may draw from, as something that can be compared."""
    _, words, place, *_ = np.random.get_state()  # noqa: NPY002, the one that code without a Generator shares
    return torch.get_rng_state().tolist(), random.getstate(), words.tolist(), place
