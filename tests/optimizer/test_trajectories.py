"""ESAM takes the steps of its definition: SAM's in the limit beta = gamma = 1, the base optimizer's at rho = 0."""

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

from esam_kernels import ESAM, batch_closure
from esam_kernels.ops import ElementMask
from esam_kernels.passes.draw import draw_tensors

STEPS = 20
BATCH = 24
BASES = {
    "sgd": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.05}),
}
cross_entropy = nn.CrossEntropyLoss(reduction="none")


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(1)
    layers = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.GELU(), nn.Conv2d(6, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(64, 16), nn.Tanh()
    )
    return layers.append(nn.Linear(16, 5)).to(dtype)


def batches(dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [
        (torch.randn(BATCH, 2, 8, 8, generator=generator).to(dtype), torch.randint(5, (BATCH,), generator=generator))
        for _ in range(STEPS)
    ]


def train(optimizer: ESAM, model: nn.Module, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    for inputs, targets in batches(dtype):
        optimizer.backward(batch_closure(model, cross_entropy, inputs, targets))
        optimizer.step()
    return list(model.parameters())


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("granularity", ["tensor", "element"])
def test_beta_and_gamma_of_one_are_sam(base: str, adaptive: bool, granularity: str) -> None:
    kind, options = BASES[base]
    rho = 0.5 if adaptive else 0.05
    ours, theirs = network(), network()
    sam = pytest.importorskip("pytorch_optimizer").SAM(theirs.parameters(), kind, rho=rho, adaptive=adaptive, **options)
    for inputs, targets in batches():

        def closure(inputs: Tensor = inputs, targets: Tensor = targets) -> None:
            sam.zero_grad()
            cross_entropy(theirs(inputs), targets).mean().backward()

        closure()
        sam.step(closure)
    esam = ESAM(
        ours.parameters(), kind, rho=rho, beta=1, gamma=1, adaptive=adaptive, granularity=granularity, **options
    )
    start = copy.deepcopy(list(ours.parameters()))
    for a, b, s in zip(train(esam, ours), theirs.parameters(), start):
        assert (b - s).norm() > 1e-3 * s.norm(), "the run must have gone somewhere"
        assert (a - b).norm() <= 1e-6 * b.norm()


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rho_of_zero_is_the_base_optimizer_bit_for_bit(base: str, dtype: torch.dtype) -> None:
    kind, options = BASES[base]
    ours, theirs = network(dtype), network(dtype)
    plain = kind(theirs.parameters(), **options)
    for inputs, targets in batches(dtype):
        plain.zero_grad()
        cross_entropy(theirs(inputs), targets).mean().backward()
        plain.step()
    for a, b in zip(train(ESAM(ours.parameters(), kind, rho=0, **options), ours, dtype), theirs.parameters()):
        assert torch.equal(a, b)


def transcribed_steps(
    model: nn.Module, rho: list[float], adaptive: list[bool], beta: float, gamma: float, granularity: str, seed: int
) -> list[Tensor]:
    """The design's table in float64, one line a row, with plain SGD as the base; only the draws are ESAM's."""
    w = [p.detach().clone().requires_grad_() for p in model.parameters()]
    names = [name for name, _ in model.named_parameters()]
    perturbed = [i for i in range(len(w)) if rho[i] > 0]

    def losses(weights: list[Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(torch.func.functional_call(model, dict(zip(names, weights)), (inputs,)), targets)

    for step, (inputs, targets) in enumerate(batches()):
        if granularity == "tensor":
            kept = {perturbed[i] for i in draw_tensors(perturbed, beta, seed, step)}
            m = [torch.full_like(p, i in kept, dtype=torch.float64) for i, p in enumerate(w)]
        else:
            mask = ElementMask(seed, step, range(len(w)), beta)
            m = [mask.keep(i, p).double() * (i in perturbed) for i, p in enumerate(w)]
        before = losses(w, inputs, targets)
        g = torch.autograd.grad(before.mean(), w)
        a = [p.abs() if x else torch.ones_like(p) for p, x in zip(w, adaptive)]
        norm = sum((m_ * a_ * g_).square().sum() for m_, a_, g_ in zip(m, a, g)).sqrt()
        e = [r / beta * m_ * a_**2 * g_ / (norm + 1e-12) for r, m_, a_, g_ in zip(rho, m, a, g)]
        moved = [(p + e_).detach().requires_grad_() for p, e_ in zip(w, e)]
        increase = (losses(moved, inputs, targets) - before).tolist()
        k = max(1, int(gamma * BATCH))
        chosen = sorted(sorted(range(BATCH), key=lambda i: (-increase[i], i))[:k])
        gradient = torch.autograd.grad(losses(moved, inputs[chosen], targets[chosen]).mean(), moved)
        w = [(p - 0.1 * g_).detach().requires_grad_() for p, g_ in zip(w, gradient)]
    return w


@pytest.mark.parametrize(
    ("granularity", "beta", "gamma"),
    [*itertools.product(["tensor", "element"], [0.6], [0.5, 1.0]), ("tensor", 0.05, 0.01)],
)
def test_esam_is_the_design_s_table(granularity: str, beta: float, gamma: float) -> None:
    """Also with a rho and an adaptive of each group: its last layer is left alone, its first is adaptive."""
    model = network()
    groups = [
        {"params": model[0].parameters(), "rho": 0.8, "adaptive": True},
        {"params": model[2].parameters()},
        {"params": model[5].parameters(), "rho": 0.2},
        {"params": model[7].parameters(), "rho": 0.0},
    ]
    rho, adaptive = [0.8] * 2 + [0.1] * 2 + [0.2] * 2 + [0.0] * 2, [True] * 2 + [False] * 6
    expected = transcribed_steps(copy.deepcopy(model), rho, adaptive, beta, gamma, granularity, seed=2**40 + 3)
    settings = {"rho": 0.1, "beta": beta, "gamma": gamma, "granularity": granularity, "seed": 2**40 + 3}
    for a, b in zip(train(ESAM(groups, torch.optim.SGD, lr=0.1, **settings), model), expected):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-9, atol=1e-11)
