"""The extra passes leave no trace: buffers are as pass 1 left them, and pass 2 sees what pass 1 saw but for w + e."""

import copy
import random

import numpy as np
import pytest
import torch
from networks import batches, cross_entropy, grads, mlp, perturbed, same, values
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from esam_kernels import ESAM, batch_closure

INPUTS, TARGETS = batches(1)[0]


class Recorder:
    """A closure that notes what each pass did."""

    def __init__(self, model: nn.Module, inputs: Tensor = INPUTS, targets: Tensor = TARGETS, noise=lambda: 0.0) -> None:
        self.model = model
        self.closure = batch_closure(model, cross_entropy, inputs, targets)
        self.noise = noise
        self.losses: list[Tensor] = []
        self.rows: list[Tensor | None] = []
        self.weights: list[list[Tensor]] = []

    def __call__(self, index: Tensor | None) -> Tensor:
        self.weights.append([param.detach().clone() for param in self.model.parameters()])
        losses = self.closure(index) + self.noise()
        self.losses.append(losses.detach())
        self.rows.append(index)
        return losses


def optimizer_of(network: nn.Module, **options) -> ESAM:
    return ESAM(network.parameters(), torch.optim.SGD, **{"lr": 0.1, "rho": 0.5, **options})


class Rebinds(nn.Module):
    """Replaces its buffers by other tensors; one of them is not there before the first forward."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("first", None)

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        self.first = x.detach().mean(0) if self.first is None else self.first + 1
        return x - self.mean


class Constant(nn.Module):
    """Holds a buffer into which nothing can be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.ones(1).expand(8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


class Codebook(nn.Module):
    """Moves its entries towards what it sees, with noise; counts in an integer and notes in a boolean."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("entries", torch.zeros(2, 4).t())
        self.register_buffer("uses", torch.zeros((), dtype=torch.int64))
        self.register_buffer("used", torch.zeros(3, dtype=torch.bool))

    def forward(self, x: Tensor) -> Tensor:
        self.entries.lerp_(x.detach().mean(0).view(2, 4).t() + torch.rand(()), 0.1)
        self.uses += len(x)
        self.used |= x.detach()[0, :3] > 0
        return x + self.entries.t().reshape(-1)


KEEPERS = {
    "batch norm": lambda: nn.BatchNorm1d(8),
    "batch norm, cumulative": lambda: nn.BatchNorm1d(8, momentum=None),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(8, 8)),
    "spectral norm by a hook": lambda: nn.utils.spectral_norm(nn.Linear(8, 8)),
    "buffers bound anew": Rebinds,
    "an expanded buffer": Constant,
    "a codebook": Codebook,
}
keepers = pytest.mark.parametrize("keeper", KEEPERS)


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def assert_same_buffers(these: dict[str, Tensor], those: dict[str, Tensor]) -> None:
    assert these.keys() == those.keys()
    for name in these:
        assert torch.equal(these[name], those[name]), name


@keepers
@pytest.mark.parametrize("options", [{}, {"gamma": 1.0}, {"selection": "loss"}, {"rho": 0.0}], ids=str)
@pytest.mark.parametrize("count", [1, 3], ids=["one batch", "micro-batches"])
@pytest.mark.parametrize("carried", [True, False], ids=["batch_closure", "model="])
def test_buffers_are_as_pass_1_left_them(keeper, options, count, carried):
    model = mlp(KEEPERS[keeper]())
    alone = copy.deepcopy(model)
    optimizer = optimizer_of(model, **options, model=None if carried else model)
    start = buffers(model)
    for step in range(3):
        data = batches(count, seed=step)
        closures = [batch_closure(model, cross_entropy, *batch) for batch in data]
        if not carried:
            closures = [lambda index, closure=closure: closure(index) for closure in closures]
        alone.load_state_dict(dict(model.named_parameters()), strict=False)
        torch.manual_seed(step)
        for inputs, _ in data:
            alone(inputs)
        torch.manual_seed(step)
        optimizer.step(closures)
        assert_same_buffers(buffers(model), buffers(alone))
    if keeper != "an expanded buffer":
        assert any(not torch.equal(value, start[name]) for name, value in buffers(model).items() if name in start)


@keepers
@pytest.mark.parametrize("when", [1, 2, 3])
def test_buffers_are_as_before_after_a_failed_step(keeper, when):
    model = mlp(KEEPERS[keeper]())
    before = buffers(model)
    recorder = Recorder(model)

    def failing(index):
        losses = recorder(index)
        if len(recorder.losses) == when:
            raise InterruptedError
        return losses

    with pytest.raises(InterruptedError):
        optimizer_of(model, model=model).backward(failing)
    assert_same_buffers(buffers(model), before)


def test_modules_keep_their_own_buffer_tensors():
    model = mlp(nn.BatchNorm1d(8))
    own = list(model.buffers())
    optimizer_of(model).step(batch_closure(model, cross_entropy, INPUTS, TARGETS))
    assert all(a is b for a, b in zip(own, model.buffers()))


NOISE = {
    "dropout": (nn.Dropout(0.5), lambda: 0.0),
    "numpy": (nn.Identity(), lambda: float(np.random.rand())),  # noqa: NPY002, the state that all share
    "python": (nn.Identity(), random.random),
}


@pytest.mark.parametrize("source", NOISE)
@pytest.mark.parametrize("count", [1, 2], ids=["one batch", "micro-batches"])
def test_pass_2_sees_the_random_numbers_of_pass_1(source, count):
    layer, noise = NOISE[source]
    model = mlp(layer)
    recorders = [Recorder(model, *batch, noise=noise) for batch in batches(count)]
    optimizer_of(model, rho=1e-7).backward(recorders)
    for recorder in recorders:
        first, second, _ = recorder.losses
        torch.testing.assert_close(second, first, atol=1e-5, rtol=0)
        assert (recorder.closure(None) + noise() - first).abs().max() > 1e-3  # noise there is
    if count == 2:  # and each micro-batch has its own
        assert (recorders[0].closure(None) + noise() - recorders[0].losses[0]).abs().max() > 1e-3


def test_random_numbers_go_on_from_step_to_step():
    model = mlp(nn.Dropout(0.5))
    optimizer = optimizer_of(model, lr=0.0, rho=1e-7)
    recorder = Recorder(model)
    optimizer.step(recorder)
    optimizer.step(recorder)
    assert not torch.allclose(recorder.losses[0], recorder.losses[3], atol=1e-3)


@pytest.mark.parametrize("options", [{}, {"gamma": 1.0}, {"selection": "loss"}], ids=str)
def test_passes_2_and_3_see_the_perturbed_weights_inside_an_outer_autocast(options):
    model = mlp()
    recorder = Recorder(model)
    with torch.autocast("cpu", torch.bfloat16):
        before = cross_entropy(model(INPUTS), TARGETS)
        returned = optimizer_of(model, beta=1.0, rho=2.0, **options).backward(recorder)
        after = cross_entropy(model(INPUTS), TARGETS)

    def loss(network):
        with torch.autocast("cpu", torch.bfloat16):
            return cross_entropy(network(INPUTS), TARGETS).mean()

    moved = perturbed(model, loss, rho=2.0)
    rows = slice(None) if recorder.rows[-1] is None else recorder.rows[-1]
    with torch.autocast("cpu", torch.bfloat16):
        there = cross_entropy(moved(INPUTS), TARGETS)
        cross_entropy(moved(INPUTS[rows]), TARGETS[rows]).mean().backward()
    first, *second, third = recorder.losses
    assert (there - first).abs().max() > 0.5
    torch.testing.assert_close(first, before)
    for losses in second:
        torch.testing.assert_close(losses, there, atol=0.03, rtol=0.03)
    torch.testing.assert_close(third, there[rows], atol=0.03, rtol=0.03)
    torch.testing.assert_close(returned, before.mean())
    torch.testing.assert_close(after, before, atol=0, rtol=0)
    for mine, theirs in zip(grads(model), grads(moved)):
        torch.testing.assert_close(mine, theirs, atol=0.01, rtol=0.05)


@pytest.mark.parametrize("when", [1, 2, 3])
def test_autocast_forgets_the_perturbed_weights_after_a_failed_step(when):
    model = mlp()
    recorder = Recorder(model)

    def failing(index):
        losses = recorder(index)
        if len(recorder.losses) == when:
            raise InterruptedError
        return losses

    with torch.autocast("cpu", torch.bfloat16):
        before = model(INPUTS)
        with pytest.raises(InterruptedError):
            optimizer_of(model, beta=1.0, rho=2.0).backward(failing)
        assert torch.equal(model(INPUTS), before)


def test_the_halves_of_a_step_inside_an_outer_autocast():
    model = mlp()
    optimizer = optimizer_of(model, beta=1.0, gamma=1.0, rho=2.0)
    with torch.autocast("cpu", torch.bfloat16):
        before = cross_entropy(model(INPUTS), TARGETS)
        before.mean().backward()
        optimizer.first_step()
        assert (cross_entropy(model(INPUTS), TARGETS) - before).abs().max() > 0.5
        optimizer.restore()
        assert torch.equal(cross_entropy(model(INPUTS), TARGETS), before)


def test_only_pass_3_touches_grad_and_fires_its_hooks():
    model = mlp()
    passes = []
    recorder = Recorder(model)
    for param in model.parameters():
        param.register_post_accumulate_grad_hook(lambda param: passes.append(len(recorder.losses)))

    def closure(index):
        assert grads(model) == [None] * 6
        return recorder(index)

    optimizer_of(model).step(closure)
    assert passes == [3] * 6  # each of the six parameters once, in pass 3


class Counted(nn.Module):
    """Passes a weight on, and notes in which pass a gradient comes back."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        passes = self.passes = []

        class PassOn(torch.autograd.Function):
            @staticmethod
            def forward(ctx, weight):
                return weight.view_as(weight)

            @staticmethod
            def backward(ctx, grad):
                passes.append(len(recorder.losses))
                return grad

        self.pass_on = PassOn.apply

    def forward(self, weight: Tensor) -> Tensor:
        return self.pass_on(weight)


@pytest.mark.parametrize("seed", range(4))
def test_pass_1_computes_no_gradient_of_weights_that_are_not_drawn(seed):
    model = mlp()
    recorder = Recorder(model)
    counters = []
    for layer in (model[0], model[2], model[4]):
        for name in ("bias", "weight"):
            counters.append(Counted(recorder))
            parametrize.register_parametrization(layer, name, counters[-1])
    optimizer_of(model, seed=seed, beta=0.5).backward(recorder)
    moved = [not torch.equal(a, b) for a, b in zip(recorder.weights[0], recorder.weights[1])]
    assert 0 < sum(moved) < len(moved)
    assert [counter.passes for counter in counters] == [[1, 3] if drawn else [3] for drawn in moved]


BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("options", "dtypes"),
    [
        ({"steering_dtype": BF16}, [BF16, BF16, FP32]),
        ({"steering_dtype": BF16, "gamma": 1.0}, [BF16, FP32]),
        ({"steering_dtype": BF16, "selection": "loss"}, [BF16, FP32]),
        ({"steering_dtype": BF16, "rho": 0.0}, [FP32]),
        ({}, [FP32, FP32, FP32]),
    ],
    ids=str,
)
def test_steering_runs_passes_1_and_2_in_low_precision(options, dtypes):
    model = mlp()
    seen = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    loss = optimizer_of(model, **options).backward(batch_closure(model, cross_entropy, INPUTS, TARGETS))
    assert seen == dtypes
    assert all(grad.dtype == FP32 for grad in grads(model))
    with torch.autocast("cpu", BF16, enabled=dtypes[0] == BF16):
        torch.testing.assert_close(loss, cross_entropy(model(INPUTS), TARGETS).mean().detach())


