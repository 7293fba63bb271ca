"""Forwards and losses that ask for gradients themselves work in every pass, as they do in plain training."""

import pytest
import torch
from networks import batches, cross_entropy, grads, mlp, perturbed, random_state, same, values
from torch import Tensor, nn

from esam_kernels import ESAM, batch_closure

INPUTS, TARGETS = batches(1)[0]


class Field(nn.Module):
    """A physics-informed network: the derivative of its output by its input is part of the output."""

    def __init__(self, derivative) -> None:
        super().__init__()
        self.inner, self.derivative = mlp(), derivative
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.derivative(self.inner, x)


def by_grad(net, x):
    x = x.detach().requires_grad_()
    outputs = net(x)
    (slope,) = torch.autograd.grad(outputs.sum(), x, create_graph=True)
    return outputs + slope.square().mean(1, keepdim=True)


def by_backward(net, x):
    """Finds None in x.grad where there is no graph, if it checks that first."""
    x = x.detach().requires_grad_()
    outputs = net(x)
    if outputs.requires_grad:
        outputs.sum().backward(inputs=[x], create_graph=True)
    return outputs + x.grad.square().mean(1, keepdim=True)


def by_asserting(net, x):
    outputs = net(x)
    assert outputs.requires_grad
    return outputs


def by_hook(net, x):
    outputs = net(x)
    outputs.register_hook(lambda grad: grad)
    return outputs


def by_retaining(net, x):
    outputs = net(x)
    outputs.retain_grad()
    return outputs


def by_func(net, x):
    slope = torch.func.vmap(torch.func.jacrev(net))(x)
    return net(x) + slope.square().mean((1, 2))[:, None]


def by_second_order(net, x):
    x = x.detach().requires_grad_()
    outputs = net(x)
    (slope,) = torch.autograd.grad(outputs.sum(), x, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
    return outputs + bend.square().mean(1, keepdim=True)


def by_an_inner_step(net, x):
    """As meta-learning does: the outputs at weights that a step on the inputs has moved."""
    params = dict(net.named_parameters())
    inner = torch.func.functional_call(net, params, (x,)).square().mean()
    slopes = torch.autograd.grad(inner, list(params.values()), create_graph=True)
    moved = {name: param - 0.1 * slope for (name, param), slope in zip(params.items(), slopes)}
    return torch.func.functional_call(net, moved, (x,))


DERIVATIVES = [
    by_grad, by_backward, by_asserting, by_hook, by_retaining, by_func, by_second_order, by_an_inner_step
]  # fmt: skip
derivatives = pytest.mark.parametrize("derivative", DERIVATIVES)


@derivatives
def test_the_gradient_is_that_at_the_perturbed_weights(derivative):
    model = Field(derivative)
    rows = []
    closure = batch_closure(model, cross_entropy, INPUTS, TARGETS)
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.2, beta=1.0, model=model)
    there = perturbed(model, lambda net: cross_entropy(net(INPUTS), TARGETS).mean(), rho=0.2)
    before = values(model.inner)
    optimizer.backward(lambda index: rows.append(index) or closure(index))
    assert same(values(model.inner), before)
    rise = cross_entropy(there(INPUTS), TARGETS) - cross_entropy(model(INPUTS), TARGETS)
    assert rows[-1].tolist() == rise.topk(4).indices.sort().values.tolist()
    there.zero_grad()
    cross_entropy(there(INPUTS[rows[-1]]), TARGETS[rows[-1]]).mean().backward()
    for mine, theirs in zip(grads(model), grads(there)):
        torch.testing.assert_close(mine, theirs)


@derivatives
def test_it_is_found_out_once_and_each_pass_counts_once(derivative):
    model = Field(derivative)
    runs = []
    model.inner[0].register_forward_pre_hook(lambda *_: runs.append(1))
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1)
    counts = []
    for _ in range(3):
        optimizer.step(batch_closure(model, cross_entropy, INPUTS, TARGETS))
        counts.append(len(runs))
    assert counts[2] - counts[1] == counts[1] - counts[0] <= counts[0]
    assert model.calls == 3  # of the first pass of each step


def test_a_loss_with_a_gradient_penalty():
    model = mlp()
    inputs = INPUTS.clone().requires_grad_()
    seen = []

    def closure(index):
        rows = inputs if index is None else inputs[index]
        outputs = model(rows)
        (slope,) = torch.autograd.grad(outputs.sum(), rows, create_graph=True)
        seen.append(slope.requires_grad)
        return cross_entropy(outputs, TARGETS if index is None else TARGETS[index]) + slope.norm(dim=1)

    ESAM(model.parameters(), torch.optim.SGD, lr=0.1).step(closure)
    assert seen == [True] * 3


@pytest.mark.parametrize("error", [RuntimeError("the data is gone"), AssertionError, TypeError, InterruptedError])
def test_another_error_in_the_look_pass_is_raised(error):
    model = mlp(nn.Dropout())
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1)
    before, calls = values(model), []

    def failing(outputs, targets):
        calls.append(1)
        if len(calls) > 1:
            raise error
        return cross_entropy(outputs, targets)

    state = random_state()
    with pytest.raises(error if isinstance(error, type) else type(error)):
        optimizer.backward(batch_closure(model, failing, INPUTS, TARGETS))
    assert same(values(model), before)
    assert random_state() == state
    seen = []
    closure = batch_closure(model, cross_entropy, INPUTS, TARGETS)
    optimizer.step(lambda index: seen.append(torch.is_grad_enabled()) or closure(index))
    assert seen == [True, False, True]  # it has not been taken for a forward that needs a graph


class Reversible(torch.autograd.Function):
    """Computes its block anew in its backward, as layers do that save no activations, and runs its backward there."""

    @staticmethod
    def forward(ctx, x, block):
        ctx.block = block
        ctx.save_for_backward(x)
        with torch.no_grad():
            return block(x)

    @staticmethod
    def backward(ctx, grad):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            torch.autograd.backward(ctx.block(x), grad)
        return x.grad, None


class WithReversible(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.block, self.last = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(Reversible.apply(self.first(x), self.block))


@pytest.mark.parametrize("by_another", [False, True], ids=["rho = 0", "of another optimizer"])
def test_a_backward_inside_the_backward_counts_once(by_another):
    torch.manual_seed(0)
    model = WithReversible()
    cross_entropy(model(INPUTS), TARGETS).mean().backward()
    expected = [param.grad for param in model.parameters()]
    groups = [
        {"params": [*model.first.parameters(), *model.last.parameters()]},
        {"params": model.block.parameters(), "rho": 0.0},
    ]
    groups = groups[:1] if by_another else groups
    optimizer = ESAM(groups, torch.optim.SGD, lr=0.1, rho=1e-9, beta=1, gamma=1)
    model.zero_grad()
    optimizer.backward(batch_closure(model, cross_entropy, INPUTS, TARGETS))
    for param, grad in zip(model.parameters(), expected):
        torch.testing.assert_close(param.grad, grad)
