"""A run that is resumed, from a checkpoint or a copy, goes on as if it had never stopped: bit for bit on a CPU."""

import copy
import io
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from networks import BASES, batches, cross_entropy, mlp, same, train, values
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_model_state_dict, set_optimizer_state_dict

from esam_kernels import ESAM, batch_closure

DATA = batches(12)
bases = pytest.mark.parametrize("base", BASES)
granularities = pytest.mark.parametrize("granularity", ["tensor", "element"])
# Every direction of ascent, saved in every phase: after five steps the first is a plain one, or a sharp one.
SOURCES = [
    {"ascent": ascent, "start": start, "interval": interval, "ascent_share": share, "granularity": granularity}
    for ascent, share, granularity in (
        ("gradient", 0.5, "tensor"),
        ("momentum", 1.0, "tensor"),
        ("momentum", 1.0, "element"),
        ("previous", 1.0, "tensor"),
        ("previous", 1.0, "element"),
    )
    for start, interval in ((0, 1), (5, 1), (7, 1), (1, 2), (2, 2))
]
sources = pytest.mark.parametrize("source", SOURCES, ids=lambda source: " ".join(map(str, source.values())))


def build(base: str, seed: int = 0, **options) -> tuple[nn.Module, ESAM]:
    model = mlp(nn.BatchNorm1d(8), seed=seed)
    kind, base_options = BASES[base]
    return model, ESAM(model.parameters(), kind, **base_options, **options)


