"""Pass 1 may ask for the gradient of any weights alone, of any layer: it gets them, and the process survives.

Every layer of ``torch.nn`` is swept in another process, which says what it is at before it does it, so that a crash
fails the test of the layer that it is in.
"""

import inspect
import os
import re
import signal
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import forks
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from esam_kernels import ESAM, batch_closure
from esam_kernels.passes import partial_gradients
from esam_kernels.passes.partial_gradients import needed_edges

FEATURES, SEQUENCE, LINE, IMAGE, VOLUME = (5, 6), (5, 4, 6), (5, 6, 7), (5, 6, 7, 7), (5, 6, 4, 4, 4)
TOKENS = torch.tensor([[1, 2, 3], [3, 3, 0], [4, 1, 0], [2, 4, 4], [0, 1, 2]])
CHANNELS_LAST = {IMAGE: torch.channels_last, VOLUME: torch.channels_last_3d}

# The sweep: each layer, the shape of what it sees, and how it is called if not with that alone.


@dataclass(frozen=True)
class Layer:
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    call: Callable[[nn.Module, Tensor], Tensor] = lambda layer, x: layer(x)
    before: bool = True  # whether a layer that is trained comes before it


def first_output(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)[0]


def evaluated(layer: nn.Module, x: Tensor) -> Tensor:
    return layer.eval()(x)


def twice(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x, x)


def attention(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x, x.flip(1), x.roll(1, 1), need_weights=False)[0]


def adaptive_softmax(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x, torch.arange(len(x)) * 2).output[:, None]


def linear_cross_entropy(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x, torch.arange(len(x)))[:, None]


