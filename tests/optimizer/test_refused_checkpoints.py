"""A checkpoint that is refused, by ESAM or by the base optimizer, leaves groups and state as they were, bit for bit."""

import copy

import pytest
import torch
from networks import BASES, batches, cross_entropy, mlp, same, train, values
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from esam_kernels import ESAM, batch_closure

DATA = batches(6)


def build(base: str = "adamw") -> tuple[nn.Module, ESAM]:
    model = mlp()
    kind, options = BASES[base]
    groups = [{"params": model[0].parameters()}, {"params": model[2:].parameters(), "rho": 0.2}]
    return model, ESAM(groups, kind, **options)


def contents(optimizer: torch.optim.Optimizer) -> list:
    """Everything in groups and state, and which objects hold it."""
    groups = [(id(group), {**group, "params": [*map(id, group["params"])]}) for group in optimizer.param_groups]
    state = [
        (id(param), id(of_param), [(k, id(v), v.tolist() if isinstance(v, Tensor) else v) for k, v in of_param.items()])
        for param, of_param in optimizer.state.items()
    ]
    return [id(optimizer.param_groups), id(optimizer.state), groups, state]


def check_refused(optimizer: ESAM, state: object, words: str, error: type[BaseException] = ValueError) -> None:
    before = contents(optimizer)
    with pytest.raises(error, match=words):
        optimizer.load_state_dict(state)
    assert contents(optimizer) == before


BAD = [
    ("rho", -1, r"rho = -1: a number >= 0"),
    ("rho", float("nan"), "rho = nan"),
    ("rho", "0.1", "rho = '0.1'"),
    ("beta", 0.25, "beta is .*only rho and adaptive may differ"),
    ("seed", 5, "seed is .*only rho and adaptive may differ"),
    ("interval", 0, "interval = 0"),
    ("esam_step", -3, "esam_step = -3"),
]


@pytest.mark.parametrize(("name", "value", "words"), BAD)
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_settings_that_cannot_be(name, value, words, trained, base):
    model, optimizer = build(base)
    other, source = build(base)
    train(other, source, DATA[:3])
    if trained:
        train(model, optimizer, DATA[3:])
    state = source.state_dict()
    state["param_groups"][1][name] = value
    check_refused(optimizer, state, words)
    train(model, optimizer, DATA)


def test_a_checkpoint_of_another_shape():
    _, optimizer = build()
    state = ESAM(mlp().parameters(), torch.optim.AdamW).state_dict()
    check_refused(optimizer, state, "different number of parameter groups")
    check_refused(optimizer, {"state": {}}, "param_groups", KeyError)


class Fragile(torch.optim.AdamW):
    """Changes what it has before it fails."""

    failing = False

    def load_state_dict(self, state_dict):
        self.param_groups[0]["lr"] = 7.0
        self.param_groups[0].pop("rho")
        for of_param in self.state.values():
            of_param["step"] = None
        self.state[next(iter(self.state))] = {}
        super().load_state_dict(state_dict)
        self.param_groups.append({})
        if self.failing:
            raise KeyboardInterrupt("in the middle")


@pytest.mark.parametrize("failing", ["base", "hook"])
def test_a_base_that_fails_in_the_middle(failing):
    model, twin = mlp(), mlp()
    kind = Fragile if failing == "base" else torch.optim.AdamW
    optimizer, expected = ESAM(model.parameters(), kind, lr=0.01), ESAM(twin.parameters(), torch.optim.AdamW, lr=0.01)
    for one in ((model, optimizer), (twin, expected)):
        train(*one, DATA[:3])
    state = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, DATA[3:])
    train(twin, expected, DATA[3:])

    def interrupt(*_):
        raise KeyboardInterrupt("in the middle")

    if failing == "base":
        optimizer.base.failing = True
    else:
        hook = optimizer.register_load_state_dict_post_hook(interrupt)
    check_refused(optimizer, state, "in the middle", KeyboardInterrupt)
    if failing == "hook":
        hook.remove()
    for one in ((model, optimizer), (twin, expected)):
        train(*one, DATA)
    assert same(values(model), values(twin))


def test_a_gradient_that_is_there_stays_with_a_refused_checkpoint():
    model, optimizer = build()
    state = optimizer.state_dict()
    state["param_groups"][0]["rho"] = -1
    optimizer.backward(batch_closure(model, cross_entropy, *DATA[0]))
    check_refused(optimizer, state, "rho = -1")
    called = []
    optimizer.step(lambda: called.append(1))  # as a trainer calls it after backward
    assert called == [1]


def test_the_sharded_state_of_zero_redundancy_optimizer(one_rank):
    model = mlp()
    optimizer = ESAM(model.parameters(), ZeroRedundancyOptimizer, optimizer_class=torch.optim.AdamW, lr=0.01)
    train(model, optimizer, DATA[:2])
    optimizer.base.consolidate_state_dict()
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0]["rho"] = -1
    for of_param in state["state"].values():
        of_param["exp_avg"] += 1
    inner = copy.deepcopy(optimizer.base.optim.state_dict())
    check_refused(optimizer, state, "rho = -1")
    now = optimizer.base.optim.state_dict()
    for i, of_param in inner["state"].items():
        assert same(of_param.values(), now["state"][i].values())
