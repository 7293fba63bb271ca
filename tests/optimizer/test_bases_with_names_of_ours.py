"""A base optimizer that has a rho, gamma or seed of its own in its groups keeps it, and ESAM's stands beside it."""

import copy
import importlib.util

import pytest
import torch
from networks import batches, cross_entropy, mlp, same, train, values

from esam_kernels import ESAM

DATA = batches(6)


class Seeded(torch.optim.SGD):
    """Adds noise from a seed that stands in its groups, and is no argument."""

    def __init__(self, params, lr: float) -> None:
        super().__init__(params, lr)
        self.fill()

    def fill(self) -> None:
        for group in self.param_groups:
            group["seed"] = 1234
            group["beta"] = "own"

    def step(self, closure=None):
        for group in self.param_groups:
            assert (group["seed"], group["beta"]) == (1234, "own")
            noise = torch.Generator().manual_seed(group["seed"])
            for param in group["params"]:
                param.grad += 0.01 * torch.randn(param.shape, generator=noise)
        super().step()


class InDefaults(Seeded):
    """The same with the seed among its defaults."""

    def fill(self) -> None:
        self.defaults.update(seed=1234, beta="own")
        super().fill()


KINDS = [Seeded, InDefaults]
if importlib.util.find_spec("pytorch_optimizer"):
    from pytorch_optimizer import AvaGrad

    KINDS.append(AvaGrad)
BASES = [(kind, ready) for kind in KINDS for ready in (False, True)]


def make(kind, ready: bool, model, **options) -> ESAM:
    if ready:
        return ESAM(None, kind(model.parameters(), lr=0.1), **options)
    return ESAM(model.parameters(), kind, lr=0.1, **options)


@pytest.mark.parametrize(("kind", "ready"), BASES)
def test_both_keep_their_own(kind, ready):
    plain, model = mlp(), mlp()
    base = kind(plain.parameters(), lr=0.1)
    esam = make(kind, ready, model, rho=0.0, seed=77, gamma=0.25, beta=0.5)
    for inputs, targets in DATA:
        base.zero_grad()
        cross_entropy(plain(inputs), targets).mean().backward()
        base.step()
    train(model, esam, DATA)
    assert same(values(plain), values(model))
    [group] = esam.param_groups
    own = {"AvaGrad": {"gamma"}}.get(kind.__name__, {"seed", "beta"})
    for name, value in {"seed": 77, "gamma": 0.25, "beta": 0.5}.items():
        assert group[f"esam_{name}" if name in own else name] == value
    for name in own:
        assert group[name] == base.param_groups[0][name]


@pytest.mark.parametrize(("kind", "ready"), BASES)
def test_both_are_in_checkpoints_and_under_another_esam(kind, ready):
    models = [mlp(), mlp()]
    first, second = make(kind, ready, models[0], seed=77, gamma=0.25), make(kind, ready, models[1])
    train(models[0], first, DATA[:2])
    models[1].load_state_dict(models[0].state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for model, optimizer in zip(models, (first, second)):
        train(model, optimizer, DATA[2:])
    assert same(values(models[0]), values(models[1]))

    base = kind(mlp().parameters(), lr=0.1)
    base.load_state_dict(first.state_dict())
    third = ESAM(None, base, seed=5)
    assert third._keys == first._keys
    assert third.param_groups[0][third._keys["seed"]] == 5


def test_groups_may_still_say_what_is_esam_s():
    model = mlp()
    groups = [{"params": model[0].parameters(), "rho": 0.2}, {"params": model[2:].parameters()}]
    first, second = ESAM(groups, Seeded, lr=0.1, rho=0.1).param_groups
    assert (first["rho"], second["rho"]) == (0.2, 0.1)
    groups = [{"params": list(model[0].parameters()), "rho": 0.2}, {"params": list(model[2:].parameters())}]
    first, second = ESAM(None, Seeded(groups, lr=0.1), rho=0.1).param_groups
    assert (first["rho"], second["rho"]) == (0.2, 0.1)