LAYERS = {
    "Linear": Layer(lambda: nn.Linear(6, 3), FEATURES),
    "Linear on sequences": Layer(lambda: nn.Linear(6, 3), SEQUENCE),
    "Bilinear": Layer(lambda: nn.Bilinear(6, 6, 3), FEATURES, twice),
    "Embedding": Layer(lambda: nn.Embedding(5, 6), TOKENS.shape, before=False),
    "Embedding, padded": Layer(lambda: nn.Embedding(5, 6, 0, scale_grad_by_freq=True), TOKENS.shape, before=False),
    "EmbeddingBag, sum": Layer(lambda: nn.EmbeddingBag(5, 6, mode="sum"), TOKENS.shape, before=False),
    "EmbeddingBag, mean": Layer(lambda: nn.EmbeddingBag(5, 6), TOKENS.shape, before=False),
    "EmbeddingBag, max": Layer(lambda: nn.EmbeddingBag(5, 6, mode="max"), TOKENS.shape, before=False),
    "EmbeddingBag, weighted": Layer(
        lambda: nn.EmbeddingBag(5, 6, mode="sum"), FEATURES, lambda layer, x: layer(TOKENS, per_sample_weights=x[:, :3])
    ),
    "LayerNorm": Layer(lambda: nn.LayerNorm(6), SEQUENCE),
    "RMSNorm": Layer(lambda: nn.RMSNorm(6), SEQUENCE),
    "RNN": Layer(lambda: nn.RNN(6, 4, 2, batch_first=True, bidirectional=True), SEQUENCE, first_output),
    "RNN, relu": Layer(lambda: nn.RNN(6, 4, nonlinearity="relu", batch_first=True), SEQUENCE, first_output),
    "GRU": Layer(lambda: nn.GRU(6, 4, 2, batch_first=True, bidirectional=True), SEQUENCE, first_output),
    "LSTM": Layer(lambda: nn.LSTM(6, 4, 2, batch_first=True, bidirectional=True), SEQUENCE, first_output),
    "LSTM, projected": Layer(lambda: nn.LSTM(6, 4, batch_first=True, proj_size=3), SEQUENCE, first_output),
    "RNNCell": Layer(lambda: nn.RNNCell(6, 4), FEATURES, lambda layer, x: layer(x, layer(x))),
    "GRUCell": Layer(lambda: nn.GRUCell(6, 4), FEATURES, lambda layer, x: layer(x, layer(x))),
    "LSTMCell": Layer(lambda: nn.LSTMCell(6, 4), FEATURES, lambda layer, x: layer(x, layer(x))[0]),
    "MultiheadAttention": Layer(lambda: nn.MultiheadAttention(6, 2, batch_first=True), SEQUENCE, attention),
    "MultiheadAttention, further keys": Layer(
        lambda: nn.MultiheadAttention(6, 2, kdim=6, vdim=6, add_bias_kv=True, batch_first=True), SEQUENCE, attention
    ),
    "TransformerEncoderLayer": Layer(
        lambda: nn.TransformerEncoderLayer(6, 2, 8, 0.0, batch_first=True, norm_first=True), SEQUENCE
    ),
    "TransformerEncoder": Layer(
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 8, 0.0, batch_first=True), 2), SEQUENCE
    ),
    "TransformerDecoderLayer": Layer(
        lambda: nn.TransformerDecoderLayer(6, 2, 8, 0.0, batch_first=True), SEQUENCE, twice
    ),
    "TransformerDecoder": Layer(
        lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(6, 2, 8, 0.0, batch_first=True), 2), SEQUENCE, twice
    ),
    "Transformer": Layer(lambda: nn.Transformer(6, 2, 1, 1, 8, 0.0, batch_first=True), SEQUENCE, twice),
    "PReLU": Layer(nn.PReLU, FEATURES),
    "AdaptiveLogSoftmaxWithLoss": Layer(
        lambda: nn.AdaptiveLogSoftmaxWithLoss(6, 9, [3, 6], div_value=1.5, head_bias=True), FEATURES, adaptive_softmax
    ),
    "weight_norm": Layer(lambda: parametrizations.weight_norm(nn.Linear(6, 3)), FEATURES),
    "weight_norm of a convolution": Layer(lambda: parametrizations.weight_norm(nn.Conv2d(6, 3, 3)), IMAGE),
    "weight_norm, the old one": Layer(lambda: nn.utils.weight_norm(nn.Linear(6, 3)), FEATURES),
    "spectral_norm": Layer(lambda: parametrizations.spectral_norm(nn.Conv2d(6, 3, 3)), IMAGE),
    "spectral_norm, the old one": Layer(lambda: nn.utils.spectral_norm(nn.Linear(6, 3)), FEATURES),
    "orthogonal": Layer(lambda: parametrizations.orthogonal(nn.Linear(6, 3)), FEATURES),
    "LayerNorm on images": Layer(lambda: nn.LayerNorm(IMAGE[1:]), IMAGE),
    "RMSNorm on images": Layer(lambda: nn.RMSNorm(IMAGE[1:]), IMAGE),
    "SyncBatchNorm": Layer(lambda: nn.SyncBatchNorm(6), IMAGE),
}
for dim, shape in enumerate((LINE, IMAGE, VOLUME), 1):

    def of_dim(kind: str, *args: Any, dim: int = dim, **options: Any) -> Callable[[], nn.Module]:
        return lambda: getattr(nn, f"{kind}{dim}d")(*args, **options)

    LAYERS |= {
        f"Conv{dim}d": Layer(of_dim("Conv", 6, 4, 3, padding=1), shape),
        f"Conv{dim}d, pointwise": Layer(of_dim("Conv", 6, 4, 1), shape),
        f"Conv{dim}d, depthwise": Layer(of_dim("Conv", 6, 6, 3, groups=6), shape),
        f"Conv{dim}d, strided and dilated": Layer(of_dim("Conv", 6, 4, 2, stride=2, dilation=2), shape),
        f"ConvTranspose{dim}d": Layer(of_dim("ConvTranspose", 6, 4, 3), shape),
        f"ConvTranspose{dim}d, grouped": Layer(
            of_dim("ConvTranspose", 6, 4, 3, stride=2, output_padding=1, groups=2), shape
        ),
        f"BatchNorm{dim}d": Layer(of_dim("BatchNorm", 6), shape),
        f"BatchNorm{dim}d, evaluated": Layer(of_dim("BatchNorm", 6), shape, evaluated),
        f"InstanceNorm{dim}d": Layer(of_dim("InstanceNorm", 6, affine=True, track_running_stats=True), shape),
        f"GroupNorm on {dim}d": Layer(lambda: nn.GroupNorm(2, 6), shape),
        f"PReLU on {dim}d": Layer(lambda: nn.PReLU(6), shape),
    }
