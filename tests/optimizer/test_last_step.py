"""optimizer.last_step says what the last step found: norm, losses, rows and weights."""

import copy
import pickle

import pytest
import torch
from networks import batches, cross_entropy, mlp, perturbed
from torch import Tensor, nn

from esam_kernels import ESAM, batch_closure

INPUTS, TARGETS = batches(1, size=8, dtype=torch.float64)[0]


def esam(model: nn.Module, **options) -> ESAM:
    return ESAM(model.parameters(), torch.optim.SGD, **{"lr": 0.1, "rho": 0.5, "momentum": 0.9} | options)


def count(model: nn.Module) -> int:
    return sum(param.numel() for param in model.parameters())


def gradient_norm(model: nn.Module) -> Tensor:
    loss = cross_entropy(model(INPUTS), TARGETS).mean()
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]).norm()


def test_before_the_first_it_is_none():
    model = mlp(dtype=torch.float64)
    optimizer = esam(model)
    assert optimizer.last_step is None
    with pytest.raises(TypeError):
        optimizer.backward(lambda index: "no loss")
    assert optimizer.last_step is None


def test_sam():
    model = mlp(dtype=torch.float64)
    optimizer = esam(model, beta=1, gamma=1)
    norm, loss = gradient_norm(model), cross_entropy(model(INPUTS), TARGETS).mean()
    moved = perturbed(model, lambda network: cross_entropy(network(INPUTS), TARGETS).mean(), 0.5)
    returned = optimizer.step(batch_closure(model, cross_entropy, INPUTS, TARGETS))
    last = optimizer.last_step
    assert last.sharp
    torch.testing.assert_close(last.norm.double(), norm)
    torch.testing.assert_close(last.loss, loss.detach())
    assert torch.equal(last.loss, returned)
    torch.testing.assert_close(last.perturbed_loss, cross_entropy(moved(INPUTS), TARGETS).mean().detach())
    assert last.rows == (8,)
    assert last.weights == count(model)
    assert all(x.dim() == 0 and not x.requires_grad for x in (last.norm, last.loss, last.perturbed_loss))


def test_a_selection_is_of_the_rows_and_weights_taken():
    model = mlp(dtype=torch.float64)
    optimizer = esam(model, beta=0.3, gamma=0.5)
    sizes = [3, 5]
    parts = zip(INPUTS.split(sizes), TARGETS.split(sizes))
    whole = cross_entropy(model(INPUTS), TARGETS).mean()
    optimizer.backward([batch_closure(model, cross_entropy, *part) for part in parts])
    last = optimizer.last_step
    assert last.rows == (1, 2)
    assert 0 < last.weights < count(model)
    torch.testing.assert_close(last.loss, whole.detach())
    assert last.perturbed_loss > last.loss  # those of the largest increase


def test_micro_batches_of_which_no_row_is_taken():
    model = mlp(dtype=torch.float64)
    optimizer = esam(model, gamma=0.1, select_over="all")
    parts = zip(INPUTS.split(2), TARGETS.split(2))
    optimizer.backward([batch_closure(model, cross_entropy, *part) for part in parts])
    assert sorted(optimizer.last_step.rows) == [0, 0, 0, 1]


@pytest.mark.parametrize("beta", [0.25, 1.0])
def test_by_element_the_number_of_weights_is_that_on_average(beta):
    model = mlp(dtype=torch.float64)
    optimizer = esam(model, beta=beta, granularity="element")
    optimizer.backward(batch_closure(model, cross_entropy, INPUTS, TARGETS))
    assert optimizer.last_step.weights == round(beta * count(model))


def test_plain_steps():
    model = mlp(dtype=torch.float64)
    optimizer = esam(model, start=1)
    optimizer.step(batch_closure(model, cross_entropy, INPUTS, TARGETS))
    last = optimizer.last_step
    assert (last.sharp, last.norm, last.perturbed_loss, last.weights, last.rows) == (False, None, None, 0, (8,))
    assert last.loss.isfinite()
    optimizer.step(batch_closure(model, cross_entropy, INPUTS, TARGETS))
    assert optimizer.last_step.sharp