def through_torch_save(checkpoint: dict) -> dict:
    file = io.BytesIO()
    torch.save(checkpoint, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@bases
@granularities
def test_torch_save(base, granularity):
    options = {"granularity": granularity, "seed": 5, "interval": 2, "rho": 0.2, "steering_dtype": torch.bfloat16}
    model, optimizer = build(base, **options)
    train(model, optimizer, DATA[:5])
    checkpoint = through_torch_save({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    train(model, optimizer, DATA[5:])

    resumed, resumed_optimizer = build(base, seed=1)  # the settings are the checkpoint's
    resumed.load_state_dict(checkpoint["model"])
    resumed_optimizer.load_state_dict(checkpoint["optimizer"])
    train(resumed, resumed_optimizer, DATA[5:])
    assert same(values(model), values(resumed))
    # The step count did matter: masks of step 0 would have given something else.
    for group in resumed_optimizer.param_groups:
        assert group["esam_step"] == len(DATA)


@bases
@sources
def test_each_source_in_each_phase(base, source):
    options = {**source, "seed": 5, "rho": 0.2}
    model, optimizer = build(base, **options)
    train(model, optimizer, DATA[:5])
    checkpoint = through_torch_save({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    copied, copied_optimizer = copy.deepcopy((model, optimizer))
    weights, state = copy.deepcopy(get_state_dict(model, optimizer))
    train(model, optimizer, DATA[5:])

    resumed, resumed_optimizer = build(base, seed=1)  # the settings are the checkpoint's
    resumed.load_state_dict(checkpoint["model"])
    resumed_optimizer.load_state_dict(checkpoint["optimizer"])
    train(resumed, resumed_optimizer, DATA[5:])
    assert same(values(model), values(resumed))
    train(copied, copied_optimizer, DATA[5:])
    assert same(values(model), values(copied))

    resumed, fresh = build(base, seed=1)
    set_model_state_dict(resumed, weights)
    set_optimizer_state_dict(resumed, fresh, state)
    train(resumed, fresh, DATA[5:])
    assert same(values(model), values(resumed))


def test_a_checkpoint_from_before_there_were_sources_takes_those_that_are_set():
    model, optimizer = build("sgd")
    train(model, optimizer, DATA[:5])
    checkpoint = optimizer.state_dict()
    for group in checkpoint["param_groups"]:
        for key in ("ascent", "ascent_share", "start"):
            del group[key]
    for ascent in ("gradient", "momentum", "previous"):
        twin = copy.deepcopy(model)
        resumed = ESAM(twin.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, ascent=ascent, start=2)
        resumed.load_state_dict(copy.deepcopy(checkpoint))
        group = resumed.param_groups[0]
        assert (group["ascent"], group["start"], group["ascent_share"], group["rho"]) == (ascent, 2, 1.0, 0.05)
        train(twin, resumed, DATA[5:])
        assert all(value.isfinite().all() for value in values(twin))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # a single process is what is meant
@bases
@pytest.mark.parametrize("kind", ["tensor", "element", "momentum", "previous"])
@pytest.mark.parametrize("has_state", [False, True], ids=["lazy", "initialized"])
def test_distributed_checkpoint(base, kind, has_state, tmp_path):
    options = {"ascent" if kind in ("momentum", "previous") else "granularity": kind}
    model, optimizer = build(base, **options, seed=5, rho=0.2)
    train(model, optimizer, DATA[:5])
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=tmp_path)
    train(model, optimizer, DATA[5:])

    resumed, resumed_optimizer = build(base, seed=1, **options)
    if has_state:
        train(resumed, resumed_optimizer, DATA[:2])
    before = values(resumed)
    weights, state = get_state_dict(resumed, resumed_optimizer)  # makes the state of a fresh optimizer
    assert same(before, values(resumed))
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=tmp_path)
    set_model_state_dict(resumed, weights)
    set_optimizer_state_dict(resumed, resumed_optimizer, state)
    train(resumed, resumed_optimizer, DATA[5:])
    assert same(values(model), values(resumed))


@bases
def test_state_is_made_by_set_optimizer_state_dict(base):
    model, optimizer = build(base, seed=5, rho=0.2)
    train(model, optimizer, DATA[:5])
    weights, state = copy.deepcopy(get_state_dict(model, optimizer))
    train(model, optimizer, DATA[5:])

    resumed, fresh = build(base, seed=1)
    resumed.load_state_dict(weights)
    set_optimizer_state_dict(resumed, fresh, state)
    train(resumed, fresh, DATA[5:])
    assert same(values(model), values(resumed))


@bases
def test_a_plain_checkpoint_loads_into_esam(base):
    model = mlp()
    kind, options = BASES[base]
    plain = kind(model.parameters(), **options)
    for inputs, targets in DATA[:5]:
        plain.zero_grad()
        cross_entropy(model(inputs), targets).mean().backward()
        plain.step()
    checkpoint = through_torch_save(plain.state_dict())

    twin = copy.deepcopy(model)
    esam = ESAM(twin.parameters(), kind, **{**options, "lr": 7.0}, rho=0.0, beta=0.25)
    esam.load_state_dict(checkpoint)
    assert esam.param_groups[0]["lr"] == options["lr"]
    assert esam.param_groups[0]["beta"] == 0.25  # what the checkpoint lacks stays
    for inputs, targets in DATA[5:]:
        esam.step(batch_closure(twin, cross_entropy, inputs, targets))
        plain.zero_grad()
        cross_entropy(model(inputs), targets).mean().backward()
        plain.step()
    assert same(values(model), values(twin))  # rho = 0: the base optimizer's own continuation
    for group in esam.param_groups:
        group["rho"] = 0.1
    train(twin, esam, DATA)
    assert all(value.isfinite().all() for value in values(twin))


@bases
def test_an_esam_checkpoint_loads_into_the_plain_optimizer(base):
    model, esam = build(base)
    train(model, esam, DATA[:5])
    twin = copy.deepcopy(model)
    plain = BASES[base][0](twin.parameters(), lr=7.0)
    plain.load_state_dict(through_torch_save(esam.state_dict()))
    for group in esam.param_groups:
        group["rho"] = 0.0
    for inputs, targets in DATA[5:]:
        esam.step(batch_closure(model, cross_entropy, inputs, targets))
        plain.zero_grad()
        cross_entropy(twin(inputs), targets).mean().backward()
        plain.step()
    assert same(values(model), values(twin))


def test_a_checkpoint_of_another_layout_is_refused_and_changes_nothing():
    model, optimizer = build("sgd")
    train(model, optimizer, DATA[:3])
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="param"):
        optimizer.load_state_dict(ESAM(mlp()[0].parameters(), torch.optim.SGD, lr=0.1).state_dict())
    after = optimizer.state_dict()
    assert before["param_groups"] == after["param_groups"]
    assert same(*([s["momentum_buffer"] for s in d["state"].values()] for d in (before, after)))


ACTIONS = {
    "state_dict": lambda optimizer: optimizer.state_dict(),
    "load_state_dict": lambda optimizer: optimizer.load_state_dict({"state": {}, "param_groups": []}),
    "add_param_group": lambda optimizer: optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]}),
    "step": lambda optimizer: optimizer.step(),
    "first_step": lambda optimizer: optimizer.first_step(),
    "backward": lambda optimizer: optimizer.backward(lambda index: torch.ones(2, requires_grad=True)),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": pickle.dumps,
}


