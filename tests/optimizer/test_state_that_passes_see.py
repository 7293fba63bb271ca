"""Every pass begins with the state from before the step, and what the first one leaves of it is what stays."""

import copy
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy
import pytest
import torch
from networks import batches, cross_entropy, grads, mlp, perturbed, train, values
from torch import Tensor, nn
from torch.nn.utils import prune

from esam_kernels import ESAM, batch_closure, current_pass, first_pass

DATA = batches(4)
RHO = 0.3


def sgd(network: nn.Module, **options) -> ESAM:
    return ESAM(
        network.parameters(), torch.optim.SGD, **{"lr": 0.1, "momentum": 0.9, "rho": RHO, "beta": 1.0, **options}
    )


class Queue(nn.Module):
    """As MoCo's: the loss compares with the keys of batches before, and puts these in their place."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()
        self.register_buffer("keys", torch.randn(16, 3))
        self.register_buffer("place", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.inner(x)
        logits = outputs @ self.keys.clone().t()
        with torch.no_grad():
            rows = (self.place + torch.arange(len(x))) % len(self.keys)
            self.keys[rows] = outputs
            self.place.add_(len(x)).remainder_(len(self.keys))
        return logits[:, :3]


class Codebook(nn.Module):
    """As VQ-VAE's: nearest codes, moved towards what they stand for."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()
        self.register_buffer("codes", torch.randn(4, 3))
        self.register_buffer("sizes", torch.ones(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.inner(x)
        codes = self.codes.clone()
        nearest = torch.cdist(outputs.detach(), codes).argmin(1)
        with torch.no_grad():
            for code in range(4):
                if (nearest == code).any():
                    self.codes[code].lerp_(outputs[nearest == code].mean(0), 0.5)
                    self.sizes[code] = 0.9 * self.sizes[code] + (nearest == code).sum()
        return outputs * (codes[nearest] - outputs)


class Centred(nn.Module):
    """As DINO's: the mean of outputs before is taken off, by a tensor that is bound anew."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()
        self.register_buffer("centre", torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.inner(x)
        logits = outputs * self.centre
        self.centre = 0.5 * self.centre + 0.5 * outputs.detach().mean(0)
        return logits


class Grows(nn.Module):
    """Registers its buffer in the first forward, and moves it in later ones."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.inner(x)
        if hasattr(self, "mean"):
            outputs = outputs * self.mean.clone()
            self.mean.lerp_(outputs.detach().mean(0), 0.5)
        else:
            self.register_buffer("mean", outputs.detach().mean(0))
        return outputs


MODELS = {"queue": Queue, "codebook": Codebook, "centre": Centred, "a buffer that is added": Grows}


class CentreLoss(nn.Module):
    """Distances to the centres of classes, which follow, as in metric learning."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centres", torch.randn(3, 3))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        losses = (outputs - self.centres.clone()[targets]).square().sum(1)
        with torch.no_grad():
            self.centres[targets] = 0.5 * self.centres[targets] + 0.5 * outputs
        return losses


def losses_of(model: nn.Module, loss_fn: Callable, batch: tuple[Tensor, Tensor], rows=slice(None)) -> Tensor:
    inputs, targets = batch
    return loss_fn(model(inputs[rows]), targets[rows])


OPTIONS = {
    "three passes": {},
    "two passes": {"gamma": 1.0},
    "a selection by loss": {"selection": "loss"},
    "a plain step": {"rho": 0.0},
}
settings = pytest.mark.parametrize("name", OPTIONS)


@settings
@pytest.mark.parametrize("kind", [*MODELS, "centres of the loss"])
@pytest.mark.parametrize("by_hand", [False, True], ids=["batch_closure", "by hand"])
def test_the_gradient_is_the_one_with_the_state_from_before(name, kind, by_hand):
    torch.manual_seed(0)
    model = MODELS[kind]() if kind in MODELS else mlp()
    loss_fn = cross_entropy if kind in MODELS else CentreLoss()
    together = nn.ModuleDict({"model": model, "loss": loss_fn})
    optimizer = sgd(model, model=together if by_hand else None, **OPTIONS[name])
    for batch in DATA:
        before = copy.deepcopy(together)
        rows, closure = [], batch_closure(model, loss_fn, *batch)
        optimizer.backward(partial(noting, closure, rows) if by_hand else closure)
        assert_buffers_of_one_forward(together, before, batch)
        there = moved(before, batch, optimizer.param_groups[0]["rho"])
        chosen = selected(before, there, batch, name)
        assert not by_hand or rows[-1] is None or torch.equal(rows[-1], chosen)
        losses_of(there["model"], there["loss"], batch, chosen).mean().backward()
        for mine, theirs in zip(grads(model), grads(there["model"]), strict=True):
            torch.testing.assert_close(mine, theirs)
        optimizer.step()


def noting(closure: Callable, rows: list, index: Tensor | None) -> Tensor:
    rows.append(index)
    return closure(index)


def assert_buffers_of_one_forward(together: nn.ModuleDict, before: nn.ModuleDict, batch: tuple[Tensor, Tensor]) -> None:
    plain = copy.deepcopy(before)
    losses_of(plain["model"], plain["loss"], batch)
    for mine, theirs in zip(together.buffers(), plain.buffers(), strict=True):
        assert torch.equal(mine, theirs)


def moved(before: nn.ModuleDict, batch: tuple[Tensor, Tensor], rho: float) -> nn.ModuleDict:
    """At w + e, with the buffers from before the step."""
    there, loss_fn = copy.deepcopy(before), copy.deepcopy(before["loss"])
    weights = perturbed(before["model"], lambda net: losses_of(net, loss_fn, batch).mean(), rho).parameters()
    for param, weight in zip(there.parameters(), weights, strict=True):
        param.data.copy_(weight)
        param.grad = None
    return there


def selected(before: nn.ModuleDict, there: nn.ModuleDict, batch: tuple[Tensor, Tensor], name: str) -> Tensor | slice:
    if name in ("two passes", "a plain step"):
        return slice(None)
    low, high = copy.deepcopy(before), copy.deepcopy(there)
    scores = losses_of(low["model"], low["loss"], batch)
    if name == "three passes":
        scores = losses_of(high["model"], high["loss"], batch) - scores
    return scores.topk(4).indices.sort().values


class Holds(nn.Module):
    """One buffer of any kind, and what a forward does to it."""

    def __init__(self, buffer: Tensor, update: Callable[["Holds"], object]) -> None:
        super().__init__()
        self.register_buffer("held", buffer)
        self.update = update

    def forward(self, x: Tensor) -> Tensor:
        torch.no_grad()(self.update)(self)
        return x


def add_one(module: Holds) -> None:
    module.held.add_(1)


def overlapping() -> Tensor:
    return torch.zeros(10).as_strided((8, 3), (1, 1))


def remove(module: Holds) -> None:
    assert "held" in module._buffers
    del module.held


ODD = {
    "0-dimensional": lambda: Holds(torch.zeros(()), add_one),
    "integers": lambda: Holds(torch.zeros(3, dtype=torch.int8), add_one),
    "booleans": lambda: Holds(torch.zeros(3, dtype=torch.bool), lambda m: m.held.logical_not_()),
    "complex": lambda: Holds(torch.zeros(3, dtype=torch.complex64), add_one),
    "conjugated": lambda: Holds(torch.zeros(3, dtype=torch.complex64).conj(), lambda m: m.held.add_(1j)),
    "negated": lambda: Holds(torch.zeros(3, dtype=torch.complex64).conj().imag, add_one),
    "float8": lambda: Holds(torch.zeros(3).to(torch.float8_e4m3fn), lambda m: m.held.copy_(m.held.float() + 1)),
    "quantized": lambda: Holds(
        torch.quantize_per_tensor(torch.zeros(3), 1.0, 0, torch.qint8), lambda m: m.held.copy_(m.held.dequantize() + 1)
    ),
    "sparse": lambda: Holds(torch.eye(3).to_sparse(), lambda m: m.held.add_(torch.eye(3).to_sparse())),
    "sparse rows": lambda: Holds(torch.eye(3).to_sparse_csr(), lambda m: m.held.values().add_(1)),
    "nested": lambda: Holds(
        torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged),
        lambda m: m.held.values().add_(1),
    ),
    "nested and strided": lambda: Holds(
        torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]), lambda m: m.held.unbind()[0].add_(1)
    ),
    "overlapping": lambda: Holds(overlapping(), lambda m: m.held.as_strided((10,), (1,)).add_(1)),
    "empty": lambda: Holds(torch.zeros(0, 3), lambda m: m.held.resize_(len(m.held) + 1, 3).zero_()),
    "resized": lambda: Holds(torch.zeros(2, 3), lambda m: m.held.resize_(len(m.held) + 1, 3).fill_(1)),
    "set to other memory": lambda: Holds(torch.zeros(3), lambda m: m.held.set_(torch.ones(len(m.held) + 1))),
    "given other data": lambda: Holds(torch.zeros(3), lambda m: setattr(m.held, "data", m.held + 1)),
    "transposed in place": lambda: Holds(torch.arange(6.0).view(2, 3), lambda m: m.held.t_()),
    "bound anew": lambda: Holds(torch.zeros(3), lambda m: setattr(m, "held", m.held + 1)),
    "bound to another shape": lambda: Holds(torch.zeros(3), lambda m: setattr(m, "held", torch.ones(len(m.held) + 1))),
    "removed": lambda: Holds(torch.zeros(3), remove),
    "set to None": lambda: Holds(torch.zeros(1), lambda m: setattr(m, "held", None if m.held == 0 else 1 / 0)),
    "lazy": lambda: Holds(nn.UninitializedBuffer(), lambda m: None),
}


def described(buffer: Tensor) -> list:
    """All there is to see of a buffer."""
    if isinstance(buffer, nn.UninitializedBuffer):
        return ["uninitialized"]
    if buffer.is_nested:
        return [part.tolist() for part in buffer.unbind()]
    if buffer.layout == torch.sparse_csr:
        return [buffer.values().tolist()]
    value = buffer.dequantize() if buffer.is_quantized else buffer.to_dense()
    if value.dtype == torch.float8_e4m3fn:
        value = value.float()
    return [buffer.dtype, buffer.layout, list(buffer.shape), value.tolist()]


def holding(kind: str) -> nn.Sequential:
    model = mlp(nn.Identity())
    model[1] = ODD[kind]()  # after mlp's conversion to one dtype
    return model


def all_described(model: nn.Module) -> dict[str, list]:
    return {name: described(buffer) for name, buffer in model.named_buffers()}


@pytest.mark.parametrize("kind", ODD)
@settings
@pytest.mark.filterwarnings("ignore:.*prototype stage|Sparse CSR tensor support:UserWarning")
def test_buffers_of_any_kind(kind, name):
    model, plain = holding(kind), holding(kind)
    optimizer = sgd(model, **OPTIONS[name])
    plain(DATA[0][0])
    optimizer.backward(batch_closure(model, cross_entropy, *DATA[0]))
    assert all_described(model) == all_described(plain)

    model = holding(kind)
    before, own = all_described(model), [id(buffer) for buffer in model.buffers()]
    optimizer = sgd(model, **OPTIONS[name])

    def failing(outputs: Tensor, targets: Tensor) -> Tensor:
        if current_pass() == "descend":
            raise InterruptedError
        return cross_entropy(outputs, targets)

    with pytest.raises(InterruptedError):
        optimizer.backward(batch_closure(model, failing, *DATA[0]))
    assert all_described(model) == before
    assert own == [id(buffer) for buffer in model.buffers()]


def test_a_buffer_that_two_modules_share_and_one_that_is_a_part_of_another():
    def build() -> nn.Sequential:
        model = mlp(nn.BatchNorm1d(8), nn.BatchNorm1d(8))
        model[2].running_mean = model[1].running_mean
        model.register_buffer("part", model[1].running_var[2:4])
        return model

    model, plain = build(), build()
    plain(DATA[0][0])
    train(model, sgd(model, lr=0.0), DATA[:1])
    for mine, theirs in zip(model.buffers(), plain.buffers(), strict=True):
        assert torch.equal(mine, theirs)
    assert model[2].running_mean is model[1].running_mean


class CountingLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        return cross_entropy(outputs, targets)

    def scaled(self, outputs: Tensor, targets: Tensor, scale: float = 1.0) -> Tensor:
        return scale * self(outputs, targets)


counting_loss = CountingLoss()
WRAPPED = {
    "itself": lambda loss: loss,
    "a method": lambda loss: loss.scaled,
    "a part of it": lambda loss: partial(loss.scaled, scale=2.0),
    "an argument of a function": lambda loss: partial(lambda one, outputs, targets: one(outputs, targets), loss),
    "a lambda": lambda loss: lambda outputs, targets: loss(outputs, targets),
    "a global": lambda loss: lambda outputs, targets: counting_loss(outputs, targets),
}


@pytest.mark.parametrize("way", WRAPPED)
def test_modules_behind_functions_are_found(way):
    loss = counting_loss if way == "a global" else CountingLoss()
    counting_loss.calls.zero_()
    model = nn.ModuleDict({"inner": mlp(nn.BatchNorm1d(8))})
    optimizer = sgd(model)
    for forward in (model["inner"], model["inner"].forward, lambda inputs: model["inner"](inputs)):
        optimizer.step(batch_closure(forward, WRAPPED[way](loss), *DATA[0]))
    assert loss.calls == 3
    assert model["inner"][1].num_batches_tracked == 3


@pytest.mark.parametrize("part", [lambda w: w, lambda w: w[2:4], lambda w: w[::2]])
def test_a_buffer_that_is_a_part_of_a_weight_is_refused(part):
    """Putting it back would undo the perturbation, without a word."""
    model = mlp()
    model.register_buffer("part", part(model[0].bias.data))
    optimizer, before = sgd(model), values(model)
    with pytest.raises(ValueError, match=r"buffer Sequential\.part shares memory with a parameter.*register a copy"):
        optimizer.backward(batch_closure(model, cross_entropy, *DATA[0]))
    assert all(torch.equal(one, other) for one, other in zip(values(model), before, strict=True))
    model.part = model.part.clone()
    train(model, optimizer, DATA)


class Counter(nn.Module):
    """Keeps state outside of buffers, updated once a step if it is guarded."""

    def __init__(self, guarded: bool) -> None:
        super().__init__()
        self.inner, self.guarded = mlp(), guarded
        self.passes: list = []
        self.count = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes.append(current_pass())
        if not self.guarded or current_pass() in (None, first_pass()):
            self.count += 1
        return self.inner(x)


@pytest.mark.parametrize(
    ("options", "passes"),
    [
        ({}, ["ascend", "look", "descend"]),
        ({"gamma": 1.0}, ["ascend", "descend"]),
        ({"ascent_share": 0.5}, ["survey", "ascend", "look", "descend"]),
        ({"ascent": "momentum"}, ["survey", "look", "descend"]),
        ({"ascent": "momentum", "gamma": 1.0}, ["descend"]),
        ({"rho": 0.0}, ["descend"]),
    ],
    ids=str,
)
def test_the_pass_that_runs_has_a_name(options, passes):
    model = Counter(guarded=True)
    train(model, sgd(model, **options), DATA[:2])
    assert model.passes == passes * 2
    model.passes.clear()
    model(DATA[0][0])
    assert model.passes == [None]
    assert first_pass() is None
    assert model.count == 3
    unguarded = Counter(guarded=False)
    train(unguarded, sgd(unguarded, **options), DATA[:2])
    assert unguarded.count == 2 * len(passes)


def test_a_step_inside_a_pass_of_another():
    outer, inner = mlp(), mlp(seed=1)
    optimizer, other = sgd(outer), sgd(inner)
    seen = []

    def closure(index):
        if current_pass() == first_pass():
            other.step(batch_closure(inner, cross_entropy, *DATA[1]))
        seen.append(current_pass())
        rows = slice(None) if index is None else index
        return cross_entropy(outer(DATA[0][0][rows]), DATA[0][1][rows])

    optimizer.step(closure)
    assert seen == ["ascend", "look", "descend"]
    assert other.param_groups[0]["esam_step"] == 1
    assert current_pass() is None


@pytest.mark.parametrize("when", ["ascend", "look", "descend"])
def test_no_pass_runs_after_one_that_failed(when):
    model = mlp()
    optimizer = sgd(model)

    def failing(index):
        if current_pass() == when:
            raise InterruptedError
        return cross_entropy(model(DATA[0][0]), DATA[0][1]) if index is None else None

    with pytest.raises(InterruptedError):
        optimizer.backward(failing)
    assert current_pass() is first_pass() is None


class Teacher(nn.Module):
    """A network and the moving average of its weights, kept where `keep` puts it."""

    def __init__(self, keep: Callable[["Teacher", nn.Module], None], guarded: bool = False) -> None:
        super().__init__()
        self.inner, self.guarded = mlp(), guarded
        teacher = mlp(seed=1).requires_grad_(False)
        keep(self, teacher)
        self.average = lambda: list(teacher.parameters())

    def forward(self, x: Tensor) -> Tensor:
        if not self.guarded or current_pass() in (None, first_pass()):
            with torch.no_grad():
                torch._foreach_lerp_(self.average(), list(self.inner.parameters()), 0.1)
        return self.inner(x)


OUTSIDE = {
    "a module's parameters": (lambda one, teacher: setattr(one, "teacher", teacher), "Linear.weight"),
    "a module in a list": (lambda one, teacher: setattr(one, "hidden", [teacher]), r"Teacher.hidden.0.0.weight"),
    "tensors in a dict": (lambda one, teacher: setattr(one, "kept", teacher.state_dict()), "Teacher.kept.0.weight"),
    "tensors in a list": (lambda one, teacher: setattr(one, "kept", [*teacher.parameters()]), r"Teacher.kept.0"),
    "an attribute": (lambda one, teacher: vars(one).update(bias=teacher[0].bias), "Teacher.bias"),
}


@pytest.mark.parametrize("place", OUTSIDE)
def test_tensors_that_are_written_outside_of_buffers_are_named_once(place):
    keep, name = OUTSIDE[place]
    model = Teacher(keep)
    optimizer = sgd(model.inner)
    with pytest.warns(UserWarning, match=rf"forwards write .*{name}.*outside of buffers.*current_pass") as found:
        train(model, optimizer, DATA)
    assert len(found) == 1


@pytest.mark.parametrize("place", OUTSIDE)
@pytest.mark.filterwarnings("error")
def test_nothing_is_said_where_the_update_is_guarded(place):
    model = Teacher(OUTSIDE[place][0], guarded=True)
    average = [weight.clone() for weight in model.average()]
    weights = [weight.detach().clone() for weight in model.inner.parameters()]
    train(model, sgd(model.inner), DATA[:1])
    for mine, start, weight in zip(model.average(), average, weights, strict=True):
        torch.testing.assert_close(mine, start.lerp(weight, 0.1))  # once, towards weights that are not perturbed


def test_one_of_several_of_the_same_name():
    model = Teacher(OUTSIDE["a module's parameters"][0])
    model.frozen = mlp().requires_grad_(False)
    with pytest.warns(UserWarning, match=r"forwards write Linear\.bias, Linear\.weight, outside"):
        train(model, sgd(model.inner), DATA)


def test_frozen_weights_that_the_optimizer_has_are_named_too():
    model = Teacher(OUTSIDE["a module's parameters"][0])
    with pytest.warns(UserWarning, match=r"forwards write .*Linear\.weight"):
        train(model, sgd(model), DATA)


class Innocent(nn.Module):
    """Holds tensors that no forward writes, and writes attributes that are made anew."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp(nn.BatchNorm1d(8), nn.utils.spectral_norm(nn.Linear(8, 8)))
        self.frozen = mlp().requires_grad_(False)
        self.constants = [torch.ones(3), {"a": torch.ones(3)}]
        self.constants.append(self.constants)

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.inner(x) + self.frozen(x)
        self.last.detach().mul_(1)
        return self.last * self.constants[0]


def test_nothing_is_said_of_what_no_forward_writes():
    model = Innocent()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, sgd(model.inner), DATA)
    assert all(value.isfinite().all() for value in values(model))


@pytest.mark.parametrize("options", [{}, {"ascent": "momentum", "gamma": 1.0, "momentum": 0.9}], ids=str)
def test_a_forward_in_another_thread_is_of_the_same_pass(options):
    model, seen = mlp(), []

    def forward(inputs: Tensor) -> Tensor:
        with ThreadPoolExecutor(1) as pool:
            seen.append(pool.submit(lambda: (current_pass(), first_pass())).result())
        return model(inputs)

    train(forward, sgd(model, **options), DATA[:1])
    first = seen[0][0]
    assert {second for _, second in seen} == {first} != {None}
    assert len(seen) == len({name for name, _ in seen})
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(current_pass).result() is None


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("make", [torch.jit.script, partial(torch.jit.trace, example_inputs=DATA[0][0])])
@pytest.mark.parametrize("part", [False, True])
def test_modules_of_torchscript(make, part):
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    scripted, plain = make(copy.deepcopy(model)), model
    plain.load_state_dict(scripted.state_dict())  # a trace is a forward
    network = nn.Sequential(scripted) if part else scripted
    train(plain, sgd(plain, gamma=1.0), DATA)
    train(network, sgd(network, gamma=1.0), DATA)
    for one, other in zip((*network.parameters(), *network.buffers()), (*plain.parameters(), *plain.buffers())):
        torch.testing.assert_close(one, other)

    def fails(inputs: Tensor, targets: Tensor) -> Tensor:
        raise ValueError("mine")

    before = values(network)
    with pytest.raises(ValueError, match="mine") as raised:
        sgd(network).backward(batch_closure(network, fails, *DATA[0]))
    assert not getattr(raised.value, "__notes__", [])
    assert all(torch.equal(one, other) for one, other in zip(before, values(network)))


class Codebook(nn.Module):
    """Parameters that a forward makes anew, as widely copied code of vector quantization does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.codes = nn.Linear(4, 4, dtype=torch.float64), nn.Parameter(torch.zeros(4, dtype=torch.float64))

    def forward(self, inputs):
        outputs = self.layer(inputs)
        self.codes = nn.Parameter(self.codes.detach() * 0.9 + outputs.detach().mean(0))
        return outputs + self.codes.detach()


@pytest.mark.parametrize("gamma", [0.5, 1])
def test_parameters_that_a_forward_replaces_are_those_of_the_first_pass(gamma):
    model = Codebook()
    twin = copy.deepcopy(model)
    inputs, targets = torch.randn(8, 4, dtype=torch.float64), torch.arange(8) % 4
    optimizer = ESAM(model.layer.parameters(), torch.optim.SGD, lr=0.0, rho=0.5, beta=1, gamma=gamma)
    for _ in range(3):
        optimizer.step(batch_closure(model, cross_entropy, inputs, targets))
        twin(inputs)
        assert torch.equal(model.codes, twin.codes)
    codes = model.codes

    def fail(outputs, targets):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        optimizer.step(batch_closure(model, fail, inputs, targets))
    assert model.codes is codes


@pytest.mark.parametrize("kind", ["pruned", "normed"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weights_that_hooks_make_are_not_perturbed_ones_between_steps(kind):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    if kind == "pruned":
        prune.l1_unstructured(model[0], "weight", 0.2)
    else:
        nn.utils.weight_norm(model[0])
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.0, rho=0.5, beta=1, gamma=1)
    optimizer.step(batch_closure(model, cross_entropy, torch.randn(8, 4), torch.arange(8) % 4))
    found = model[0].weight.detach().clone()
    model(torch.randn(8, 4))  # which makes it anew
    assert torch.equal(found, model[0].weight)


def test_buffers_that_cannot_be_written_are_left_alone(tmp_path):
    """A write into a file that is mapped for reading ends the process."""
    numpy.save(tmp_path / "table.npy", numpy.arange(24, dtype=numpy.float32).reshape(4, 6))
    table = numpy.load(tmp_path / "table.npy", mmap_mode="r")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = torch.from_numpy(table)
    model = nn.Linear(6, 4)
    model.register_buffer("table", table)
    model.register_buffer("part", table[:2])
    embedding = nn.Embedding.from_pretrained(table, freeze=True)
    optimizer = ESAM([*model.parameters(), *embedding.parameters()], torch.optim.SGD, lr=0.1, gamma=1, model=model)

    def closure(index):
        return cross_entropy(model(model.table + embedding.weight), torch.arange(4)).mean()

    optimizer.step(closure)
    before = values(model)
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda index: closure(index) / 0 * (1 / 0))
    assert all(map(torch.equal, before, values(model)))
    changed = nn.Buffer(torch.zeros(3))
    model.register_buffer("changed", changed)  # others are kept as ever
    optimizer.step(lambda index: closure(index) + changed.add_(1).sum() * 0)
    assert changed.tolist() == [1, 1, 1]


def test_writes_that_begin_later_are_named_too():
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    model[1].requires_grad_(False)
    optimizer = ESAM(model[0].parameters(), torch.optim.SGD, lr=0.1, gamma=1, model=model)
    inputs, targets = torch.randn(8, 4), torch.arange(8) % 4

    def closure(index):
        if optimizer.param_groups[0]["esam_step"] >= 2:
            with torch.no_grad():
                model[1].weight.lerp_(model[0].weight, 0.1)
        return cross_entropy(model[0](inputs), targets).mean()

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(20):
            optimizer.step(closure)
    assert sum("forwards write Linear.weight" in str(one.message) for one in said) == 1


class Equal(nn.Linear):
    """A module that says itself what it is equal to."""

    def __eq__(self, other):
        return self.in_features == other.in_features  # which None has not

    __hash__ = nn.Linear.__hash__


def test_modules_may_say_themselves_what_they_are_equal_to():
    model = nn.Sequential(Equal(4, 4), nn.BatchNorm1d(4))
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, gamma=1)

    def closure():
        optimizer.zero_grad()
        loss = cross_entropy(model(torch.ones(8, 4)), torch.arange(8) % 4).mean()
        loss.backward()
        return loss

    for steps in (1, 2, 3):
        optimizer.step(closure)
        assert model[1].num_batches_tracked == steps


class AnyNorm(nn.BatchNorm1d):
    """A module that is equal to all of its kind."""

    def __eq__(self, other):
        return isinstance(other, AnyNorm)

    __hash__ = nn.BatchNorm1d.__hash__


def test_a_module_in_the_place_of_an_equal_one_is_found():
    model = nn.Sequential(nn.Linear(4, 4), AnyNorm(4, affine=False))
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, gamma=1)
    for steps in (1, 1):
        optimizer.step(batch_closure(model, cross_entropy, torch.randn(8, 4), torch.arange(8) % 4))
        assert model[1].num_batches_tracked == steps
        model[1] = AnyNorm(4, affine=False)


def test_threads_that_look_at_once_leave_torchs_fast_path_on():
    seen = [threading.Event() for _ in range(3)]

    def work(which):
        model = nn.Linear(6, 1)
        optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, model=model)

        def closure(index):
            now = current_pass()
            if which == 0 and now == "look":
                seen[0].set()
                seen[1].wait(5)
            if which == 0 and now == "descend":
                seen[2].set()
            if which == 1 and now == "ascend":
                seen[0].wait(5)
            if which == 1 and now == "look":
                seen[1].set()
                seen[2].wait(5)
            inputs = torch.ones(8, 6)
            return model(inputs if index is None else inputs[index]).square().mean(1)

        optimizer.step(closure)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))
    assert all(event.is_set() for event in seen)
    assert torch.backends.mha.get_fastpath_enabled()


class Late(nn.Module):
    """Makes a parameter in its first forward, and keeps in a flag that it has."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.ready = nn.Linear(4, 4), False
        self.register_parameter("scale", None)

    def forward(self, inputs):
        if not self.ready:
            self.scale, self.ready = nn.Parameter(torch.ones(4)), True
        return self.layer(inputs * self.scale)


@pytest.mark.parametrize("gamma", [0.5, 1])
def test_a_parameter_that_a_forward_makes_stays(gamma):
    model = Late()
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, gamma=gamma)
    for _ in range(3):
        optimizer.step(batch_closure(model, cross_entropy, torch.randn(8, 4), torch.arange(8) % 4))
    assert isinstance(model.scale, nn.Parameter)
