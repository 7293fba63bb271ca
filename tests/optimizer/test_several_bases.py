"""ESAM over a list of base optimizers is one optimizer: one perturbation, one list of groups, one checkpoint."""

import copy
import io
import pickle

import pytest
import torch
from networks import batches, cross_entropy, grads, mlp, perturbed, same, train, values
from torch import nn

from esam_kernels import ESAM, batch_closure

DATA = batches(6)


def split(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    params = list(model.parameters())
    return [param for param in params if param.dim() == 2], [param for param in params if param.dim() != 2]


def bases(model: nn.Module, **adamw) -> list[torch.optim.Optimizer]:
    matrices, others = split(model)
    return [torch.optim.Muon(matrices, lr=0.05), torch.optim.AdamW(others, lr=0.01, **adamw)]


def esam(model: nn.Module, **options) -> ESAM:
    return ESAM(None, bases(model), **{"rho": 0.5, "beta": 1, "gamma": 1} | options)


def test_it_is_sam_by_hand_with_one_norm_over_all():
    model, other = mlp(dtype=torch.float64), mlp(dtype=torch.float64)
    optimizer, by_hand = esam(model), bases(other)
    for inputs, targets in batches(6, dtype=torch.float64):
        optimizer.step(batch_closure(model, cross_entropy, inputs, targets))
        moved = perturbed(other, lambda network, x=inputs, y=targets: cross_entropy(network(x), y).mean(), 0.5)
        cross_entropy(moved(inputs), targets).mean().backward()
        for param, twin in zip(other.parameters(), moved.parameters()):
            param.grad = twin.grad
        for base in by_hand:
            base.step()
        for mine, theirs in zip(values(model), values(other)):
            # Muon orthogonalizes in bfloat16, where a last digit of the gradient may round the other way.
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)
    assert optimizer.last_step.weights == sum(param.numel() for param in model.parameters())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta": 0.6, "gamma": 0.5, "granularity": "element"},
        {"ascent": "momentum"},
        {"ascent": "previous", "beta": 0.5},
        {"adaptive": True, "interval": 2},
    ],
    ids=str,
)
def test_two_of_a_kind_are_one_optimizer_with_two_groups(options):
    model, other = mlp(), mlp()
    options = {"rho": 0.5} | options
    sgd = {"lr": 0.1, "momentum": 0.9}
    optimizer = ESAM(None, [torch.optim.SGD(part, **sgd) for part in split(model)], **options)
    one = ESAM([{"params": part} for part in split(other)], torch.optim.SGD, **sgd, **options)
    train(model, optimizer, DATA)
    train(other, one, DATA)
    assert same(values(model), values(other))
    mine, theirs = optimizer.state_dict(), one.state_dict()
    assert mine["param_groups"] == theirs["param_groups"]
    assert mine["state"].keys() == theirs["state"].keys()
    one.load_state_dict(mine)  # one layout
    optimizer.load_state_dict(theirs)
    train(model, optimizer, DATA)
    train(other, one, DATA)
    assert same(values(model), values(other))


def test_groups_are_those_of_the_bases():
    model = mlp()
    muon, adamw = bases(model)
    optimizer = ESAM(None, [muon, adamw], rho=0.5)
    assert [id(group) for group in optimizer.param_groups] == [id(muon.param_groups[0]), id(adamw.param_groups[0])]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    train(model, optimizer, DATA[:1])
    scheduler.step()
    assert (muon.param_groups[0]["lr"], adamw.param_groups[0]["lr"]) == (0.025, 0.005)
    extra = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [extra], "lr": 0.3, "rho": 0.1})
    assert optimizer.param_groups[-1] is adamw.param_groups[-1]
    assert optimizer.param_groups[-1]["esam_step"] == 1
    with pytest.raises(TypeError, match="add_param_group"):
        optimizer.param_groups.append({})
    count = len(optimizer.param_groups)
    with pytest.raises(ValueError, match="rho = -1"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))], "rho": -1})
    with pytest.raises(ValueError, match="2 times"):
        optimizer.add_param_group({"params": [next(model.parameters())]})
    assert len(optimizer.param_groups) == count
    train(model, optimizer, DATA[:1])


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("resumed", [False, True])
def test_a_group_may_be_added_to_the_base_itself_at_any_time(several, resumed):
    model, added = mlp(), mlp()
    ready = bases(model) if several else torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = ESAM(None, ready)
    train(model, optimizer, DATA[:3])
    if resumed:
        state = optimizer.state_dict()
        optimizer = ESAM(None, bases(model) if several else torch.optim.SGD(model.parameters(), lr=0.1))
        optimizer.load_state_dict(state)
    base = optimizer.base.bases[1] if several else optimizer.base
    base.add_param_group({"params": added.parameters()})
    before = values(added)
    train(nn.Sequential(model, nn.Linear(3, 4), added), optimizer, DATA[:1])
    assert [group["esam_step"] for group in optimizer.param_groups] == [4] * len(optimizer.param_groups)
    assert not same(values(added), before)


