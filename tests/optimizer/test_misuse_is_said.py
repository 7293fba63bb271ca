"""Code that looks right and is not gets a warning or an error that says what to write; right code gets none."""

import copy
import warnings
from collections.abc import Iterator

import pytest
import torch
from networks import batches, cross_entropy, grads, mlp, same, values
from torch import Tensor, nn
from torch.optim import lr_scheduler, swa_utils

from esam_kernels import ESAM, batch_closure

DATA = batches(4)
PLAIN = r"step\(\) takes a plain step.*call optimizer\.backward\(batch_closure.*in place of loss\.backward\(\)"
LOST = r"replaces the gradient of the backward\(\) before it.*all of their closures in one list.*zero_grad\(\)"


def sgd(model: nn.Module, **options) -> ESAM:
    return ESAM(model.parameters(), torch.optim.SGD, **{"lr": 0.1, **options})


def closure_of(model: nn.Module, batch: tuple[Tensor, Tensor] = DATA[0]):
    return batch_closure(model, cross_entropy, *batch)


def plain_backward(model: nn.Module, batch: tuple[Tensor, Tensor] = DATA[0]) -> None:
    cross_entropy(model(batch[0]), batch[1]).mean().backward()


# A plain step.


def test_only_the_constructor_was_changed():
    model, plain = mlp(), mlp()
    with pytest.warns(UserWarning, match=PLAIN) as found:
        train_plainly(model, sgd(model))
    train_plainly(plain, torch.optim.SGD(plain.parameters(), lr=0.1))
    assert len(found) == 1
    assert found[0].filename == __file__
    assert same(values(model), values(plain))  # it is a plain step, and is not refused


def train_plainly(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for batch in DATA:
        optimizer.zero_grad()
        plain_backward(model, batch)
        optimizer.step()


def test_a_scaler_steps():
    model = mlp()
    optimizer = sgd(model)
    plain_backward(model)
    with pytest.warns(UserWarning, match=PLAIN):
        torch.amp.GradScaler("cpu", enabled=False).step(optimizer)


def test_a_plain_step_after_one_by_halves():
    model = mlp()
    optimizer = sgd(model, gamma=1.0)
    plain_backward(model)
    optimizer.first_step()
    optimizer.restore()
    optimizer.step()
    with pytest.warns(UserWarning, match=PLAIN):
        optimizer.step()


def test_each_optimizer_says_it():
    for _ in range(2):
        model = mlp()
        plain_backward(model)
        with pytest.warns(UserWarning, match=PLAIN):
            sgd(model).step()


# A gradient that is lost.


def test_a_backward_for_each_micro_batch():
    model = mlp()
    optimizer = sgd(model)
    optimizer.backward(closure_of(model))
    with pytest.warns(UserWarning, match=LOST):
        optimizer.backward(closure_of(model))
    optimizer.backward(closure_of(model))  # is an error here if it is said again
    optimizer.step()


def test_a_step_with_a_closure_after_backward():
    model = mlp()
    optimizer = sgd(model)
    optimizer.backward(closure_of(model))
    with pytest.warns(UserWarning, match=LOST):
        optimizer.step(closure_of(model))


# What a closure does to gradients.


def clears_all(model):
    model.zero_grad()


def clears_one_layer(model):
    model[-1].zero_grad()


def zeroes_one_layer(model):
    for param in model[-1].parameters():
        if param.grad is not None:
            param.grad.zero_()


def replaces_one(model):
    if model[-1].bias.grad is not None:
        model[-1].bias.grad = torch.zeros(3)


def clips(model):
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)


def runs_a_backward(model):
    plain_backward(model)


CHANGES = [clears_all, clears_one_layer, zeroes_one_layer, replaces_one, clips, runs_a_backward]


@pytest.mark.parametrize("change", CHANGES)
def test_a_closure_that_changes_gradients_is_refused(change):
    """Those of earlier micro-batches would be lost."""
    model = mlp()
    optimizer = sgd(model)
    first, second = map(closure_of, [model] * 2, DATA)
    before = values(model)

    def closure(index):
        change(model)
        return second(index)

    with pytest.raises(RuntimeError, match=r"closure has changed the gradients.*returns losses.*zero_grad\(\)"):
        optimizer.backward([first, closure])
    assert same(values(model), before)
    assert grads(model) == [None] * 6
    optimizer.step([first, second])


@pytest.mark.parametrize("change", [clears_all, clears_one_layer, clips])
def test_where_there_are_none_yet_it_does_no_harm(change):
    model, other = mlp(), mlp()
    closure = closure_of(model)
    sgd(model).backward(lambda index: change(model) or closure(index))
    sgd(other).backward(closure_of(other))
    assert same(grads(model), grads(other))


# Losses that are the memory of a weight, which is about to move.


@pytest.mark.parametrize("selection", ["loss", "increase"])
@pytest.mark.parametrize("view", [lambda w: w, lambda w: w[:], lambda w: w.view(2, 4).flatten()])
@pytest.mark.parametrize("weighted", [False, True])
def test_losses_that_alias_a_weight(selection, view, weighted):
    start = torch.linspace(-1, 1, 8).roll(3)
    found = []
    for alias in (True, False):
        weight = nn.Parameter(start.clone())
        rows = []

        def closure(index, weight=weight, rows=rows, alias=alias):
            rows.append(index)
            losses = view(weight) if alias else 1 * weight
            losses = losses if index is None else losses[index]
            return (losses, losses.detach() + 2) if weighted else losses

        optimizer = ESAM([weight], torch.optim.SGD, lr=0.1, rho=50.0, selection=selection)
        found.append([optimizer.backward(closure), weight.grad, rows[-1], weight.detach()])
    for mine, other in zip(*found, strict=True):
        assert torch.equal(mine, other)


