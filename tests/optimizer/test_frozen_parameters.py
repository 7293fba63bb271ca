"""Frozen parameters of any kind may be among the optimizer's, whatever cannot be done with them."""

import copy

import pytest
import torch
from networks import batches, mlp, same, values
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from esam_kernels import ESAM, batch_closure

INPUTS, TARGETS = batches(1)[0]
SHARED = torch.ones(8)


def made_in_inference() -> Tensor:
    with torch.inference_mode():
        return torch.ones(3)


KINDS = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "CSR": lambda: torch.eye(3).to_sparse_csr(),
    "mkldnn": lambda: torch.eye(3).to_mkldnn(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "meta": lambda: torch.ones(3, device="meta"),
    "inference": made_in_inference,
    "fp8": lambda: torch.ones(3).to(torch.float8_e4m3fn),
    "fp4": lambda: torch.zeros(3, dtype=torch.uint8).view(getattr(torch, "float4_e2m1fn_x2", torch.uint8)),
    "quantized": lambda: torch.quantize_per_channel(torch.ones(2, 2), torch.ones(2), torch.zeros(2), 0, torch.qint8),
    "complex": lambda: torch.ones(3, dtype=torch.complex64),
    "expanded": lambda: torch.ones(1).expand(3),
    "whole numbers": lambda: torch.arange(3),
    "a part of another": lambda: SHARED[2:],
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, of kinds that are in beta
@pytest.mark.parametrize("gamma", [0.5, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_they_change_nothing(kind, gamma):
    model, alone = mlp(), mlp()
    frozen = [nn.Parameter(make(), requires_grad=False) for make in (KINDS[kind], lambda: SHARED)]
    optimizer = ESAM([*model.parameters(), *frozen], torch.optim.SGD, lr=0.1, rho=0.5, beta=1, gamma=gamma)
    other = ESAM(alone.parameters(), torch.optim.SGD, lr=0.1, rho=0.5, beta=1, gamma=gamma)
    loss_fn = nn.CrossEntropyLoss(reduction="none")
    for _ in range(3):
        for network, one in ((model, optimizer), (alone, other)):
            one.step(batch_closure(network, loss_fn, INPUTS, TARGETS))
    assert same(values(model), values(alone))
    calls = []

    def fails_at_last(index):
        calls.append(index)
        return model(INPUTS).sum(1) if len(calls) == 1 else calls[9]

    with pytest.raises(IndexError):
        optimizer.step(fails_at_last)
    assert same(values(model), values(alone))


def test_one_that_lies_in_a_trained_one_is_refused():
    weight = nn.Parameter(torch.ones(8))
    frozen = nn.Parameter(weight.data[2:], requires_grad=False)
    with pytest.raises(ValueError, match=r"shapes \[8\] and \[6\] share memory"):
        ESAM([weight, frozen], torch.optim.SGD, lr=0.1)


def test_one_that_is_thawed_later_is_looked_at_then():
    twin = nn.Parameter(SHARED, requires_grad=False)
    weights = [nn.Parameter(torch.ones(8)), nn.Parameter(SHARED, requires_grad=False), twin]
    optimizer = ESAM(weights, torch.optim.SGD, lr=0.1, gamma=1)
    twin.requires_grad_()
    with pytest.raises(ValueError, match="share memory"):
        optimizer.step(lambda index: sum(weight.sum() for weight in weights))


@pytest.mark.parametrize("ascent", ["gradient", "momentum", "previous"])
def test_weights_that_an_ordinary_closure_thaws_are_perturbed_or_said(ascent, recwarn):
    """As the discriminator of many GANs, which the generator's closure freezes."""
    model = mlp(dtype=torch.float64)
    by_hand = copy.deepcopy(model)
    options = {"lr": 0.1, "momentum": 0.9, "rho": 0.5, "beta": 1, "gamma": 1, "ascent": ascent}
    optimizer = ESAM(model.parameters(), torch.optim.SGD, **options)
    other = ESAM(by_hand.parameters(), torch.optim.SGD, **options)
    inputs, targets = batches(1, dtype=torch.float64)[0]

    def closure(network, one, thaws):
        def call():
            if thaws:
                network.requires_grad_(True)
            one.zero_grad()
            loss = cross_entropy(network(inputs), targets)
            loss.backward()
            return loss

        return call

    for _ in range(3):
        optimizer.step(closure(model, optimizer, True))
        other.step(closure(by_hand, other, False))
        assert optimizer.last_step.sharp or ascent != "gradient"
        model.requires_grad_(False)
    said = [warning for warning in recwarn if "frozen when the step began" in str(warning.message)]
    assert len(said) == (ascent != "gradient")
    if ascent == "gradient":
        assert same(values(model), values(by_hand))
