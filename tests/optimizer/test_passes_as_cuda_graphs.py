"""A step is right where a CUDA graph runs the model, whose outputs and gradients the next run overwrites.

On a CPU such a model is made of static memory.
"""

import pytest
import torch
from networks import BASES, batches, cross_entropy, mlp
from torch import nn

from esam_kernels import ESAM, batch_closure

CONFIGURATIONS = {
    "default": {},
    "SAM": {"beta": 1.0, "gamma": 1.0},
    "by loss": {"selection": "loss"},
    "random": {"selection": "random"},
    "over all": {"select_over": "all"},
    "elements": {"granularity": "element"},
    "a share": {"ascent_share": 0.5},
    "momentum": {"ascent": "momentum", "gamma": 1.0},
    "surveyed momentum": {"ascent": "momentum"},
    "previous": {"ascent": "previous", "gamma": 1.0},
}


class StaticMemory:
    """Where the outputs and gradients of every shape lie, in each run again."""

    def __init__(self):
        self.tensors = {}

    def write(self, what, values):
        """Copies of the values where those before them were; autograd takes them as they are, without a copy."""
        static = self.tensors.setdefault(what, [torch.empty_like(value) for value in values])
        for memory, value in zip(static, values):
            memory.copy_(value)
        return [memory.detach() for memory in static]


@pytest.fixture
def memory():
    return StaticMemory()


class Replay(torch.autograd.Function):
    """A run of the graph, forward and backward."""

    @staticmethod
    def forward(ctx, owner, inputs, *params):
        with torch.enable_grad():
            ctx.outputs = owner.inner(inputs)
        ctx.owner, ctx.params, ctx.shape = owner, params, inputs.shape
        (outputs,) = owner.memory.write(("outputs", inputs.shape), [ctx.outputs.detach()])
        return outputs

    @staticmethod
    def backward(ctx, grad):
        grads = torch.autograd.grad(ctx.outputs, ctx.params, grad)
        return None, None, *ctx.owner.memory.write(("gradients", ctx.shape), grads)


class Graphed(nn.Module):
    def __init__(self, inner, memory):
        super().__init__()
        self.inner, self.memory = inner, memory

    def forward(self, inputs):
        return Replay.apply(self, inputs, *self.inner.parameters())


def test_the_next_run_overwrites_outputs_and_gradients(memory):
    model = Graphed(nn.Linear(2, 2), memory)
    outputs = model(torch.ones(3, 2))
    outputs.sum().backward()
    before = [outputs.detach().clone(), model.inner.weight.grad.clone()]
    model(torch.zeros(3, 2)).sum().backward()
    assert not torch.equal(outputs, before[0])
    assert torch.equal(model.inner.weight.grad, torch.zeros(2, 2))  # and not what the first run has left, plus 0


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_steps_are_those_of_the_same_model_without_graphs(memory, name):
    plain = mlp()
    inner = mlp()
    inner.load_state_dict(plain.state_dict())
    base, options = BASES["sgd"]
    losses = []
    for model, called in ((plain, plain), (inner, Graphed(inner, memory))):
        optimizer = ESAM(model.parameters(), base, **options, rho=0.5, **CONFIGURATIONS[name])
        torch.manual_seed(1)
        found = []
        for inputs, targets in batches(4, size=12):
            found.append(optimizer.backward(batch_closure(called, cross_entropy, inputs, targets)))
            optimizer.step()
        losses.append(found)
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), inner.state_dict().values()))
    assert all(torch.equal(a, b) for a, b in zip(*losses))


class WithLoss(nn.Module):
    """A model and its losses, of rows that have their target behind the features."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, rows):
        return cross_entropy(self.model(rows[:, :-1]), rows[:, -1].long())


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_losses_may_lie_in_a_graphs_memory_too(memory, name):
    base, options = BASES["sgd"]
    found = []
    for graphed in (False, True):
        inner = WithLoss(mlp())
        model = Graphed(inner, memory) if graphed else inner
        optimizer = ESAM(inner.parameters(), base, **options, rho=0.5, model=inner, **CONFIGURATIONS[name])
        losses = []
        for inputs, targets in batches(4, size=12):
            rows = torch.cat([inputs, targets[:, None]], dim=1)

            def closure(index, rows=rows, model=model):
                return model(rows if index is None else rows[index])

            losses.append(optimizer.backward(closure))
            optimizer.step()
        found.append([*losses, *inner.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_kept_outputs_and_the_loss_of_an_ordinary_closure_outlast_later_runs(memory):
    inner = mlp()
    model = Graphed(inner, memory)
    base, options = BASES["sgd"]
    optimizer = ESAM(inner.parameters(), base, **options, rho=2.0, gamma=1.0)
    (inputs, targets), _ = batches(2, size=12)
    closure = batch_closure(model, cross_entropy, inputs, targets, keep_outputs=True)
    expected = inner(inputs).detach()
    optimizer.step(closure)
    model(torch.zeros_like(inputs))
    assert torch.equal(closure.outputs, expected)

    def ordinary():
        optimizer.zero_grad()
        (loss,) = memory.write("loss", [cross_entropy(model(inputs), targets).mean().detach()])
        cross_entropy(model(inputs), targets).mean().backward()
        return loss

    at_weights = cross_entropy(inner(inputs), targets).mean()
    assert torch.equal(optimizer.step(ordinary), at_weights)


def test_a_model_is_captured_for_each_kind_of_pass_once(memory):
    """The whole batch with and without a graph, and the selected rows; nothing more in later steps."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model = mlp()
    compiled = torch.compile(model, backend=backend, dynamic=False)
    base, options = BASES["sgd"]
    counts = []
    optimizer = ESAM(model.parameters(), base, **options, rho=0.5)
    for inputs, targets in batches(3, size=12):
        optimizer.backward(batch_closure(compiled, cross_entropy, inputs, targets))
        optimizer.step()
        counts.append(len(graphs))
    assert counts == [3, 3, 3]
    torch._dynamo.reset()
