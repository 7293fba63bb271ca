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


class Split(nn.Module):
    """A model over two devices, as pipelines and offloaded parts have it."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 300).to(first), nn.Linear(300, 10).to(second)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.first(inputs.to(self.first.weight.device)))
        return self.second(hidden.to(self.second.weight.device))


@pytest.mark.parametrize(
    "options", [{}, {"gamma": 1.0, "beta": 1.0, "adaptive": True}, {"granularity": "element"}], ids=str
)
@pytest.mark.parametrize("devices", [("cuda:0", "cpu"), ("cpu", "cuda:0"), ("cuda:1", "cuda:0")], ids=str)
def test_a_model_over_several_devices_takes_the_steps_of_one(devices: tuple[str, str], options: dict) -> None:
    if torch.cuda.device_count() < sum("cuda" in device for device in devices):
        pytest.skip("needs two CUDA devices")
    inputs, targets = torch.randn(32, 6, dtype=torch.float64), torch.randint(10, (32,))
    models = [Split("cpu", "cpu").double(), Split(*devices).double()]
    for model in models:
        optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.5, **options)
        for _ in range(3):
            optimizer.backward(batch_closure(model, cross_entropy, inputs, targets.to(model.second.weight.device)))
            optimizer.step()
    for a, b in zip(*(model.parameters() for model in models)):
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=1e-7, atol=1e-9)


def test_a_step_in_another_stream_is_ordered_by_it_alone() -> None:
    """Behind a busy stream, as in prefetching loops: nothing of the step may run in the default stream."""
    found = []
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        model = a_network().cuda()
        model[3].p = 0.0
        optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.5)
        inputs, targets = torch.empty(16, 3, 8, 8, device="cuda"), torch.zeros(16, dtype=torch.int64, device="cuda")
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            for number in range(4):
                torch.cuda._sleep(20_000_000)
                inputs.copy_(torch.linspace(-1, 1, inputs.numel(), device="cuda").view_as(inputs) * (number + 1))
                targets.copy_(torch.arange(16, device="cuda") % 10)
                optimizer.backward(batch_closure(model, cross_entropy, inputs, targets))
                optimizer.step()
        torch.cuda.synchronize()
        found.append([param.detach().clone() for param in model.parameters()])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # convolutions may add up in another order


def test_a_network_of_thousands_of_tensors_takes_the_cpu_s_step() -> None:
    """More than a launch takes, many of them not aligned to 16 bytes, as views of one memory are."""
    grads = []
    for device in ("cpu", "cuda"):
        memory = torch.linspace(-1, 1, 3 * 2500 + 1, dtype=torch.float64).to(device)
        params = [nn.Parameter(memory[3 * i + 1 : 3 * i + 4]) for i in range(2500)]
        optimizer = ESAM(params, torch.optim.SGD, lr=0.1, rho=0.5, gamma=1.0)
        before = [param.detach().clone() for param in params]

        def closure(index: torch.Tensor | None, params: list = params) -> torch.Tensor:
            return torch.cat(list(params)).square().sum().view(1)

        optimizer.backward(closure)
        assert all(map(torch.equal, params, before))
        grads.append(torch.cat([param.grad.cpu() for param in params]))
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", [{"gamma": 1.0, "beta": 1.0}, {}, {"ascent": "momentum", "gamma": 1.0}], ids=str)
def test_a_model_that_runs_as_cuda_graphs_takes_the_same_steps(options: dict) -> None:
    found = []
    inputs, targets = torch.randn(4, 32, 6, device="cuda"), torch.randint(10, (4, 32), device="cuda")
    for compiled in (False, True):
        model = Split("cuda", "cuda")
        called = torch.compile(model, mode="reduce-overhead", dynamic=False) if compiled else model
        optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.5, **options)
        for _ in range(3):
            losses = [optimizer.step(batch_closure(called, cross_entropy, x, y)) for x, y in zip(inputs, targets)]
        found.append([*losses, *model.parameters()])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)  # TF32 or not, fused or not
