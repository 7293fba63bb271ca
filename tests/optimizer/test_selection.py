"""Pass 3 sees exactly k = max(1, floor(gamma * b)) rows: those whose loss the perturbation raised most."""

import itertools
import math

import pytest
import torch
from networks import batches, cross_entropy, grads, mlp, perturbed
from torch import Tensor, nn

from esam_kernels import ESAM, batch_closure

SIZE = 16
INPUTS, TARGETS = batches(1, size=SIZE, dtype=torch.float64)[0]
RHO = 0.5


def spy(model: nn.Module, seen: list, inputs: Tensor = INPUTS, targets: Tensor = TARGETS, spoil=lambda losses: losses):
    """A closure that notes (index, losses)."""
    closure = batch_closure(model, cross_entropy, inputs, targets)

    def spying(index):
        losses = closure(index)
        if index is None:
            losses = spoil(losses)
        seen.append((index, losses.detach()))
        return losses

    return spying


def network() -> nn.Module:
    return mlp(dtype=torch.float64)


def backward(model: nn.Module, closures, **options) -> Tensor:
    return ESAM(model.parameters(), torch.optim.SGD, lr=0.1, **{"rho": RHO, **options}).backward(closures)


def mean_loss(model: nn.Module) -> Tensor:
    return cross_entropy(model(INPUTS), TARGETS).mean()


def increases(model: nn.Module, rho: float = RHO) -> Tensor:
    """For beta = 1, computed here."""
    there = perturbed(model, mean_loss, rho)
    return (cross_entropy(there(INPUTS), TARGETS) - cross_entropy(model(INPUTS), TARGETS)).detach()


def top(scores: Tensor, k: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k])


@pytest.mark.parametrize("selection", ["increase", "loss", "random"])
@pytest.mark.parametrize("gamma", [1e-9, 0.05, 0.1, 1 / 16, 0.13, 0.5, 0.7, 15.9 / 16, 0.9999])
def test_exactly_k_rows_ascending(gamma, selection):
    model, seen = network(), []
    backward(model, spy(model, seen), gamma=gamma, selection=selection)
    index = seen[-1][0]
    assert index.dtype == torch.int64
    assert len(index) == max(1, math.floor(gamma * SIZE)) == len(set(index.tolist()))
    assert index.tolist() == sorted(index.tolist())
    assert all(param.grad.isfinite().all() for param in model.parameters())


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_smallest_batches(size):
    model, seen = network(), []
    backward(model, spy(model, seen, INPUTS[:size], TARGETS[:size]), gamma=0.5)
    assert len(seen[-1][0]) == 1


def test_gamma_1_takes_the_batch_itself_and_skips_pass_2():
    model, seen = network(), []
    backward(model, spy(model, seen), gamma=1.0)
    assert [index for index, _ in seen] == [None, None]


@pytest.mark.parametrize("gamma", [0.05, 0.25, 0.5])
def test_the_rows_of_largest_increase_are_taken(gamma):
    model, seen = network(), []
    expected = increases(model)
    backward(model, spy(model, seen), gamma=gamma, beta=1.0)
    assert seen[-1][0].tolist() == top(expected, max(1, int(gamma * SIZE)))
    torch.testing.assert_close(seen[1][1] - seen[0][1], expected)


def test_the_rows_of_largest_loss_are_taken_without_pass_2():
    model, seen = network(), []
    losses = cross_entropy(model(INPUTS), TARGETS).detach()
    assert top(losses, 4) != top(increases(model), 4)
    backward(model, spy(model, seen), gamma=0.25, beta=1.0, selection="loss")
    assert seen[-1][0].tolist() == top(losses, 4)
    assert len(seen) == 2


def test_random_rows_depend_on_seed_and_step_alone():
    def chosen(seed, inputs):
        model, seen = network(), []
        optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, gamma=0.5, selection="random", seed=seed)
        for _ in range(40):
            torch.rand(3)  # torch's generator has no say
            optimizer.step(spy(model, seen, inputs))
        assert len(seen) == 80
        return [tuple(index.tolist()) for index, _ in seen if index is not None]

    first = chosen(3, INPUTS)
    assert first == chosen(3, INPUTS + 1)
    assert first != chosen(4, INPUTS)
    assert len(set(first)) > 30
    counts = torch.bincount(torch.tensor(first).flatten(), minlength=SIZE)
    assert ((counts - 20).abs() < 4 * math.sqrt(40) / 2).all()  # 4 sigma of the binomial


def test_random_rows_differ_between_micro_batches():
    model, seen = network(), []
    backward(model, [spy(model, seen), spy(model, seen)], gamma=0.5, selection="random")
    assert seen[-1][0].tolist() != seen[-2][0].tolist()


@pytest.mark.parametrize("selection", ["increase", "loss"])
def test_a_nan_loss_counts_as_largest(selection):
    model, seen = network(), []

    def spoil(losses):
        return losses.index_fill(0, torch.tensor([2, 11]), float("nan"))

    backward(model, spy(model, seen, spoil=spoil), gamma=0.25, selection=selection)
    index = seen[-1][0].tolist()
    assert len(index) == 4
    assert {2, 11} <= set(index)


def test_ties_go_to_the_lower_rows():
    model, seen = network(), []
    inputs, targets = INPUTS[:1].expand(8, 4), TARGETS[:1].expand(8)
    backward(model, spy(model, seen, inputs, targets), gamma=0.5, selection="loss")
    assert seen[-1][0].tolist() == [0, 1, 2, 3]


# Micro-batches.

SIZES = [[16], [8, 8], [5, 1, 7, 3]]


