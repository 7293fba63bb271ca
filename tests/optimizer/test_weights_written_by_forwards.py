"""Weights that a forward writes are put back if the step fails, and are as its first pass left them if it does not."""

from collections.abc import Callable

import pytest
import torch
from networks import batches, cross_entropy, mlp, same, values
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from esam_kernels import ESAM, batch_closure

INPUTS, TARGETS = batches(1)[0]


class Writes(nn.Module):
    """Scales its input, and writes its own scale first."""

    def __init__(self, write: Callable[[nn.Module], None]) -> None:
        super().__init__()
        self.write = write
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 8))

    def forward(self, x: Tensor) -> Tensor:
        torch.no_grad()(self.write)(self)
        return x * self.scale


class Renormalized(nn.Module):
    """An embedding that brings the rows it looks up to a norm of 1."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 8, max_norm=1.0)
        nn.init.constant_(self.embedding.weight, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.embedding(torch.arange(5)).sum(0)


def bound_anew(module):
    module.scale = nn.Parameter(0.9 * module.scale)


def given_other_memory(module):
    module.scale.data = 0.9 * module.scale.data


LAYERS = {
    "in place": lambda: Writes(lambda module: module.scale.mul_(0.9)),
    "through data": lambda: Writes(lambda module: module.scale.data.mul_(0.9)),
    "through detach": lambda: Writes(lambda module: module.scale.detach().mul_(0.9)),
    "through NumPy": lambda: Writes(lambda module: module.scale.detach().numpy().__imul__(0.9)),
    "by other memory": lambda: Writes(given_other_memory),
    "by set_": lambda: Writes(lambda module: module.scale.set_(0.9 * module.scale)),
    "by another parameter": lambda: Writes(bound_anew),
    "embedding with max_norm": Renormalized,
    "spectral norm by a hook": lambda: nn.utils.spectral_norm(nn.Linear(8, 8)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(8, 8)),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(8, 8)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(8, 8)),
}
layers = pytest.mark.parametrize("layer", LAYERS)
OPTIONS = {
    "three passes": ({}, 3),
    "two passes": ({"gamma": 1.0}, 2),
    "a survey": ({"ascent_share": 0.5}, 4),
    "one pass": ({"ascent": "momentum", "gamma": 1.0}, 1),
    "a plain step": ({"rho": 0.0}, 1),
}
settings = pytest.mark.parametrize("name", OPTIONS)


def sgd(model: nn.Module, name: str = "three passes", **options) -> ESAM:
    options = {"lr": 0.1, "momentum": 0.9, "rho": 0.5, **OPTIONS[name][0], **options}
    return ESAM(model.parameters(), torch.optim.SGD, model=model, **options)


def fails_at(number: int) -> Callable[[Tensor, Tensor], Tensor]:
    calls = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == number:
            raise InterruptedError
        return cross_entropy(outputs, targets)

    return loss


@layers
@settings
@pytest.mark.parametrize("steps", [0, 2], ids=["in the first step", "later"])
def test_a_step_that_fails_puts_them_back(layer, name, steps):
    for number in range(1, OPTIONS[name][1] + 1):
        model = mlp(LAYERS[layer]())
        optimizer = sgd(model, name)
        for _ in range(steps):
            optimizer.step(batch_closure(model, cross_entropy, INPUTS, TARGETS))
        before, own = values(model), list(model.parameters())
        with pytest.raises(InterruptedError):
            optimizer.backward(batch_closure(model, fails_at(number), INPUTS, TARGETS))
        assert same(values(model), before)
        assert all(one is other for one, other in zip(own, model.parameters()))


@pytest.mark.parametrize("layer", ["in place", "through data", "embedding with max_norm"])
@pytest.mark.parametrize("name", sorted(OPTIONS.keys() - {"one pass"}))  # which is at perturbed weights alone
@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_a_step_leaves_them_as_its_first_pass_did(layer, name, beta):
    """Whether or not they are drawn."""
    model, plain = mlp(LAYERS[layer]()), mlp(LAYERS[layer]())
    optimizer = sgd(model, name, beta=beta, lr=0.0)
    for _ in range(4):
        optimizer.step(batch_closure(model, cross_entropy, INPUTS, TARGETS))
        plain(INPUTS)
        assert same(values(model), values(plain))


def test_what_is_first_written_in_a_later_step_is_known_from_then_on():
    writing = []
    model = mlp(Writes(lambda module: writing and module.scale.mul_(0.9)))
    optimizer = sgd(model, beta=0.3)
    closure = batch_closure(model, cross_entropy, INPUTS, TARGETS)
    optimizer.step(closure)
    writing.append(True)
    optimizer.step(closure)
    before = values(model)
    with pytest.raises(InterruptedError):
        optimizer.backward(batch_closure(model, fails_at(3), INPUTS, TARGETS))
    assert same(values(model), before)


@pytest.mark.parametrize(
    ("name", "first", "later"),  # before the step, and before or after its first pass
    [("three passes", [7, 1], [1, 1]), ("one pass", [7, 7], [1]), ("a plain step", [7], [1])],
)
def test_only_weights_that_a_forward_writes_are_kept_after_the_first_pass_of_all(monkeypatch, name, first, later):
    from esam_kernels import model_state

    kept = []
    copy_all = model_state.copy_all
    monkeypatch.setattr(model_state, "copy_all", lambda tensors: kept.append(len(tensors)) or copy_all(tensors))
    model = mlp(LAYERS["in place"]())
    optimizer = sgd(model, name)
    for weights in first, later, later:
        kept.clear()
        optimizer.step(batch_closure(model, cross_entropy, INPUTS, TARGETS))
        assert [count for count in kept if count] == weights


@pytest.mark.parametrize("removed", [0, 1])
def test_a_group_that_is_taken_away_takes_none_of_them_along(removed):
    torch.manual_seed(0)
    embedding, head = nn.Embedding(5, 3, max_norm=0.5), nn.Linear(3, 2)
    model = nn.Sequential(embedding, head)
    groups = [{"params": head.parameters()}, {"params": embedding.parameters()}]
    optimizer = ESAM(groups, torch.optim.SGD, lr=0.1)
    inputs, targets = torch.randint(5, (8,)), torch.randint(2, (8,))
    loss_fn = nn.CrossEntropyLoss(reduction="none")
    optimizer.step(batch_closure(model, loss_fn, inputs, targets))
    (embedding if removed else head).requires_grad_(False)
    del optimizer.param_groups[removed]
    optimizer.step(batch_closure(model, loss_fn, inputs, targets))
    before = values(model)

    def failing(outputs, targets):
        raise KeyboardInterrupt

    embedding.weight.data.mul_(10)  # so that the next forward writes it
    before = values(model)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(batch_closure(model, failing, inputs, targets))
    if not removed:
        assert same(values(model), before)
