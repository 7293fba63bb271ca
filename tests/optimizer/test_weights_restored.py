"""A thousand perturbations leave every weight as it was, bit for bit."""

import pytest
import torch
from torch import Tensor, nn

from esam_kernels import ESAM

ROUNDS = 1000


class OddWeights(nn.Module):
    """Weights of every kind of layout and size; the tied one is used twice."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.plain = nn.Parameter(torch.randn(5, 7, dtype=dtype))
        self.channels_last = nn.Parameter(torch.randn(3, 4, 2, 2, dtype=dtype).to(memory_format=torch.channels_last))
        self.transposed = nn.Parameter(torch.randn(6, 4, dtype=dtype).t())
        self.scalar = nn.Parameter(torch.tensor(0.3, dtype=dtype))
        self.empty = nn.Parameter(torch.empty(0, 3, dtype=dtype))
        self.misaligned = nn.Parameter(torch.randn(12, dtype=dtype)[1:])
        self.tied = self.plain

    def forward(self, index: Tensor | None) -> Tensor:
        total = sum(p.float().sin().sum() for p in self.parameters()) + self.tied.float().square().sum()
        losses = torch.arange(1.0, 5.0) * total
        return losses if index is None else losses[index]


@pytest.mark.parametrize("granularity", ["tensor", "element"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_thousand_rounds_change_no_bit(dtype: torch.dtype, granularity: str) -> None:
    model = OddWeights(dtype)
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.7, granularity=granularity)
    start = [p.detach().clone() for p in model.parameters()]
    moved = [False] * len(start)

    def closure(index: Tensor | None) -> Tensor:
        for i, (p, s) in enumerate(zip(model.parameters(), start)):
            moved[i] |= not torch.equal(p, s)
        return model(index)

    for _ in range(ROUNDS):
        optimizer.backward(closure)
    for p, s in zip(model.parameters(), start):
        assert torch.equal(p, s)
        assert p.stride() == s.stride()
    assert moved == [p.numel() > 0 for p in start], "every weight with elements must have been perturbed in some round"
