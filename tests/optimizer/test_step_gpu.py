"""A step on a GPU: no host-device sync, weights back bit for bit, and the gradient of the same step on the CPU."""

import copy

import pytest
import torch
from torch import nn

from esam_kernels import ESAM, batch_closure

pytestmark = pytest.mark.gpu
cross_entropy = nn.CrossEntropyLoss(reduction="none")


def a_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1), nn.Flatten(), nn.Linear(288, 10)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"granularity": "element", "adaptive": True},
        {"selection": "loss"},
        {"selection": "random"},
        {"steering_dtype": torch.bfloat16},
        {"interval": 2},
        {"ascent": "momentum"},
        {"ascent": "momentum", "selection": "random"},
        {"ascent": "previous", "gamma": 1.0},
        {"ascent_share": 0.25, "gamma": 1.0},
        {"ascent_share": 0.25, "start": 2},
    ],
    ids=str,
)
def test_a_step_makes_no_sync(options: dict, dtype: torch.dtype) -> None:
    model = a_network().to("cuda", dtype)
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, **options)
    halves = torch.randn(2, 16, 3, 8, 8, device="cuda", dtype=dtype)
    targets = torch.randint(10, (16,), device="cuda")

    def step() -> None:
        optimizer.backward([batch_closure(model, cross_entropy, half, targets) for half in halves])
        optimizer.step()

    for _ in range(4):  # compiles the kernels for every kind of step
        step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("options", [{}, {"ascent": "previous"}, {"granularity": "element", "interval": 2}], ids=str)
def test_an_ordinary_closure_over_several_bases_makes_no_sync(options: dict) -> None:
    model = a_network().cuda()
    params = list(model.parameters())
    bases = [
        torch.optim.SGD([param for param in params if param.dim() > 1], lr=0.1, momentum=0.9),
        torch.optim.AdamW([param for param in params if param.dim() == 1]),
    ]
    optimizer = ESAM(None, bases, gamma=1, **options)
    inputs, targets = torch.randn(16, 3, 8, 8, device="cuda"), torch.randint(10, (16,), device="cuda")
    found = []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(model(inputs), targets).mean()
        loss.backward()
        return loss

    for _ in range(4):
        optimizer.step(closure)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            optimizer.step(closure)
            found.append(optimizer.last_step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(float(last.loss) > 0 and last.loss.is_cuda for last in found)
    assert all(float(last.norm) > 0 and last.norm.is_cuda for last in found if last.sharp)


def test_a_scaler_waits_for_the_device_in_its_own_step_alone() -> None:
    model, scaler = a_network().cuda(), torch.amp.GradScaler("cuda")
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    inputs, targets = torch.randn(16, 3, 8, 8, device="cuda"), torch.randint(10, (16,), device="cuda")
    try:
        for step in range(8):
            torch.cuda.set_sync_debug_mode("default" if step < 4 else "error")  # at first kernels are compiled
            with torch.autocast("cuda", torch.float16):
                optimizer.backward(batch_closure(model, cross_entropy, inputs, targets), scaler)
            torch.cuda.set_sync_debug_mode("default")
            scaler.step(optimizer)
            scaler.update()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("granularity", ["tensor", "element"])
def test_the_gradient_is_the_cpu_s(granularity: str) -> None:
    """In float64, so that both devices select the same samples; the masks are the same bits anyway."""
    on_cpu = a_network().double()
    on_cpu[3].p = 0.0  # the devices' random numbers differ
    on_gpu = copy.deepcopy(on_cpu).to("cuda")
    inputs, targets = torch.randn(32, 3, 8, 8, dtype=torch.float64), torch.randint(10, (32,))
    for model in (on_cpu, on_gpu):
        device = next(model.parameters()).device
        optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.5, granularity=granularity)
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.backward(batch_closure(model, cross_entropy, inputs.to(device), targets.to(device)))
        assert all(map(torch.equal, model.parameters(), before))
    for a, b in zip(on_gpu.parameters(), on_cpu.parameters()):
        torch.testing.assert_close(a.grad.cpu(), b.grad, rtol=1e-7, atol=1e-9)