def test_steering_in_low_precision_takes_the_gradient_of_the_full_one():
    """Pass 3 is exact: its gradient at the weights that pass 1 chose, on the rows that pass 2 chose."""
    model = mlp()
    recorder = Recorder(model)
    optimizer_of(model, steering_dtype=BF16).backward(recorder)
    there = copy.deepcopy(model)
    for param, weight in zip(there.parameters(), recorder.weights[2]):
        param.data.copy_(weight)
    rows = recorder.rows[2]
    cross_entropy(there(INPUTS[rows]), TARGETS[rows]).mean().backward()
    assert same(grads(model), grads(there))
    assert not same(values(model), values(there))


def test_an_autocast_inside_the_closure_overrides_steering():
    model = mlp()
    seen = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output.dtype))

    def closure(index):
        with torch.autocast("cpu", enabled=False):
            rows = slice(None) if index is None else index
            return cross_entropy(model(INPUTS[rows]), TARGETS[rows])

    optimizer_of(model, steering_dtype=BF16).backward(closure)
    assert seen == [FP32] * 3


class Observer(nn.Module):
    """Its buffer is made to fit in place by a forward, as those of torch.ao's observers are."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(0))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.seen.resize_(len(x)).copy_(x[:, 0])
        return x


def test_a_buffer_that_a_forward_resizes_is_put_back():
    model = mlp(Observer())
    closure = batch_closure(model, cross_entropy, *batches(1)[0])
    optimizer = optimizer_of(model)
    optimizer.backward(closure)
    assert len(model[1].seen) == 8  # as pass 1 left it, not pass 3

    def failing(index):
        closure(index)
        raise KeyboardInterrupt

    model[1].seen.resize_(0)
    with pytest.raises(KeyboardInterrupt):
        optimizer.backward(failing)


def test_a_buffer_that_was_made_under_inference_mode_is_kept():
    """As a cached constant is, if the first forward was a validation's."""
    model = mlp(Constant())
    with torch.inference_mode():
        model[1].register_buffer("cached", torch.full((8,), 0.5))
    model[1].register_forward_hook(lambda module, _, x: x + module.cached)
    optimizer_of(model).backward(batch_closure(model, cross_entropy, *batches(1)[0]))
    assert torch.equal(model[1].cached, torch.full((8,), 0.5))


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight + weight


