"""A training step that is compiled as a whole is the same step: torch.compile leaves out what it would lose."""

import copy
import shutil
from collections.abc import Callable, Iterator

import pytest
import torch
from networks import batches, cross_entropy, mlp, same, train, values
from torch import Tensor, nn
from torch.optim import lr_scheduler

from esam_kernels import ESAM, batch_closure, current_pass, first_pass, token_loss

DATA = batches(2)
BACKENDS = ["eager", "aot_eager", *(["inductor"] if shutil.which("c++") else [])]
backends = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def optimizer_of(model: nn.Module, **options) -> ESAM:
    return ESAM(model.parameters(), torch.optim.SGD, **{"lr": 0.1, "momentum": 0.9, "rho": 0.5, **options})


def step_at_once(model, optimizer, inputs, targets):
    return optimizer.step(batch_closure(model, cross_entropy, inputs, targets))


def step_in_two(model, optimizer, inputs, targets):
    optimizer.zero_grad()
    loss = optimizer.backward(batch_closure(model, cross_entropy, inputs, targets))
    optimizer.step()
    return loss


def closure_by_hand(model, optimizer, inputs, targets):
    def closure(index):
        rows = slice(None) if index is None else index
        return cross_entropy(model(inputs[rows]), targets[rows])

    loss = optimizer.backward(closure)
    optimizer.step()
    return loss


def micro_batches(model, optimizer, inputs, targets):
    halves = zip(inputs.chunk(2), targets.chunk(2))
    return optimizer.step([batch_closure(model, cross_entropy, *half) for half in halves])


def forward_and_backward(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    loss = cross_entropy(model(inputs), targets).mean()
    loss.backward()
    return loss.detach()


def step_by_halves(model, optimizer, inputs, targets):
    loss = forward_and_backward(model, inputs, targets)
    optimizer.first_step(zero_grad=True)
    forward_and_backward(model, inputs, targets)
    optimizer.second_step(zero_grad=True)
    return loss


def step_by_halves_with_restore(model, optimizer, inputs, targets):
    loss = forward_and_backward(model, inputs, targets)
    optimizer.first_step()
    optimizer.zero_grad()
    forward_and_backward(model, inputs, targets)
    optimizer.restore()
    optimizer.step()
    optimizer.zero_grad()
    return loss


def groups_and_state_between(model, optimizer, inputs, targets):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    if len(optimizer.param_groups) == 1:
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "rho": 0.1})
    loss = optimizer.step(batch_closure(model, cross_entropy, inputs, targets))
    optimizer.param_groups[0]["lr"] *= 0.5
    return loss


def with_a_scheduler(model, optimizer, inputs, targets):
    loss = optimizer.step(batch_closure(model, cross_entropy, inputs, targets))
    optimizer.scheduler.step()
    return loss * optimizer.param_groups[0]["lr"]


def made_inside(model, optimizer, inputs, targets):
    return optimizer_of(model).step(batch_closure(model, cross_entropy, inputs, targets))


# Those whose forwards stand outside of any closure are compiled themselves, and round as their backend does.
WAYS: dict[Callable[..., Tensor], float] = {
    step_at_once: 0,
    step_in_two: 0,
    closure_by_hand: 0,
    micro_batches: 0,
    step_by_halves: 1e-6,
    step_by_halves_with_restore: 1e-6,
    groups_and_state_between: 0,
    with_a_scheduler: 0,
    made_inside: 0,
}


def trained(way: Callable[..., Tensor]) -> list[Tensor]:
    """The weights, the losses and the number of steps."""
    model = mlp(nn.BatchNorm1d(8))
    optimizer = optimizer_of(model, gamma=1.0)
    optimizer.scheduler = lr_scheduler.StepLR(optimizer, 1, 0.5)
    losses = [way(model, optimizer, *batch) for batch in DATA]
    return [*values(model), *losses, torch.tensor(optimizer.param_groups[0]["esam_step"])]


@backends
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.filterwarnings("ignore:.*step.. of your learning rate scheduler|Detected call of:UserWarning")
def test_it_is_the_step_that_is_not_compiled(way, backend):
    for compiled, plain in zip(trained(torch.compile(way, backend=backend)), trained(way)):
        torch.testing.assert_close(compiled, plain, rtol=0, atol=WAYS[way])


@backends
def test_an_exception_in_any_pass_of_it_leaves_the_weights(backend):
    model = mlp(nn.BatchNorm1d(8))
    optimizer = optimizer_of(model)
    before = values(model)
    for number in (1, 2, 3):
        calls = []

        def failing(outputs, targets, number=number, calls=calls):
            calls.append(1)
            if len(calls) == number:
                raise InterruptedError
            return cross_entropy(outputs, targets)

        def step(inputs, targets, failing=failing):
            return optimizer.step(batch_closure(model, failing, inputs, targets))

        with pytest.raises(InterruptedError):
            torch.compile(step, backend=backend)(*DATA[0])
        assert len(calls) == number
        assert same(values(model), before)


def first_half(model, optimizer, inputs, targets):
    optimizer.first_step()


@pytest.mark.parametrize("way", [step_at_once, step_in_two, first_half])
def test_fullgraph_is_refused_with_what_to_do_instead(way):
    model = mlp()
    optimizer = optimizer_of(model, gamma=1.0)
    before = values(model)
    with pytest.raises(Exception, match="leave out fullgraph=True, or compile the model"):
        torch.compile(way, backend="eager", fullgraph=True)(model, optimizer, *DATA[0])
    assert same(values(model), before)
    model.zero_grad()
    train(model, optimizer, DATA)  # goes on


def counting(runs: list[int]) -> Callable[..., Callable[..., Tensor]]:
    """A backend that counts how often what it has compiled runs."""

    def backend(graph, _):
        def run(*args):
            runs.append(1)
            return graph.forward(*args)

        return run

    return backend


@pytest.mark.parametrize("way", [step_at_once, closure_by_hand])
def test_a_compiled_model_stays_so_in_a_compiled_step(way):
    runs: list[int] = []
    model = mlp()
    compiled = torch.compile(model, backend=counting(runs))
    torch.compile(way, backend="eager")(compiled, optimizer_of(model), *DATA[0])
    assert len(runs) == 3  # passes


def test_token_loss_is_compiled_whole():
    logits, targets = torch.randn(2, 5, 3), torch.randint(3, (2, 5))
    compiled = torch.compile(token_loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(logits, targets), token_loss(logits, targets))


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.count = mlp(), 0

    def forward(self, inputs: Tensor) -> Tensor:
        if current_pass() in (None, first_pass()):
            self.count += 1
        return self.inner(inputs)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_knows_its_pass(backend):
    model = Counter()
    train(torch.compile(model, backend=backend), optimizer_of(model), DATA)
    assert model.count == len(DATA)
