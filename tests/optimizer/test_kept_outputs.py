"""closure.outputs are the model's of the first pass over the whole batch at the weights, and never any others."""

from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from networks import BASES, batches, cross_entropy, mlp
from torch import nn

from esam_kernels import ESAM, batch_closure

INPUTS, TARGETS = batches(1, size=8)[0]
WHOLE = {
    "selection by increase": {},
    "SAM": {"gamma": 1},
    "selection by loss": {"selection": "loss"},
    "random selection": {"selection": "random"},
    "a surveyed share": {"ascent_share": 0.5},
    "surveyed momentum": {"ascent": "momentum"},
    "surveyed previous": {"ascent": "previous", "selection": "loss"},
    "a plain step": {"start": 5, "ascent": "momentum", "gamma": 1},
    "rho 0": {"rho": 0.0},
}
NEVER = {
    "momentum": {"ascent": "momentum", "gamma": 1},
    "previous, random": {"ascent": "previous", "selection": "random"},
    "a share": {"ascent_share": 0.5, "gamma": 1},
}


def esam(model: nn.Module, **options) -> ESAM:
    base, base_options = BASES["sgd"]
    return ESAM(model.parameters(), base, **{"rho": 2.0} | base_options | options)


@pytest.mark.parametrize("name", WHOLE)
def test_they_are_the_whole_batch_at_the_weights(name):
    model = mlp()
    optimizer = esam(model, **WHOLE[name])
    for _ in range(3):
        expected = model(INPUTS).detach()
        closure = batch_closure(model, cross_entropy, INPUTS, TARGETS, keep_outputs=True)
        optimizer.step(closure)
        assert torch.equal(closure.outputs, expected)
        assert not closure.outputs.requires_grad
        closure()  # not of a step
        closure(torch.arange(2))
        assert torch.equal(closure.outputs, expected)


@pytest.mark.parametrize("name", NEVER)
def test_where_no_pass_gives_them_it_is_said(name):
    model = mlp()
    optimizer = esam(model, **NEVER[name])
    closure = batch_closure(model, cross_entropy, INPUTS, TARGETS, keep_outputs=True)
    for _ in range(2):
        optimizer.step(closure)
        with pytest.raises(RuntimeError, match=r"ascent='momentum' or 'previous', or with an ascent_share"):
            _ = closure.outputs


def test_they_are_of_the_last_backward():
    model = mlp()
    optimizer = esam(model)
    closure = batch_closure(model, cross_entropy, INPUTS, TARGETS, keep_outputs=True)
    with pytest.raises(RuntimeError, match=r"no backward\(\)"):
        _ = closure.outputs
    for _ in range(2):
        expected = model(INPUTS).detach()
        optimizer.step(closure)
        assert torch.equal(closure.outputs, expected)


def test_only_if_asked_for():
    model = mlp()
    closure = batch_closure(model, cross_entropy, INPUTS, TARGETS)
    esam(model).step(closure)
    with pytest.raises(RuntimeError, match="keep_outputs=True"):
        _ = closure.outputs


def test_each_micro_batch_has_its_own():
    model = mlp()
    optimizer = esam(model)
    expected = model(INPUTS).detach()
    parts = zip(INPUTS.split([3, 5]), TARGETS.split([3, 5]))
    closures = [batch_closure(model, cross_entropy, *part, keep_outputs=True) for part in parts]
    optimizer.backward(closures)
    torch.testing.assert_close(torch.cat([closure.outputs for closure in closures]), expected)


Pair = namedtuple("Pair", "logits extra")


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp()

    def forward(self, x):
        logits = self.layers(x)
        return {"logits": logits, "all": [Pair(logits * 2, None), (3, SimpleNamespace(x=logits))]}


def test_nested_outputs_keep_their_structure_and_no_graph():
    model = Nested()
    closure = batch_closure(
        model, lambda outputs, y: cross_entropy(outputs["logits"], y), INPUTS, TARGETS, keep_outputs=True
    )
    esam(model).backward(closure)
    logits = model(INPUTS)["logits"].detach()
    outputs = closure.outputs
    assert torch.equal(outputs["logits"], logits)
    assert not outputs["logits"].requires_grad
    pair, rest = outputs["all"]
    assert isinstance(pair, Pair)
    assert torch.equal(pair.logits, logits * 2)
    assert pair.extra is None
    assert rest == (3, None)