@pytest.mark.parametrize("options", [{}, {"gamma": 1.0}, {"ascent": "momentum", "momentum": 0.9}], ids=str)
def test_cached_parametrizations_are_those_of_the_pass_that_runs(options):
    model, twin = mlp(), mlp()
    for one in (model, twin):
        parametrize.register_parametrization(one[0], "weight", Doubled())
    one, other = optimizer_of(model, **options), optimizer_of(twin, **options)
    for inputs, targets in batches(3):
        with parametrize.cached():
            one.backward(batch_closure(model, cross_entropy, inputs, targets))
            assert torch.equal(model[0].weight, 2 * model[0].parametrizations.weight.original)
        other.backward(batch_closure(twin, cross_entropy, inputs, targets))
        assert same(grads(model), grads(twin))
        one.step()
        other.step()
    assert same(values(model), values(twin))


class Table(nn.Module):
    """As rotary embeddings have it: a table in a buffer, and in a number how long it is; they grow together."""

    def __init__(self, lazily: bool) -> None:
        super().__init__()
        self.linear, self.length = nn.Linear(4, 3), 0
        if not lazily:
            self.grow(4)

    def grow(self, length: int) -> None:
        self.length = length
        self.register_buffer("table", torch.arange(length).float().cos()[:, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > self.length:
            self.grow(x.shape[1])
        return self.linear(x * self.table[: x.shape[1]]).mean(1)


@pytest.mark.parametrize("options", [{}, {"gamma": 1.0}, {"ascent": "momentum", "gamma": 1.0}], ids=str)
@pytest.mark.parametrize("lazily", [False, True])
def test_what_says_how_a_buffer_was_made_goes_with_it(options, lazily):
    torch.manual_seed(0)
    model, other = Table(lazily), Table(lazily)
    other.load_state_dict(model.state_dict())
    optimizer, plain = optimizer_of(model, momentum=0.9, **options), optimizer_of(other, momentum=0.9, **options)
    other.grow(8)  # so that it does not grow in a step
    for length, known in [(4, 4), (8, 8), (4, 8), (8, 8)]:
        inputs = torch.randn(8, length, 4)
        optimizer.step(batch_closure(model, cross_entropy, inputs, TARGETS))
        plain.step(batch_closure(other, cross_entropy, inputs, TARGETS))
        assert model.length == len(model.table) == known
        assert same(list(model.parameters()), list(other.parameters()))

    def failing(index: Tensor | None) -> Tensor:
        model(torch.randn(8, 9, 4))
        raise KeyboardInterrupt

    optimizer.model = model
    with pytest.raises(KeyboardInterrupt):
        optimizer.backward(failing)
    assert model.length == len(model.table) == 8


def test_passes_without_a_graph_see_the_same_padding():
    """Torch's encoder cuts padding out in eval mode without a graph, which gives it other values."""
    torch.manual_seed(0)

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 2)
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor, padding: Tensor) -> Tensor:
            return self.head(self.encoder(x, src_key_padding_mask=padding).mean(1))

    model, losses = Encoder().eval(), []

    def keeping(outputs: Tensor, targets: Tensor) -> Tensor:
        losses.append(cross_entropy(outputs, targets))
        return losses[-1]

    inputs = [torch.randn(8, 5, 4), torch.arange(5)[None] >= torch.tensor([5, 4, 3, 2, 1, 1, 2, 3])[:, None]]
    optimizer_of(model, rho=1e-6).backward(batch_closure(model, keeping, inputs, TARGETS))
    assert [loss.requires_grad for loss in losses] == [True, False, True]
    torch.testing.assert_close(losses[0].detach(), losses[1], rtol=0, atol=1e-5)
    assert torch.backends.mha.get_fastpath_enabled()