def test_with_momentum_no_loss_at_the_weights_is_known():
    model = mlp(dtype=torch.float64)
    optimizer = esam(model, ascent="momentum", gamma=1)
    for weights in (0, count(model)):  # of no moment yet
        optimizer.param_groups[0]["beta"] = 1.0
        returned = optimizer.step(batch_closure(model, cross_entropy, INPUTS, TARGETS))
        last = optimizer.last_step
        assert last.loss is None
        assert torch.equal(last.perturbed_loss, returned)
        assert last.weights == weights
        assert (last.norm > 0) == (weights > 0)


def test_ordinary_closures():
    model = mlp(dtype=torch.float64)
    optimizer = esam(model, beta=1, gamma=1)
    norm = gradient_norm(model)

    def closure(result=lambda loss: loss):
        optimizer.zero_grad()
        loss = cross_entropy(model(INPUTS), TARGETS).mean()
        loss.backward()
        return result(loss)

    returned = optimizer.step(closure)
    last = optimizer.last_step
    assert last.rows == ()
    assert torch.equal(last.loss, returned)
    assert last.perturbed_loss > last.loss
    torch.testing.assert_close(last.norm.double(), norm)
    optimizer.step(lambda: closure(lambda loss: {"loss": loss}))
    assert optimizer.last_step.loss < last.loss
    optimizer.step(lambda: closure(lambda loss: loss.item()))
    assert optimizer.last_step.perturbed_loss > optimizer.last_step.loss
    optimizer.step(lambda: closure(lambda loss: None))
    assert optimizer.last_step.loss is optimizer.last_step.perturbed_loss is None


def test_one_loss_of_a_batch_closure_counts_its_rows():
    model = mlp(dtype=torch.float64)
    optimizer = esam(model, gamma=1)
    optimizer.step(batch_closure(model, nn.CrossEntropyLoss(), INPUTS, TARGETS))
    assert optimizer.last_step.rows == (8,)


def test_the_first_half_of_a_step():
    model = mlp(dtype=torch.float64)
    optimizer = esam(model, beta=1, gamma=1)
    cross_entropy(model(INPUTS), TARGETS).mean().backward()
    norm = gradient_norm(model)
    optimizer.first_step(zero_grad=True)
    last = optimizer.last_step
    assert last.sharp
    torch.testing.assert_close(last.norm.double(), norm)
    assert last.loss is last.perturbed_loss is None


def test_an_overflow_shows_in_the_norm():
    model = mlp(dtype=torch.float64)
    optimizer = esam(model, gamma=1)
    optimizer.backward(batch_closure(model, lambda outputs, y: cross_entropy(outputs, y) * torch.inf, INPUTS, TARGETS))
    assert not optimizer.last_step.norm.isfinite()


def test_a_failed_step_does_not_change_it_and_copies_have_their_own():
    model = mlp(dtype=torch.float64)
    optimizer = esam(model)
    closure = batch_closure(model, cross_entropy, INPUTS, TARGETS)
    optimizer.step(closure)
    last = optimizer.last_step
    with pytest.raises(TypeError):
        optimizer.backward(lambda index: "no loss")
    assert optimizer.last_step is last
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert torch.equal(copied.last_step.loss, last.loss)
    optimizer.step(closure)
    assert optimizer.last_step is not last
    assert last.sharp


@pytest.mark.parametrize("parts", [[8], [1, 4, 3]], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_norm_is_that_of_the_mean_loss_however_it_is_computed(parts, weighted, scaled):
    model = mlp()
    inputs, targets, weights = INPUTS.float(), TARGETS, torch.arange(8.0)  # the first of them has none
    loss = cross_entropy(model(inputs), targets)
    loss = (loss * weights).sum() / weights.sum() if weighted else loss.mean()
    norm = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]).norm()

    def closure(rows):
        return lambda index: (cross_entropy(model(inputs[rows]), targets[rows]), *([weights[rows]] if weighted else []))

    optimizer = esam(model, beta=1, gamma=1)
    closures = [closure(rows) for rows in torch.arange(8).split(parts)]
    closures = closures if weighted else [lambda index, one=one: one(index)[0] for one in closures]
    optimizer.backward(closures, torch.amp.GradScaler("cpu", init_scale=2.0**15) if scaled else None)
    torch.testing.assert_close(optimizer.last_step.norm, norm)