@pytest.mark.parametrize("when", ["pass 1", "pass 2", "pass 3", "plain pass", "first_step"])
@pytest.mark.parametrize("action", ACTIONS)
def test_half_a_step_is_neither_saved_nor_stepped(action, when):
    model, optimizer = build("sgd", gamma=1.0 if when == "first_step" else 0.5)
    train(model, optimizer, DATA[:1])
    if when == "plain pass":
        optimizer.param_groups[0]["rho"] = 0.0
    closure = batch_closure(model, cross_entropy, *DATA[0])
    calls = 0
    refusals = []

    def attempt():
        with pytest.raises(RuntimeError, match=r"first_step|backward\(\)") as refusal:
            ACTIONS[action](optimizer)
        refusals.append(str(refusal.value))

    def attempting(index):
        nonlocal calls
        calls += 1
        losses = closure(index)
        if f"pass {calls}" == when or when == "plain pass":
            attempt()
        return losses

    if when == "first_step":
        closure(None).mean().backward()
        optimizer.first_step()
        attempt()
        optimizer.second_step()
    else:
        optimizer.step(attempting)
    assert len(refusals) == 1
    groups = len(optimizer.param_groups)
    optimizer.state_dict()
    copy.deepcopy(optimizer)
    assert groups == 1  # and between steps all is allowed again


@bases
@granularities
@pytest.mark.parametrize(
    "copy_of", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_a_copy_continues_identically(base, granularity, copy_of):
    model, optimizer = build(base, granularity=granularity, seed=3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 100)  # wraps step() of the original, as schedulers do
    train(model, optimizer, DATA[:4])
    scheduler.step()
    other, other_optimizer = copy_of((model, optimizer))
    assert {id(p) for g in other_optimizer.param_groups for p in g["params"]} == {id(p) for p in other.parameters()}
    start = values(model)
    train(other, other_optimizer, DATA[4:])
    assert same(start, values(model))  # the copy is not tied to the original
    assert optimizer.param_groups[0]["esam_step"] == 4
    train(model, optimizer, DATA[4:])
    assert same(values(model), values(other))


def test_settings_of_a_ready_base_survive_a_copy_and_a_checkpoint():
    model = mlp()
    optimizer = ESAM(None, torch.optim.Adadelta(model.parameters(), rho=0.8), rho=0.1)
    train(model, optimizer, DATA[:2])
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    twin_optimizer.load_state_dict(through_torch_save(optimizer.state_dict()))
    train(model, optimizer, DATA[2:])
    train(twin, twin_optimizer, DATA[2:])
    assert same(values(model), values(twin))
    assert twin_optimizer.param_groups[0]["rho"] == 0.8
    assert twin_optimizer.param_groups[0]["esam_rho"] == 0.1


@pytest.mark.filterwarnings("error")
def test_a_checkpoint_that_has_lost_the_last_gradients_is_said(tmp_path):
    """Where ascent was changed in training, a new optimizer makes no room for them in a distributed checkpoint."""
    model, optimizer = build("adamw", beta=1, gamma=1)
    train(model, optimizer, DATA[:2])
    for group in optimizer.param_groups:
        group["ascent"] = "previous"
    train(model, optimizer, DATA[2:5])
    state = copy.deepcopy(optimizer.state_dict())
    resumed = build("adamw", beta=1, gamma=1)[1]
    resumed.load_state_dict(copy.deepcopy(state))  # as it should be
    for entry in state["state"].values():
        del entry["esam_previous"]
    with pytest.warns(UserWarning, match=r"no gradient of the last step.*next step is plain.*group\['ascent'\]"):
        build("adamw", beta=1, gamma=1)[1].load_state_dict(state)


def test_a_base_around_another_optimizer_is_resumed():
    lookahead = pytest.importorskip("pytorch_optimizer").Lookahead

    def build_around():
        model = build("sgd")[0]
        return model, ESAM(None, lookahead(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)), rho=0.2)

    model, optimizer = build_around()
    train(model, optimizer, DATA[:5])
    weights, state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    resumed, fresh = build_around()
    resumed.load_state_dict(weights)
    fresh.load_state_dict(state)
    assert fresh.param_groups[0]["esam_step"] == 5