def pieces(model: nn.Module, seen: list, sizes: list[int]) -> list:
    return [spy(model, seen, x, y) for x, y in zip(INPUTS.split(sizes), TARGETS.split(sizes))]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_each_micro_batch_gives_its_share(sizes):
    model, seen = network(), []
    expected = increases(model).split(sizes)
    backward(model, pieces(model, seen, sizes), gamma=0.4, beta=1.0)
    assert len(seen) == 3 * len(sizes)
    for (index, _), part, size in zip(seen[-len(sizes) :], expected, sizes):
        assert index.tolist() == top(part, max(1, int(0.4 * size)))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("selection", ["increase", "loss"])
@pytest.mark.parametrize("gamma", [0.01, 0.25, 0.5, 0.9])
def test_select_over_all_takes_the_rows_that_one_batch_would(sizes, selection, gamma):
    one, whole = network(), []
    backward(one, spy(one, whole), gamma=gamma, selection=selection)
    model, seen = network(), []
    backward(model, pieces(model, seen, sizes), gamma=gamma, selection=selection, select_over="all")
    expected = torch.zeros(SIZE, dtype=torch.bool).index_fill(0, whole[-1][0], True).split(sizes)
    rows = [part.nonzero()[:, 0].tolist() for part in expected if part.any()]  # the others are skipped
    assert [index.tolist() for index, _ in seen if index is not None] == rows


@pytest.mark.parametrize("sizes", SIZES[1:], ids=str)
@pytest.mark.parametrize(
    "options",
    [{"gamma": 1.0}, {"gamma": 0.5, "select_over": "all"}, {"rho": 0.0}, {"gamma": 0.3, "select_over": "all"}],
    ids=str,
)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("granularity", ["tensor", "element"])
def test_micro_batches_add_up_to_one_batch(sizes, options, weighted, granularity):
    weights = torch.rand(SIZE, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * 7
    weights[0] = 0.0

    def loss_fn(outputs, targets):
        labels, w = targets
        return (cross_entropy(outputs, labels), w) if weighted else cross_entropy(outputs, labels)

    models = [network(), network()]
    losses = []
    for model, split in zip(models, ([SIZE], sizes)):
        batch = zip(INPUTS.split(split), TARGETS.split(split), weights.split(split))
        closures = [batch_closure(model, loss_fn, x, (y, w)) for x, y, w in batch]
        losses.append(backward(model, closures, granularity=granularity, **options))
    torch.testing.assert_close(losses[0], losses[1])
    for one, many in zip(grads(models[0]), grads(models[1])):
        torch.testing.assert_close(many, one, rtol=1e-8, atol=1e-12)  # the norm's eps weighs otherwise


@pytest.mark.parametrize("empty", [0, 1])
@pytest.mark.parametrize("rho", [RHO, 0.0])
def test_a_micro_batch_of_no_weight_adds_nothing(empty, rho):
    """All of it padding: its weighted mean does not exist, that of the whole does."""
    models = [network(), network()]

    def loss_fn(outputs, targets):
        return cross_entropy(outputs, targets[0]), targets[1]

    for model, count in zip(models, (1, 2)):
        parts = [
            (INPUTS[:4], TARGETS[:4], torch.ones(4, dtype=torch.float64)),
            (INPUTS[4:], TARGETS[4:], torch.zeros(12, dtype=torch.float64)),
        ][:count]
        closures = [batch_closure(model, loss_fn, x, (y, w)) for x, y, w in (parts if empty else parts[::-1])]
        backward(model, closures, gamma=1.0, rho=rho)
    for one, many in zip(grads(models[0]), grads(models[1])):
        torch.testing.assert_close(many, one, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("gamma", [0.25, 1.0])
def test_a_batch_of_no_weight_gives_no_gradient_rather_than_nan(gamma):
    model = network()

    def loss_fn(outputs, targets):
        return cross_entropy(outputs, targets[0]), targets[1]

    weights = torch.zeros(SIZE, dtype=torch.float64)
    backward(model, batch_closure(model, loss_fn, INPUTS, (TARGETS, weights)), gamma=gamma)
    assert all((param.grad == 0).all() for param in model.parameters())


def test_the_gradient_is_that_of_the_selected_rows_at_the_perturbed_weights():
    model, seen = network(), []
    there = perturbed(model, mean_loss, RHO)
    backward(model, spy(model, seen), gamma=0.5, beta=1.0)
    index = seen[-1][0]
    cross_entropy(there(INPUTS[index]), TARGETS[index]).mean().backward()
    for mine, theirs in zip(grads(model), grads(there)):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("selection", ["increase", "loss", "random"])
def test_rows_of_no_weight_are_selected_last(selection):
    model, seen = network(), []
    weights = torch.ones(16)
    weights[::2] = 0
    closure = spy(model, [], spoil=lambda losses: losses)

    def weighted(index):
        seen.append(index)
        return closure(index), weights if index is None else weights[index]

    backward(model, weighted, selection=selection, gamma=0.25)
    assert weights[seen[-1]].all()


def test_micro_batches_add_up_for_parameters_of_another_optimizer_too():
    model = network()
    body, head = model[0], model[-1]
    optimizer = ESAM(body.parameters(), torch.optim.SGD, lr=0.1, gamma=1)
    found = []
    for cuts in ([0, 16], [0, 11, 16]):
        head.zero_grad()
        optimizer.backward(
            [batch_closure(model, cross_entropy, INPUTS[i:j], TARGETS[i:j]) for i, j in itertools.pairwise(cuts)]
        )
        found.append(head.weight.grad.clone())
        optimizer.param_groups[0]["esam_step"] = 0  # the same draws
    torch.testing.assert_close(*found)
