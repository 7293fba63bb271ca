"""Hooks are called with the ESAM that they were registered on, as often as any optimizer's, and can be removed."""

import copy
import io
import pickle

import pytest
import torch
from networks import batches, cross_entropy, mlp, same, train, values
from torch.optim import lr_scheduler

from esam_kernels import ESAM, batch_closure

DATA = batches(2)
KINDS = ["SGD", "Adam", "AdamW", "Adadelta", "Adagrad", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop"]
KINDS += ["Adafactor", "Muon"]
REGISTER = ["step_pre", "step_post", "state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post"]


def esam(kind: str = "SGD") -> tuple:
    model = mlp()
    params = [param for param in model.parameters() if param.dim() == 2 or kind != "Muon"]  # which takes matrices alone
    return model, ESAM(None, getattr(torch.optim, kind)(params, lr=0.01))


def everything(model, optimizer) -> None:
    train(model, optimizer, DATA)
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", REGISTER)
def test_every_hook_gets_the_esam(kind, name):
    model, optimizer = esam(kind)
    seen = []
    handle = getattr(optimizer, f"register_{name}_hook")(lambda *args: seen.append(args))
    everything(model, optimizer)
    assert len(seen) == (len(DATA) if name.startswith("step") else 1)
    assert all(args[0] is optimizer for args in seen)
    if name.startswith("step"):
        assert all(args[1] == (optimizer,) and args[2] == {} for args in seen)
    handle.remove()
    everything(model, optimizer)
    assert len(seen) == (len(DATA) if name.startswith("step") else 1)


def test_a_hook_that_replaces_the_arguments_of_a_step():
    model, plain = mlp(), mlp()
    optimizer, other = (ESAM(one.parameters(), torch.optim.SGD, lr=0.1) for one in (model, plain))
    optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: (args, {**kwargs}))
    for network, one in ((model, optimizer), (plain, other)):
        train(network, one, DATA)
    assert same(values(model), values(plain))


def test_hooks_that_replace_a_state_dict():
    _, optimizer = esam()
    optimizer.register_state_dict_post_hook(lambda optimizer, state: {**state, "name": type(optimizer).__name__})
    optimizer.register_load_state_dict_pre_hook(lambda _, state: {k: v for k, v in state.items() if k != "name"})
    state = optimizer.state_dict()
    assert state["name"] == "ESAM"
    optimizer.load_state_dict(state)


def test_prepend_puts_a_hook_before_those_that_are_there():
    _, optimizer = esam()
    order = []
    optimizer.register_state_dict_pre_hook(lambda _: order.append("second"))
    optimizer.register_state_dict_pre_hook(lambda _: order.append("first"), prepend=True)
    optimizer.state_dict()
    assert order == ["first", "second"]


def test_a_handle_is_a_context():
    model, optimizer = esam()
    seen = []
    with optimizer.register_step_post_hook(lambda *_: seen.append(1)):
        train(model, optimizer, DATA[:1])
    train(model, optimizer, DATA[1:])
    assert seen == [1]


def test_hooks_of_the_base_itself_get_the_base():
    model, optimizer = esam()
    seen = []
    optimizer.base.register_step_post_hook(lambda one, *_: seen.append(one))
    train(model, optimizer, DATA)
    assert all(one is optimizer.base for one in seen)
    assert len(seen) == len(DATA)


def through_pickle(optimizer):
    return pickle.loads(pickle.dumps(optimizer))


def through_torch(optimizer):
    file = io.BytesIO()
    torch.save(optimizer, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@pytest.mark.parametrize("copy_of", [copy.deepcopy, through_pickle, through_torch])
def test_a_copy_has_its_own_hooks(copy_of):
    """It has none of those that it was copied with, as any optimizer of torch."""
    model, optimizer = esam()
    seen = []
    optimizer.register_step_post_hook(lambda one, *_: seen.append(one))
    lr_scheduler.StepLR(optimizer, 1)  # which puts a step of its own in place
    train(model, optimizer, DATA[:1])
    other = copy_of(optimizer)
    other.register_step_post_hook(lambda one, *_: seen.append(one))
    other.zero_grad()
    other.step()
    optimizer.step(batch_closure(model, cross_entropy, *DATA[1]))
    assert [id(one) for one in seen] == [id(optimizer), id(other), id(optimizer)]


class Wrapper(ESAM):
    """As Lightning's: a subclass made on the fly around an optimizer's attributes."""

    def __init__(self, optimizer: ESAM) -> None:
        vars(self).update({name: value for name, value in vars(optimizer).items() if name != "step"})
        self.wrapped = optimizer

    def step(self, closure=None):
        return self.wrapped.step(closure)


def test_a_wrapper_registers_as_itself():
    model, optimizer = esam()
    wrapper, seen = Wrapper(optimizer), []
    optimizer.register_step_post_hook(lambda one, *_: seen.append(one))
    wrapper.register_step_post_hook(lambda one, *_: seen.append(one))
    train(model, wrapper, DATA[:1])
    assert [one is expected for one, expected in zip(seen, (optimizer, wrapper), strict=True)] == [True, True]


def test_who_counts_the_steps_of_an_optimizer_may_do_so():
    optimizer = ESAM(mlp().parameters(), torch.optim.SGD, lr=0.1)
    optimizer._step_count = 5
    assert optimizer.param_groups[0]["esam_step"] == 0
