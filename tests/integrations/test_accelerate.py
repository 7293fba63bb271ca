"""Accelerate: prepared optimizers take ordinary closures, and accumulate is refused or said to lose gradients."""

import copy

import pytest
import torch
from networks import batches, mlp, perturbed, same, values
from torch import nn
from torch.nn.functional import cross_entropy

from esam_kernels import ESAM, batch_closure

accelerate = pytest.importorskip("accelerate", reason="needs the extra 'accelerate'")

each = nn.CrossEntropyLoss(reduction="none")
DATA = batches(4)


@pytest.fixture
def accelerator(request):
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()
    yield accelerate.Accelerator(cpu=True, **getattr(request, "param", {}))
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def make():
    model = mlp(nn.BatchNorm1d(8))
    return model, ESAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.5, beta=1, gamma=1)


def closure_of(accelerator, model, prepared, inputs, targets):
    def closure():
        prepared.zero_grad()
        loss = cross_entropy(model(inputs), targets)
        accelerator.backward(loss)
        return loss

    return closure


def by_hand(model, bf16=False):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for inputs, targets in DATA:

        def loss(network, x=inputs, y=targets):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                outputs = network(x)
            return cross_entropy(outputs.float(), y)

        moved = perturbed(model, loss, 0.5)
        loss(model)  # whose statistics stay
        loss(moved).backward()
        for param, twin in zip(model.parameters(), moved.parameters()):
            param.grad = twin.grad
        optimizer.step()
    return values(model)


@pytest.mark.parametrize(
    ("accelerator", "bf16"), [({}, False), ({"mixed_precision": "bf16"}, True)], indirect=["accelerator"], ids=str
)
def test_a_prepared_optimizer_takes_an_ordinary_closure(accelerator, bf16):
    model, optimizer = make()
    expected = by_hand(copy.deepcopy(model), bf16)
    model, prepared = accelerator.prepare(model, optimizer)
    for batch in DATA:
        prepared.step(closure_of(accelerator, model, prepared, *batch))
    for mine, theirs in zip(values(model), expected):
        torch.testing.assert_close(mine, theirs, atol=2e-3 if bf16 else 1e-6, rtol=2e-2 if bf16 else 1e-5)


@pytest.mark.parametrize("accelerator", [{"gradient_accumulation_steps": 2}], indirect=True)
def test_accumulate_is_refused_with_an_ordinary_closure(accelerator):
    model, optimizer = make()
    model, prepared = accelerator.prepare(model, optimizer)
    before = values(model)
    with pytest.raises(RuntimeError, match=r"gradient_accumulation_steps = 2.*all micro-batches"):  # noqa: PT012
        for batch in DATA:
            with accelerator.accumulate(model):
                prepared.step(closure_of(accelerator, model, prepared, *batch))
    assert same(values(model), before)


@pytest.mark.parametrize("accelerator", [{"gradient_accumulation_steps": 2}], indirect=True)
def test_accumulate_around_backward_says_that_it_loses_gradients(accelerator):
    model, optimizer = make()
    model, prepared = accelerator.prepare(model, optimizer)
    with pytest.warns(UserWarning, match=r"replaces the gradient.*all of their closures in one list"):  # noqa: PT031
        for batch in DATA:
            with accelerator.accumulate(model):
                optimizer.backward(batch_closure(model, each, *batch))
                prepared.step()
                prepared.zero_grad()


@pytest.mark.parametrize("accelerator", [{"gradient_accumulation_steps": 2}], indirect=True)
def test_micro_batches_are_given_as_a_list(accelerator):
    """Whatever the accelerator accumulates, as long as nothing is put around backward()."""
    model, optimizer = make()
    other, twin = make()
    model, prepared = accelerator.prepare(model, optimizer)
    for pair in (DATA[:2], DATA[2:]):
        optimizer.backward([batch_closure(model, each, *batch) for batch in pair], accelerator.scaler)
        accelerator.clip_grad_norm_(model.parameters(), 0.1)
        prepared.step()
        twin.backward([batch_closure(other, each, *batch) for batch in pair])
        nn.utils.clip_grad_norm_(other.parameters(), 0.1)
        twin.step()
    assert same(values(model), values(other))


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(accelerator, tmp_path):
    model, prepared = accelerator.prepare(*make())
    ends = []
    for number, batch in enumerate(DATA):
        if number == 2:
            accelerator.save_state(str(tmp_path))
        prepared.step(closure_of(accelerator, model, prepared, *batch))
    ends.append(values(model))
    accelerator.load_state(str(tmp_path))
    for batch in DATA[2:]:
        prepared.step(closure_of(accelerator, model, prepared, *batch))
    ends.append(values(model))
    assert same(*ends)


@pytest.mark.parametrize("overflows", [False, True])
def test_with_a_scaler(accelerator, overflows):
    """Accelerate makes one on a GPU only: here its optimizer gets one of a CPU."""
    model, optimizer = make()
    scaler = torch.amp.GradScaler("cpu")
    prepared = accelerate.optimizer.AcceleratedOptimizer(optimizer, scaler=scaler)
    before = [param.detach().clone() for param in model.parameters()]
    if overflows:
        model[0].weight.register_hook(lambda grad: grad * torch.inf)
    optimizer.backward(batch_closure(model, each, *DATA[0]), scaler)
    prepared.step()
    assert prepared.step_was_skipped == overflows
    assert same(model.parameters(), before) == overflows


def test_a_scaler_is_refused_with_an_ordinary_closure(accelerator):
    model, optimizer = make()
    scaler = torch.amp.GradScaler("cpu")
    prepared = accelerate.optimizer.AcceleratedOptimizer(optimizer, scaler=scaler)
    scaler.scale(cross_entropy(model(DATA[0][0]), DATA[0][1])).backward()
    with pytest.raises(RuntimeError, match=r"GradScaler\.step\(\) was given a closure"):
        prepared.step(closure_of(accelerator, model, prepared, *DATA[0]))
