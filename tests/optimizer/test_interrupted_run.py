"""Runs that end too early, memory that does not suffice, data that is broken: nothing is lost that can be kept."""

import gc
import os
import random
import signal
import time
import weakref
from pathlib import Path

import forks
import pytest
import torch
import training_run
from networks import batches, cross_entropy, grads, mlp, same, train, values
from torch import Tensor, nn

from esam_kernels import ESAM, batch_closure

DATA = batches(6)


def run_until(signum: int, seconds: float, folder: Path) -> int | None:
    """Train in a process of its own, and send it the signal so long after its first checkpoint."""
    context = forks.context()
    saved = context.Event()
    process = context.Process(target=training_run.main, args=(folder, saved.set))
    process.start()
    assert saved.wait(60)
    time.sleep(seconds)
    assert process.pid is not None
    os.kill(process.pid, signum)
    process.join(60)
    return process.exitcode


def test_a_run_killed_again_and_again_ends_as_one_never_killed(tmp_path):
    moments = random.Random(0)
    steps = 0
    for signum in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        code = run_until(signum, moments.uniform(0.0, 0.3), tmp_path)
        assert code == (-signal.SIGKILL if signum == signal.SIGKILL else 0)
        resumed = training_run.Run()
        resumed.load(tmp_path)
        assert resumed.steps > steps
        steps = resumed.steps

    for _ in range(3):
        resumed.step()
    never_killed = training_run.Run()
    while never_killed.steps < resumed.steps:
        never_killed.step()
    assert same(values(never_killed.model), values(resumed.model))
    ones, others = never_killed.optimizer.state_dict(), resumed.optimizer.state_dict()
    assert ones["param_groups"] == others["param_groups"]
    for name in ("exp_avg", "exp_avg_sq", "step"):
        assert same(*([state[name] for state in of["state"].values()] for of in (ones, others)))


# Out of memory.


class Limited(nn.Module):
    """A network for which memory runs out, once, in one of its forwards or backwards."""

    def __init__(self, at: int, when: str) -> None:
        super().__init__()
        self.layers = mlp(nn.BatchNorm1d(8), nn.Dropout())
        self.at, self.when, self.calls = at, when, 0
        self.activations: list[weakref.ref[Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        fails = self.calls == self.at
        hidden = self.layers[0](x)
        self.activations.append(weakref.ref(hidden))
        if fails and self.when == "forward":
            self.run_out()
        if fails and self.when == "backward":
            hidden.register_hook(self.run_out)
        return self.layers[1:](hidden)

    def run_out(self, *_: Tensor) -> None:
        raise torch.OutOfMemoryError("tried to allocate 20.00 GiB")


# The calls of a step are those of passes 1, 2 and 3; the second has no backward.
@pytest.mark.parametrize(
    ("at", "when"), [(1, "forward"), (1, "backward"), (2, "forward"), (3, "forward"), (3, "backward")]
)
def test_running_out_of_memory_leaves_everything_as_before_and_frees_what_the_step_held(at, when):
    model, spared = Limited(at + 3, when), Limited(0, when)
    optimizers = [ESAM(m.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.1) for m in (model, spared)]
    for network, optimizer in zip((model, spared), optimizers):
        torch.manual_seed(1)
        train(network, optimizer, DATA[:1])
    before, random_state = values(model), torch.get_rng_state()
    with pytest.raises(torch.OutOfMemoryError):
        optimizers[0].step(batch_closure(model, cross_entropy, *DATA[1]))
    assert same(values(model), before)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(param.grad is None for param in model.parameters())
    gc.collect()
    assert all(activation() is None for activation in model.activations)

    # What people do then: the same batch again, in two halves.
    halves = list(zip(*(tensor.chunk(2) for tensor in DATA[1])))
    for network, optimizer in zip((model, spared), optimizers):
        torch.set_rng_state(random_state)
        optimizer.step([batch_closure(network, cross_entropy, *half) for half in halves])
        train(network, optimizer, DATA[2:])
    assert same(values(model), values(spared))


# Broken data.


class Broken(nn.Module):
    """A network that gives NaN for the first row of what it is called with, in one of its calls."""

    def __init__(self, at: int | None) -> None:
        super().__init__()
        self.layers = mlp(nn.LayerNorm(8))
        self.at, self.calls = at, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.at:
            x = torch.cat([x[:1] * torch.nan, x[1:]])
        return self.layers(x)


@pytest.mark.parametrize("interval", [1, 2])
@pytest.mark.parametrize("at", [1, 2, 3, None])
def test_nan_in_any_pass_leaves_the_weights_and_a_step_that_is_skipped_leaves_no_trace(at, interval):
    """``at=None``: the row is NaN in the data, and so in all passes."""
    model, spared = Broken(at), Broken(0)
    options = {"lr": 0.1, "momentum": 0.9, "rho": 0.1, "interval": interval}
    optimizer, other = (ESAM(m.parameters(), torch.optim.SGD, **options) for m in (model, spared))
    before = values(model)
    inputs, targets = DATA[0][0].clone(), DATA[0][1]
    if at is None:
        inputs[3] = torch.nan
    loss = optimizer.backward(batch_closure(model, cross_entropy, inputs, targets))
    assert same(values(model), before)
    if at is None:
        assert loss.isnan()
        assert all(grad.isnan().any() for grad in grads(model))  # it does not hide behind the selection
    if at == 1:  # the perturbation has no direction: nothing is perturbed, and the other passes are of the weights
        assert loss.isnan()
        assert all(grad.isfinite().all() for grad in grads(model))
    if at == 2:  # NaN counts as the largest increase: the row is selected
        assert all(grad.isfinite().all() for grad in grads(model))
    if at == 3:
        assert loss.isfinite()
        assert all(grad.isnan().any() for grad in grads(model))

    optimizer.zero_grad()  # the step is not taken
    other.backward(batch_closure(spared, cross_entropy, *DATA[0]))
    train(model, optimizer, DATA[1:])
    train(spared, other, DATA[1:])
    assert same(values(model), values(spared))