if hasattr(nn, "LinearCrossEntropyLoss"):  # since torch 2.13
    LAYERS["LinearCrossEntropyLoss"] = Layer(
        lambda: nn.LinearCrossEntropyLoss(6, 5, bias=True, reduction="none"), FEATURES, linear_cross_entropy
    )
    LAYERS["LinearCrossEntropyLoss, chunked"] = Layer(
        lambda: nn.LinearCrossEntropyLoss(6, 5, reduction="mean", options=nn.LinearCrossEntropyOptions()),
        FEATURES,
        lambda layer, x: torch.stack([layer(row[None], torch.tensor([1])) for row in x])[:, None],
    )


class Dies(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        os.kill(os.getpid(), signal.SIGSEGV)
        return x


# Other ways to a group norm, whose backward is one that crashes.


class FunctionalGroupNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(6))
        self.shift = nn.Parameter(torch.rand(6, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.group_norm(x, 2, self.weight) + self.shift


class WeightFromNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Linear(2, 6)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.group_norm(x, 2, self.network(torch.ones(2)))


class WeightFromInput(nn.Module):
    """Asking for the first norm's input leads through the second norm by its weight alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.GroupNorm(2, 6)
        self.other = nn.Conv2d(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = x.tanh()
        constant = self.other(torch.ones_like(x).contiguous(memory_format=torch.channels_last))
        return self.first(h) + nn.functional.group_norm(constant, 2, h.mean((0, 2, 3)))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(2, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for norm in self.norms:
            x = x + norm(x).relu()
        return x


class TwoOfOneInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(groups, 3) for groups in (1, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        h, other = (part.contiguous(memory_format=torch.channels_last) for part in x.tanh().chunk(2, 1))
        return self.norms[0](h) + self.norms[1](h) * self.norms[2](other)


class FrozenBefore(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.detach())


def checkpointed(layer: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(layer, x, use_reentrant=False)


def compiled(layer: nn.Module, x: Tensor) -> Tensor:
    return torch.compile(layer, backend="aot_eager")(x)


def under_autocast(layer: nn.Module, x: Tensor) -> Tensor:
    return torch.autocast("cpu", torch.bfloat16)(layer)(x)


GROUP_NORMS = {
    "functional": Layer(FunctionalGroupNorm, IMAGE),
    "its weight from a network": Layer(WeightFromNetwork, IMAGE),
    "its weight from the input": Layer(WeightFromInput, IMAGE),
    "residual": Layer(Residual, IMAGE),
    "two of one input": Layer(TwoOfOneInput, IMAGE),
    "in a checkpoint": Layer(lambda: nn.GroupNorm(2, 6), IMAGE, checkpointed),
    "compiled": Layer(lambda: nn.GroupNorm(2, 6), IMAGE, compiled),
    "under autocast": Layer(lambda: nn.GroupNorm(2, 6), IMAGE, under_autocast),
    # Here PyTorch crashes in an ordinary backward too.
    "first": Layer(lambda: nn.GroupNorm(2, 6), IMAGE, before=False),
    "after a frozen layer": Layer(FrozenBefore, IMAGE),
}
ORDINARY_BACKWARD_CRASHES = ("group norm, first", "group norm, after a frozen layer")


@dataclass(frozen=True)
class Case:
    layer: Layer
    memory_format: torch.memory_format = torch.contiguous_format
    dtype: torch.dtype = torch.float32


DIES = "a layer that crashes"
CASES = {DIES: Case(Layer(Dies, FEATURES))}  # first, so that all others come after a crash
for name, layer in LAYERS.items():
    CASES[name] = Case(layer)
    if layer.shape in CHANNELS_LAST:
        memory_format = CHANNELS_LAST[layer.shape]
        CASES[f"{name}, channels last"] = Case(layer, memory_format)
        CASES[f"{name}, channels last, bfloat16"] = Case(layer, memory_format, torch.bfloat16)
for name, layer in GROUP_NORMS.items():
    CASES[f"group norm, {name}"] = Case(layer, torch.channels_last)


class Net(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        torch.manual_seed(0)
        shape, self.call, self.memory_format = case.layer.shape, case.layer.call, case.memory_format
        self.before = nn.Identity()
        if case.layer.before:
            # PReLU leaves the memory format as it is.
            self.before = nn.PReLU(6) if shape in (LINE, *CHANNELS_LAST) else nn.Linear(6, 6)
        self.layer = case.layer.make()
        self.to(case.dtype, memory_format=None if case.memory_format == torch.contiguous_format else case.memory_format)

    def forward(self, inputs: Tensor) -> Tensor:
        x = self.before(inputs)
        assert x.is_contiguous(memory_format=self.memory_format)
        return self.call(self.layer, x).flatten(1)


def loss_function(outputs: Tensor, _: Tensor) -> Tensor:
    """Linear, and no coefficient is zero or that of another output."""
    return (outputs * (outputs[0].numel() / 7 + torch.arange(outputs[0].numel())).sin().to(outputs)).sum(1)


def inputs_of(case: Case) -> Tensor:
    if case.layer.shape == TOKENS.shape:
        return TOKENS
    torch.manual_seed(1)
    return torch.randn(case.layer.shape).to(case.dtype).contiguous(memory_format=case.memory_format)


def direction_in_full_backward(name: str, param: str) -> Tensor:
    case = CASES[name]
    if name in ORDINARY_BACKWARD_CRASHES:
        case = Case(case.layer)
    net, inputs = Net(case), inputs_of(case)
    loss_function(net(inputs), inputs).mean().backward()
    grad = net.get_parameter(param).grad.double()
    assert grad.norm() > 1e-4
    return grad / grad.norm()


def direction_in_step(name: str, param: str) -> Tensor:
    """From an ESAM step that perturbs this parameter alone, with rho = 1; an ordinary step comes after it."""
    net, inputs = Net(CASES[name]), inputs_of(CASES[name])
    target = net.get_parameter(param)
    others = [other for other in net.parameters() if other is not target]
    groups = [{"params": [target]}, *([{"params": others, "rho": 0.0}] if others else [])]
    optimizer = ESAM(groups, torch.optim.SGD, lr=0.0, rho=1.0, beta=1.0, gamma=1.0, interval=2)
    seen: list[Tensor] = []
    net.register_forward_pre_hook(lambda *_: seen.append(target.detach().double()))
    for _ in range(2 if name in ORDINARY_BACKWARD_CRASHES else 1):
        optimizer.step(batch_closure(net, loss_function, inputs, inputs))
    return seen[1] - seen[0]


def sweep(names: list[str], log: Path) -> None:
    """Try every parameter of these cases, and say so before and after each; the child process does this."""

    def say(*words: str) -> None:
        with log.open("a") as file:
            print(*words, sep="\t", file=file)

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # the old forms are deprecated
    for name in names:
        for param, _ in Net(CASES[name]).layer.named_parameters(prefix="layer"):
            say("at", name, param)
            try:
                expected, found = direction_in_full_backward(name, param), direction_in_step(name, param)
                error = (found - expected).abs().max().item()
                low_precision = CASES[name].dtype == torch.bfloat16 or "autocast" in name
                outcome = "as expected" if error <= (0.02 if low_precision else 1e-5) else f"differs by {error:.3g}"
            except Exception as raised:
                outcome = repr(raised).replace("\n", " ").replace("\t", " ")
            say("is", name, param, outcome)


def sweep_in_processes(names: list[str], folder: Path, processes: int = 12) -> dict[str, dict[str, str]]:
    """What became of every parameter of every case; after a crash a further process goes on with the next case."""
    outcomes: dict[str, dict[str, str]] = {name: {} for name in names}
    for number in range(processes):
        log = folder / f"{number}.log"
        log.touch()
        child = forks.context().Process(target=sweep, args=(names, log))
        child.start()
        child.join(300)
        at = ""
        for line in log.read_text().splitlines():
            mark, name, param, *outcome = line.split("\t")
            at = name
            outcomes[name][param] = outcome[0] if mark == "is" else f"the process ended here ({child.exitcode})"
        if child.exitcode == 0:
            break
        child.kill()
        assert at, child.exitcode
        names = names[names.index(at) + 1 :]
    return outcomes


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    return sweep_in_processes(list(CASES), tmp_path_factory.mktemp("sweep"))


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
@pytest.mark.parametrize("name", [name for name in CASES if name != DIES])
def test_the_gradient_of_a_single_weight_is_that_of_the_full_backward(outcomes, name):
    params = [param for param, _ in CASES[name].layer.make().named_parameters(prefix="layer")]
    assert outcomes[name] == dict.fromkeys(params, "as expected")
    assert params


def test_a_crash_is_found_where_it_is(outcomes):
    assert outcomes[DIES] == {"layer.weight": f"the process ended here ({-signal.SIGSEGV})"}


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
def test_no_layer_of_torch_is_forgotten():
    makes_parameters = re.compile(r"Parameter\(|Linear\(|Encoder\(|Attention\(|_get_clones\(")
    swept = {type(layer.make()) for layer in LAYERS.values()}
    forgotten = set()
    for kind in vars(nn).values():
        if inspect.isclass(kind) and issubclass(kind, nn.Module) and kind not in (nn.RNNBase, nn.RNNCellBase):
            bases = [base for base in kind.__mro__ if base not in (nn.Module, object) and "__init__" in vars(base)]
            lazy = kind.__name__.startswith("Lazy")  # becomes one that is not
            if any(makes_parameters.search(inspect.getsource(base.__init__)) for base in bases) and not lazy:
                forgotten |= {kind.__name__} - {one.__name__ for one in swept}
    assert not forgotten


def norms_in_a_row() -> nn.Sequential:
    return nn.Sequential(*(layer for _ in range(3) for layer in (nn.Conv2d(6, 6, 1), nn.GroupNorm(2, 6), nn.ReLU())))


@pytest.mark.parametrize(
    ("names", "inputs"),
    [
        (["0.weight", "1.weight", "4.weight"], []),  # a convolution before each norm
        (["1.weight", "4.weight", "7.bias"], ["1"]),
        (["4.bias"], ["4"]),
        (["6.weight"], []),  # after the first two norms, whose backward does not run
        ([], []),
    ],
)
def test_no_more_is_computed_than_the_input_of_the_first_norm(names, inputs):
    net = norms_in_a_row()
    seen = {}
    for name, layer in net.named_children():
        layer.register_forward_pre_hook(lambda _, inputs, name=name: seen.update({name: inputs[0].grad_fn}))
    loss = net(torch.ones(IMAGE)).sum()
    edges = needed_edges(loss, [net.get_parameter(name) for name in names])
    assert [edge.node for edge in edges] == [seen[name] for name in inputs]


def test_what_is_trained_on_another_device_costs_no_search(monkeypatch):
    monkeypatch.setattr(partial_gradients, "nodes", lambda loss: pytest.fail("searched"))
    params = list(norms_in_a_row().to("meta").parameters())
    loss = torch.ones((), requires_grad=True) * 2
    assert needed_edges(loss, params) == []
    partial_gradients.guard_group_norms(loss, params)


class Product(torch.autograd.Function):
    """Its gradients are the weights themselves."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return (a * b).sum()

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        return b, a


def test_a_gradient_that_is_another_weight_is_that_from_before_it_moved():
    a, b = (nn.Parameter(torch.tensor(row)) for row in ([1.0, 0.0], [0.0, 1.0]))
    seen = []

    def closure(index):
        seen.append((a.detach().clone(), b.detach().clone()))
        return Product.apply(a, b)

    ESAM([a, b], torch.optim.SGD, lr=0.0, rho=1.0, beta=1, gamma=1).step(closure)
    half = 0.5**0.5
    torch.testing.assert_close(seen[1][0] - seen[0][0], torch.tensor([0.0, half]))
    torch.testing.assert_close(seen[1][1] - seen[0][1], torch.tensor([half, 0.0]))