def test_rho_and_its_default_are_per_group_as_ever():
    model = mlp()
    matrices, others = split(model)
    muon, adamw = torch.optim.Muon([{"params": matrices, "rho": 0.2}]), torch.optim.AdamW(others)
    optimizer = ESAM(None, [muon, adamw], rho=0.0, beta=1, gamma=1)
    assert [group["rho"] for group in optimizer.param_groups] == [0.2, 0.0]
    optimizer.backward(batch_closure(model, cross_entropy, *DATA[0]))
    assert optimizer.last_step.weights == sum(param.numel() for param in matrices)


@pytest.mark.parametrize("ascent", ["gradient", "momentum", "previous"])
def test_a_checkpoint_resumes_bit_for_bit(ascent):
    model = mlp()
    optimizer = esam(model, ascent=ascent, beta=0.5)
    train(model, optimizer, DATA)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    of_model, of_optimizer = torch.load(file)
    other = mlp(seed=1)
    other.load_state_dict(of_model)
    resumed = esam(other, seed=99)
    resumed.load_state_dict(of_optimizer)
    for one, by in ((model, optimizer), (other, resumed)):
        train(one, by, DATA)
    assert same(values(model), values(other))


@pytest.mark.parametrize("make", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_go_on_by_themselves(make):
    model = mlp()
    optimizer = esam(model, beta=0.5)
    train(model, optimizer, DATA)
    other, copied = make((model, optimizer))
    train(model, optimizer, DATA)
    assert not same(values(model), values(other))
    train(other, copied, DATA)
    assert same(values(model), values(other))


@pytest.mark.parametrize("change", ["sizes", "setting", "second"])
def test_what_cannot_be_loaded_changes_nothing(change):
    model = mlp()
    optimizer = esam(model)
    train(model, optimizer, DATA)
    before = copy.deepcopy(optimizer.state_dict())
    bad = copy.deepcopy(before)
    bad["param_groups"][0]["lr"] = bad["param_groups"][1]["lr"] = 7.0
    if change == "sizes":
        bad["param_groups"][0]["params"].append(bad["param_groups"][1]["params"].pop())
    elif change == "setting":
        bad["param_groups"][1]["rho"] = -1
    else:  # the first one has been loaded when it comes to light
        adamw = optimizer.base.bases[1]
        adamw.register_load_state_dict_post_hook(lambda _: 1 / 0)
    with pytest.raises((ValueError, ZeroDivisionError)):
        optimizer.load_state_dict(bad)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert same(
        [value for entry in after["state"].values() for value in entry.values()],
        [value for entry in before["state"].values() for value in entry.values()],
    )


def test_hooks_are_called_once_with_the_optimizer_they_are_registered_on():
    model, calls = mlp(), []
    optimizer = esam(model)
    optimizer.register_step_pre_hook(lambda one, *_: calls.append(("step", one)))
    optimizer.register_step_post_hook(lambda one, *_: calls.append(("stepped", one)))
    optimizer.register_state_dict_pre_hook(lambda one: calls.append(("save", one)))
    optimizer.register_state_dict_post_hook(lambda one, found: calls.append(("saved", one)) or {**found, "extra": 1})
    optimizer.register_load_state_dict_pre_hook(lambda one, _: calls.append(("load", one)))
    optimizer.register_load_state_dict_post_hook(lambda one: calls.append(("loaded", one)))
    train(model, optimizer, DATA[:1])
    saved = optimizer.state_dict()
    assert saved["extra"] == 1
    optimizer.load_state_dict(saved)
    assert calls == [(name, optimizer) for name in ("step", "stepped", "save", "saved", "load", "loaded")]


def test_state_is_read_and_written_through():
    model = mlp()
    optimizer = esam(model)
    assert not optimizer.state
    train(model, optimizer, DATA[:1])
    matrices, others = split(model)
    assert optimizer.state.keys() == {*matrices, *others}
    assert len(optimizer.state) == len(matrices) + len(others)
    optimizer.state[others[0]]["mine"] = 1
    assert optimizer.base.bases[1].state[others[0]]["mine"] == 1
    for param, entry in optimizer.state.items():
        optimizer.state[param] = dict(entry)
    optimizer.state.clear()
    assert not any(base.state for base in optimizer.base.bases)
    assert optimizer.state.get(matrices[0]) is None
    with pytest.raises(KeyError):
        optimizer.state[torch.ones(2)]


@pytest.mark.parametrize("fused", ["none", "one", "all"])
@pytest.mark.parametrize("overflow", [False, True])
def test_a_grad_scaler_unscales_and_skips(fused, overflow):
    models = [mlp(), mlp()]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    found = []
    for model, use in zip(models, (scaler, None)):
        parts = split(model)
        sgd = [torch.optim.SGD(p, lr=0.1, fused=fused == "all" or (fused == "one" and i == 0))
               for i, p in enumerate(parts)]  # fmt: skip
        optimizer = ESAM(None, sgd, rho=0.5, beta=1, gamma=1)
        before = values(model)
        optimizer.backward(batch_closure(model, cross_entropy, *DATA[0]), use)
        if use and overflow:
            next(model.parameters()).grad[0, 0] = torch.inf
        if use:
            use.step(optimizer)
            use.update()
        else:
            optimizer.step()
        found.append(same(before, values(model)))
        assert not any(hasattr(base, name) for base in sgd for name in ("grad_scale", "found_inf"))
    assert found == [overflow, False]
    if not overflow:
        for a, b in zip(*map(values, models)):
            torch.testing.assert_close(a, b)


def test_names_of_one_of_them_are_kept_apart():
    """Adadelta has a rho of its own."""
    model = mlp()
    matrices, others = split(model)
    optimizer = ESAM(None, [torch.optim.Muon(matrices), torch.optim.Adadelta(others, rho=0.8)], rho=0.3)
    assert [group["esam_rho"] for group in optimizer.param_groups] == [0.3, 0.3]
    assert "rho" not in optimizer.param_groups[0]
    assert optimizer.param_groups[1]["rho"] == 0.8
    train(model, optimizer, DATA)


def test_zero_grad_clears_all():
    model = mlp()
    optimizer = esam(model)
    optimizer.backward(batch_closure(model, cross_entropy, *DATA[0]))
    assert all(grad is not None for grad in grads(model))
    optimizer.zero_grad()
    assert all(grad is None for grad in grads(model))


def refused(model):
    muon, adamw = bases(model)
    yield [], ValueError, "empty list"
    yield [torch.optim.SGD], TypeError, r"make each optimizer with its parameters"
    yield [muon, "adamw"], TypeError, "'adamw'"
    yield [muon, torch.optim.LBFGS(model.parameters())], ValueError, "LBFGS evaluates a closure"
    yield [muon, torch.optim.SGD(model.parameters())], ValueError, "2 times in the list"
    yield [muon, torch.optim.SGD(split(model)[1], lr=0.1, maximize=True)], ValueError, "maximize"
    yield (
        [muon, ESAM(None, torch.optim.SGD(split(model)[1]))],
        ValueError,
        "base is ESAM, which is sharpness-aware itself",
    )
    ESAM(None, adamw)
    yield [muon, adamw], ValueError, "this AdamW is the base of another ESAM"


def test_what_cannot_be_a_list_of_bases_is_refused():
    for given, error, words in refused(mlp()):
        with pytest.raises(error, match=words):
            ESAM(None, given)


@pytest.mark.parametrize("second", [torch.optim.Adagrad, lambda params: torch.optim.SGD(params, lr=0.1)])
def test_a_direction_that_one_of_them_does_not_have_is_refused(second):
    model = mlp()
    matrices, others = split(model)
    with pytest.raises(ValueError, match="keeps no first moment"):
        ESAM(None, [torch.optim.Muon(matrices), second(others)], ascent="momentum", gamma=1)
    ESAM([{"params": others, "rho": 0.0}], torch.optim.SGD, lr=0.1, ascent="momentum", gamma=1)


def test_options_of_a_base_are_not_taken():
    with pytest.raises(ValueError, match="lr cannot be set"):
        ESAM(None, bases(mlp()), lr=0.1)


@pytest.mark.parametrize("order", [1, -1])
def test_the_default_radius_does_not_depend_on_their_order(order):
    model = mlp()
    bases = [torch.optim.SGD(model[0].parameters(), lr=0.1, momentum=0.9), torch.optim.AdamW(model[2:].parameters())]
    assert ESAM(None, bases[::order], ascent="momentum").param_groups[0]["rho"] == 0.3