# Right code.


@pytest.fixture
def nothing_is_said() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "The epoch parameter")
        yield


def steps(model, optimizer):
    for batch in DATA:
        optimizer.step(closure_of(model, batch))


def skipped_by_a_scaler(model, optimizer):
    scaler, calls = torch.amp.GradScaler("cpu"), []

    def overflowing(outputs, targets):
        calls.append(1)
        return cross_entropy(outputs, targets) * (torch.inf if len(calls) <= 6 else 1)

    for batch in DATA:
        optimizer.backward(batch_closure(model, overflowing, *batch), scaler)
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0**14


def a_disabled_scaler(model, optimizer):
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for batch in DATA:
        optimizer.backward(closure_of(model, batch), scaler)
        scaler.step(optimizer)
        scaler.update()


def schedulers(model, optimizer):
    warmup = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2)
    scheduler = lr_scheduler.SequentialLR(optimizer, [warmup, lr_scheduler.StepLR(optimizer, 1)], [2])
    for batch in DATA:
        optimizer.step(closure_of(model, batch))
        scheduler.step()


def an_evaluation_between(model, optimizer):
    for batch in DATA:
        optimizer.backward(closure_of(model, batch))
        model.eval()
        with torch.no_grad():
            model(batch[0])
        model.train()
        optimizer.step()


def gradients_dropped_on_purpose(model, optimizer):
    for batch, clear in zip(DATA, (optimizer.zero_grad, model.zero_grad, optimizer.zero_grad, model.zero_grad)):
        optimizer.backward(closure_of(model, batch))
        clear()
    optimizer.step(closure_of(model))


def two_players(model, optimizer):
    """Each loss reaches the other network too, whose gradients are cleared before its own step."""
    other = mlp()
    opposite = sgd(other)

    def loss(sign, index):
        rows = slice(None) if index is None else index
        return sign * other(model(DATA[0][0][rows]).mean(1, keepdim=True).expand(-1, 4))[:, 0]

    for _ in range(3):
        opposite.zero_grad()
        opposite.step(lambda index: loss(1, index))
        optimizer.zero_grad()
        optimizer.step(lambda index: loss(-1, index))
    opposite.backward(lambda index: loss(1, index))
    optimizer.backward(lambda index: loss(-1, index))
    opposite.step()
    optimizer.step()


def halves(model, optimizer):
    for second in ("second_step", "restore and step"):
        for batch in DATA:
            plain_backward(model, batch)
            optimizer.first_step(zero_grad=True)
            plain_backward(model, batch)
            if second == "second_step":
                optimizer.second_step(zero_grad=True)
            else:
                optimizer.restore()
                optimizer.step()
                optimizer.zero_grad()


def halves_after_a_step(model, optimizer):
    steps(model, optimizer)
    optimizer.zero_grad()
    halves(model, optimizer)
    steps(model, optimizer)


def a_closure_for_a_trainer(model, optimizer):
    for batch in DATA:
        optimizer.backward(closure_of(model, batch))
        optimizer.step(lambda: None)


def a_copy_between(model, optimizer):
    optimizer.backward(closure_of(model))
    copy.deepcopy(optimizer).step()
    optimizer.step()


def radius_of_zero(model, optimizer):
    optimizer.param_groups[0]["rho"] = 0.0
    plain_backward(model)
    optimizer.step()


def no_gradients_at_all(model, optimizer):
    optimizer.step()


def state_made_by_a_checkpoint(model, optimizer):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    state = get_optimizer_state_dict(model, optimizer)
    assert state["state"] is not None
    steps(model, optimizer)


def a_failed_step(model, optimizer):
    optimizer.step(closure_of(model))
    with pytest.raises(ZeroDivisionError):
        optimizer.backward(lambda index: 1 / 0)
    optimizer.step(closure_of(model))


def averaged_and_saved(model, optimizer):
    average = swa_utils.AveragedModel(model)
    for batch in DATA:
        optimizer.step(closure_of(model, batch))
        average.update_parameters(model)
        optimizer.load_state_dict(optimizer.state_dict())


RIGHT = [
    steps, skipped_by_a_scaler, a_disabled_scaler, schedulers, an_evaluation_between, gradients_dropped_on_purpose,
    two_players, halves, halves_after_a_step, a_closure_for_a_trainer, a_copy_between, radius_of_zero,
    no_gradients_at_all, state_made_by_a_checkpoint, a_failed_step, averaged_and_saved,
]  # fmt: skip


@pytest.mark.parametrize("code", RIGHT)
@pytest.mark.usefixtures("nothing_is_said")
def test_right_code_is_not_warned_of(code):
    model = mlp()
    gamma = 1.0 if code in (halves, halves_after_a_step) else 0.5
    code(model, sgd(model, gamma=gamma, momentum=0.9))
