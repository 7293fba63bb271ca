"""Each direction of ascent is its definition, over any base that has it, and is refused over one that has it not."""

import copy
import itertools
import warnings

import pytest
import torch
from networks import BASES, batches, cross_entropy, grads, mlp, perturbed, same, train, values
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from esam_kernels import ESAM, batch_closure, current_pass, first_pass
from esam_kernels.ops import ElementMask
from esam_kernels.passes import evaluate
from esam_kernels.passes.draw import draw_tensors
from esam_kernels.passes.sources import PREVIOUS

SIZE = 16
STEPS = 12
SEED = 2**40 + 3


def network(bias: bool = True) -> nn.Sequential:
    torch.manual_seed(1)
    layers = [nn.Linear(4, 8, bias), nn.Tanh(), nn.Linear(8, 8, bias), nn.Tanh(), nn.Linear(8, 8, bias), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(8, 3, bias)).double()


def data(count: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    return batches(count, size=SIZE, dtype=torch.float64)


# Base optimizers, and what their first moment becomes with a gradient: from their papers.
MOMENTS = {
    "sgd": (
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
        lambda v, g, w: g + 0.01 * w if v is None else 0.9 * v + g + 0.01 * w,
    ),
    "adamw": (
        torch.optim.AdamW,
        {"lr": 0.01, "betas": (0.8, 0.99), "weight_decay": 0.1},
        lambda v, g, w: 0.2 * g if v is None else 0.8 * v + 0.2 * g,
    ),
    "muon": (
        torch.optim.Muon,  # of matrices alone
        {"lr": 0.01, "momentum": 0.95},
        lambda v, g, w: 0.05 * g if v is None else 0.95 * v + 0.05 * g,
    ),
}


def transcribed_steps(
    model: nn.Module, base: str, ascent: str, rho: list[float], adaptive: list[bool], beta: float, gamma: float,
    granularity: str,
) -> list[Tensor]:  # fmt: skip
    """The definition in float64, one line a row; the base optimizer's steps are its own, and the draws ESAM's."""
    kind, options, moment_of = MOMENTS[base]
    w = [p.detach().clone().requires_grad_() for p in model.parameters()]
    optimizer = kind(w, **options)
    names = [name for name, _ in model.named_parameters()]
    some = [i for i in range(len(w)) if rho[i] > 0]
    v: list[Tensor | None] = [None] * len(w)

    def losses(weights: list[Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(torch.func.functional_call(model, dict(zip(names, weights)), (inputs,)), targets)

    for step, (inputs, targets) in enumerate(data()):
        if granularity == "tensor":
            kept = {some[i] for i in draw_tensors(some, beta, SEED, step)}
            m = [torch.full_like(p, i in kept, dtype=torch.float64) for i, p in enumerate(w)]
        else:
            mask = ElementMask(SEED, step, range(len(w)), beta)
            m = [mask.keep(i, p).double() * (i in some) for i, p in enumerate(w)]
        a = [p.abs() if x else torch.ones_like(p) for p, x in zip(w, adaptive)]
        direction = [torch.zeros_like(p) if x is None else x for p, x in zip(w, v)]
        norm = sum((m_ * a_ * d).square().sum() for m_, a_, d in zip(m, a, direction)).sqrt()
        sign = -1 if ascent == "momentum" else 1
        e = [sign * r / beta * m_ * a_**2 * d / (norm + 1e-12) for r, m_, a_, d in zip(rho, m, a, direction)]
        moved = [(p + e_).detach().requires_grad_() for p, e_ in zip(w, e)]
        rise = (losses(moved, inputs, targets) - losses(w, inputs, targets)).tolist()
        rows = sorted(sorted(range(SIZE), key=lambda i: (-rise[i], i))[: max(1, int(gamma * SIZE))])
        gradient = torch.autograd.grad(losses(moved, inputs[rows], targets[rows]).mean(), moved)
        if ascent == "momentum":
            v = [moment_of(v_, g, p.detach()) for v_, g, p in zip(v, gradient, w)]
        else:
            v = list(gradient)
        for p, g in zip(w, gradient):
            p.grad = g
        optimizer.step()
    return w


@pytest.mark.parametrize("base", MOMENTS)
@pytest.mark.parametrize("ascent", ["momentum", "previous"])
@pytest.mark.parametrize(
    ("granularity", "beta", "gamma"), [("tensor", 1.0, 1.0), *itertools.product(["tensor", "element"], [0.6], [0.5, 1])]
)
def test_a_run_is_that_of_the_definition(base, ascent, granularity, beta, gamma):
    """With a rho and an adaptive of each group: its last layer is left alone, its first is adaptive."""
    model = network(bias=base != "muon")
    groups = [
        {"params": model[0].parameters(), "rho": 0.8, "adaptive": True},
        {"params": model[2].parameters()},
        {"params": model[4].parameters(), "rho": 0.2},
        {"params": model[6].parameters(), "rho": 0.0},
    ]
    counts = [len(list(model[i].parameters())) for i in (0, 2, 4, 6)]
    rho = [rho for rho, count in zip((0.8, 0.1, 0.2, 0.0), counts) for _ in range(count)]
    adaptive = [i == 0 for i, count in enumerate(counts) for _ in range(count)]
    start = copy.deepcopy(model)
    expected = transcribed_steps(start, base, ascent, rho, adaptive, beta, gamma, granularity)
    kind, options, _ = MOMENTS[base]
    settings = {"rho": 0.1, "beta": beta, "gamma": gamma, "granularity": granularity, "seed": SEED, "ascent": ascent}
    train(model, ESAM(groups, kind, **options, **settings), data())
    for a, b, s in zip(model.parameters(), expected, start.parameters()):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-9, atol=1e-11)
        assert (a - s).norm() > 1e-2 * s.norm()  # the run has gone somewhere


def perturbation(model: nn.Module, optimizer: ESAM, batch: tuple[Tensor, Tensor], passes: int = 1) -> list[Tensor]:
    """What a backward adds to the weights in the last of its forwards."""
    start, seen = [param.detach().clone() for param in model.parameters()], []
    closure = batch_closure(model, cross_entropy, *batch)

    def watching(index):
        seen.append([param.detach() - weights for param, weights in zip(model.parameters(), start)])
        return closure(index)

    optimizer.backward(watching)
    assert len(seen) == passes
    return seen[-1]


def cosine(these: list[Tensor], those: list[Tensor]) -> float:
    a, b = (torch.cat([x.flatten() for x in list_]) for list_ in (these, those))
    return (a @ b / a.norm() / b.norm()).item()


WITH_FIRST_MOMENT = {
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, "momentum_buffer"),
    "Nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}, "momentum_buffer"),
    "Adam": (torch.optim.Adam, {"amsgrad": True}, "exp_avg"),
    "AdamW": (torch.optim.AdamW, {}, "exp_avg"),
    "Adamax": (torch.optim.Adamax, {}, "exp_avg"),
    "NAdam": (torch.optim.NAdam, {}, "exp_avg"),
    "RAdam": (torch.optim.RAdam, {}, "exp_avg"),
    "RMSprop": (torch.optim.RMSprop, {"momentum": 0.9}, "momentum_buffer"),
    "Lion": ("Lion", {}, "exp_avg"),  # by name, those of pytorch_optimizer
    "AdaFactor": ("AdaFactor", {"betas": (0.9, 0.999)}, "exp_avg"),
}


@pytest.mark.parametrize("name", WITH_FIRST_MOMENT)
def test_momentum_goes_against_the_first_moment_of_many_bases(name):
    kind, options, key = WITH_FIRST_MOMENT[name]
    if isinstance(kind, str):
        kind = getattr(pytest.importorskip("pytorch_optimizer"), kind)
    model = network()
    optimizer = ESAM(model.parameters(), kind, **options, ascent="momentum", rho=0.7, beta=1, gamma=1)
    train(model, optimizer, data(3))
    moments = [optimizer.state[param][key].double() for param in model.parameters()]
    e = perturbation(model, optimizer, data(4)[3])
    assert cosine(e, moments) == pytest.approx(-1)
    assert torch.cat([x.flatten() for x in e]).norm().item() == pytest.approx(0.7)


class Unknown(torch.optim.Optimizer):
    """A base that keeps something, but no first moment under a known name."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for param in self.param_groups[0]["params"]:
            self.state[param].setdefault("history", []).append(param.grad.norm())
            param -= 0.1 * param.grad


@pytest.mark.parametrize("name", ["SGD", "RMSprop", "Adagrad", "ASGD", "Rprop", "Adafactor"])
def test_momentum_is_refused_over_a_base_without_when_it_is_made_or_set(name):
    model, kind, options = network(), getattr(torch.optim, name), {"lr": 0.1}
    switched_off = name in ("SGD", "RMSprop")
    fix = r"with momentum = 0 .*momentum=0\.9" if switched_off else "SGD with momentum, or AdamW"
    words = rf"ascent = 'momentum': {name}.*first moment.*'previous' or 'gradient'"
    with pytest.raises(ValueError, match=rf"{name}.*{fix}"):
        ESAM(model.parameters(), kind, ascent="momentum", **options)
    with pytest.raises(ValueError, match=words):
        ESAM(model.parameters(), kind, ascent="momentum", **options)
    with pytest.raises(ValueError, match=words):
        ESAM(None, kind(model.parameters(), **options), ascent="momentum")
    ESAM([{"params": model.parameters(), "rho": 0.0}], kind, ascent="momentum", **options)  # where nothing climbs
    optimizer = ESAM(model.parameters(), kind, **options)
    optimizer.param_groups[0]["ascent"] = "momentum"
    before = values(model)
    with pytest.raises(ValueError, match=words):
        train(model, optimizer, data(1))
    assert same(before, values(model))


def test_momentum_is_refused_over_one_whose_buffer_of_that_name_holds_weights():
    accsgd = pytest.importorskip("pytorch_optimizer").AccSGD
    with pytest.raises(ValueError, match="ascent = 'momentum': AccSGD keeps no first moment"):
        ESAM(network().parameters(), accsgd, ascent="momentum")


def test_momentum_is_refused_over_an_unknown_base_as_soon_as_it_has_a_state():
    model = network()
    optimizer = ESAM(model.parameters(), Unknown, ascent="momentum", beta=1)
    train(model, optimizer, data(1))
    before = values(model)
    words = r"first moment.*parameter 0.*\[8, 4\].*only history.*exp_avg or momentum_buffer.*'previous'"
    with pytest.raises(ValueError, match=words):
        train(model, optimizer, data(2)[1:])
    assert same(before, values(model))
    for group in optimizer.param_groups:
        group["ascent"] = "previous"
    train(model, optimizer, data())
    assert all(len(state["history"]) == STEPS + 1 for state in optimizer.state.values())


def test_a_first_moment_of_another_shape_is_refused():
    model = network()
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, ascent="momentum", beta=1)
    train(model, optimizer, data(1))
    optimizer.state[model[2].weight]["momentum_buffer"] = torch.zeros(64, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"parameter 2.*in the parameter's shape"):
        train(model, optimizer, data(1))


@pytest.mark.parametrize("ascent", ["momentum", "previous"])
def test_a_weight_without_a_direction_stays(ascent):
    """In the first step all of them, later one that was added; both get gradients."""
    model = network()
    optimizer = ESAM(
        [*model[0].parameters(), *model[2].parameters()],
        torch.optim.AdamW,
        lr=0.01,
        ascent=ascent,
        beta=1,
        gamma=1,
        rho=0.5,
    )
    assert not any(e.any() for e in perturbation(model, optimizer, data()[0]))
    plain = copy.deepcopy(model)
    plain.zero_grad()
    cross_entropy(plain(data()[0][0]), data()[0][1]).mean().backward()
    assert same(grads(plain), grads(model))
    optimizer.step()
    optimizer.add_param_group({"params": [*model[4].parameters(), *model[6].parameters()]})
    e = perturbation(model, optimizer, data()[1])
    assert [bool(x.any()) for x in e] == [True] * 4 + [False] * 4
    optimizer.step()
    assert all(x.any() for x in perturbation(model, optimizer, data()[2]))


def test_the_gradient_of_the_last_step_is_kept_while_it_is_climbed_along():
    model = network()
    optimizer = ESAM(model.parameters(), torch.optim.AdamW, lr=0.01, ascent="previous", gamma=1)
    optimizer.param_groups[0]["rho"] = 0.1
    for batch in data(3):
        train(model, optimizer, [batch])
        assert all(same([optimizer.state[p][PREVIOUS]], [p.grad]) for p in model.parameters())
        assert all(optimizer.state[p][PREVIOUS] is not p.grad for p in model.parameters())
    kept = [optimizer.state[p][PREVIOUS].clone() for p in model.parameters()]
    optimizer.backward(batch_closure(model, cross_entropy, *data(1)[0]))
    optimizer.zero_grad(set_to_none=False)  # and a step that was not taken leaves what is kept
    assert same(kept, [optimizer.state[p][PREVIOUS] for p in model.parameters()])
    optimizer.param_groups[0]["rho"] = 0.0  # while it is, there is nothing to climb along later
    train(model, optimizer, data(1))
    assert not any(PREVIOUS in state for state in optimizer.state.values())
    optimizer.param_groups[0].update(rho=0.1)
    train(model, optimizer, data(1))
    assert all(PREVIOUS in state for state in optimizer.state.values())
    optimizer.param_groups[0]["ascent"] = "momentum"
    train(model, optimizer, data(1))
    assert not any(PREVIOUS in state for state in optimizer.state.values())


def test_previous_works_over_sgd_without_momentum_which_has_no_state():
    model = network()
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, ascent="previous", rho=0.5, beta=1, gamma=1)
    train(model, optimizer, data(1))
    last = [param.grad.clone() for param in model.parameters()]
    e = perturbation(model, optimizer, data(2)[1])
    assert cosine(e, last) == pytest.approx(1)


def test_a_base_whose_step_fails_leaves_the_kept_gradients():
    model = network()
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, ascent="previous")
    train(model, optimizer, data(2))
    kept = [optimizer.state[param][PREVIOUS] for param in model.parameters()]
    before = [one.clone() for one in kept]

    def fail(*_):
        raise InterruptedError

    hook = optimizer.register_step_pre_hook(fail)
    with pytest.raises(InterruptedError):
        train(model, optimizer, data(1))
    hook.remove()
    assert all(optimizer.state[param][PREVIOUS] is one for param, one in zip(model.parameters(), kept))
    assert same(kept, before)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("ascent", ["gradient", "momentum", "previous"])
def test_a_scaler_changes_nothing_but_skips_an_overflow(ascent, fused):
    """A fused optimizer unscales by itself, and is stepped whatever has been found."""
    models = [mlp(), mlp()]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    optimizers = [
        ESAM(m.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, fused=fused, ascent=ascent, rho=0.3) for m in models
    ]
    for number, batch in enumerate(batches(8)):
        if number in ((2, 4) if fused else (0, 4)):  # torch leaves the first moment of a skipped first fused step unset
            before = values(models[1])
            overflowing = batch_closure(models[1], lambda *args: cross_entropy(*args) * 1e38, *batch)
            optimizers[1].backward(overflowing, scaler)
            scaler.step(optimizers[1])
            scaler.update()
            assert same(before, values(models[1]))
            optimizers[1].param_groups[0]["esam_step"] -= 1  # the same draws
        train(models[0], optimizers[0], [batch])
        optimizers[1].backward(batch_closure(models[1], cross_entropy, *batch), scaler)
        scaler.step(optimizers[1])
        scaler.update()
    assert scaler.get_scale() == 256
    for one, other in zip(*(model.parameters() for model in models)):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ascent", ["momentum", "previous"])
def test_a_direction_that_is_not_finite_perturbs_nothing(ascent):
    model = network()
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, ascent=ascent, beta=1, gamma=1)
    train(model, optimizer, data(2))
    key = {"momentum": "momentum_buffer", "previous": PREVIOUS}[ascent]
    optimizer.state[model[0].weight][key][0, 0] = torch.inf
    assert not any(e.any() for e in perturbation(model, optimizer, data(1)[0]))


@pytest.mark.parametrize("sizes", [[8, 8], [5, 1, 7, 3]], ids=str)
@pytest.mark.parametrize("ascent", ["momentum", "previous"])
@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_micro_batches_add_up_to_one_batch(ascent, sizes, gamma):
    models = [network(), network()]
    for model, split in zip(models, ([SIZE], sizes)):
        optimizer = ESAM(
            model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, ascent=ascent, rho=0.5, gamma=gamma,
            select_over="all",
        )  # fmt: skip
        for inputs, targets in data():
            optimizer.step(
                [batch_closure(model, cross_entropy, *part) for part in zip(inputs.split(split), targets.split(split))]
            )
    for one, many in zip(*(model.parameters() for model in models)):
        torch.testing.assert_close(many, one, rtol=1e-8, atol=1e-11)


def test_a_share_of_the_rows_gives_the_ascent_its_gradient():
    model = network()
    inputs, targets = data(1)[0]
    seen = []
    closure = batch_closure(model, cross_entropy, inputs, targets)
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.5, beta=1, gamma=1, ascent_share=0.25)
    call = type(closure).__call__
    closure.__class__ = type("Noting", (type(closure),), {"__call__": lambda s, i: seen.append(i) or call(s, i)})
    loss = optimizer.backward(closure)
    rows, everything = seen
    assert everything is None
    assert len(rows) == 4
    there = perturbed(network(), lambda one: cross_entropy(one(inputs[rows]), targets[rows]).mean(), rho=0.5)
    cross_entropy(there(inputs), targets).mean().backward()
    for mine, theirs in zip(grads(model), grads(there)):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(loss, cross_entropy(model(inputs[rows]), targets[rows]).mean().detach())


@pytest.mark.parametrize("weighted", [False, True])
def test_random_rows_of_micro_batches_that_no_forward_has_measured_add_up_to_their_mean(weighted):
    model, seen = network(), []
    inputs, targets = data(1)[0]
    weights = torch.rand(SIZE, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def loss_fn(outputs, batch):
        seen.append((batch[1], cross_entropy(outputs, batch[0])))
        return (seen[-1][1], weights[batch[1]]) if weighted else seen[-1][1]

    rows = torch.arange(SIZE)
    closures = [
        batch_closure(model, loss_fn, x, (y, i))
        for x, y, i in zip(*(t.split([5, 1, 10]) for t in (inputs, targets, rows)))
    ]
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, ascent="momentum", selection="random")
    loss = optimizer.backward(closures)
    chosen = torch.cat([index for index, _ in seen])
    assert [len(index) for index, _ in seen] == [2, 1, 5]
    twin = network()
    w = weights[chosen] if weighted else torch.ones(8, dtype=torch.float64)
    expected = (cross_entropy(twin(inputs[chosen]), targets[chosen]) * w).sum() / w.sum()
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    for mine, theirs in zip(grads(model), grads(twin)):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-13)


class NoSync(TorchDispatchMode):
    """Refuses what would make the host wait for a device, if the tensors were on one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in (
            torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero,
            torch.ops.aten.masked_select, torch.ops.aten.is_nonzero,
        ), func  # fmt: skip
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "options",
    [
        {"ascent": "momentum"},
        {"ascent": "momentum", "gamma": 1},
        {"ascent": "previous", "selection": "random"},
        {"ascent": "previous", "gamma": 1, "adaptive": True},
        {"ascent_share": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("scaled", [False, True])
def test_a_step_asks_for_no_number_from_the_device(options, scaled):
    model = network()
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, **options)
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    for batch in data(3):
        with NoSync():
            optimizer.backward(batch_closure(model, cross_entropy, *batch), scaler)
            optimizer.step()
    item = torch.ones(())
    with NoSync(), pytest.raises(AssertionError):
        item.item()


SETTINGS = [
    {"ascent": "momentum"},
    {"ascent": "momentum", "gamma": 1},
    {"ascent": "previous", "selection": "loss"},
    {"ascent": "previous", "selection": "random"},
    {"ascent_share": 0.5},
    {"ascent_share": 0.5, "gamma": 1},
]


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_buffers_and_the_random_state_are_as_the_first_forward_left_them(options):
    model = mlp(nn.BatchNorm1d(8), nn.Dropout(0.3))
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.5, **options)
    train(model, optimizer, batches(2, size=SIZE))
    found = []
    closure = batch_closure(model, cross_entropy, *batches(1, size=SIZE, seed=7)[0])
    call = type(closure).__call__

    def noting(self, index):
        losses = call(self, index)
        found.append([buffer.clone() for buffer in model.buffers()])
        return losses

    closure.__class__ = type("Noting", (type(closure),), {"__call__": noting})
    optimizer.backward(closure)
    assert same(model.buffers(), found[0])
    assert model[1].num_batches_tracked == 3


def test_what_is_dropped_out_is_the_same_in_both_losses_that_are_compared():
    model = mlp(nn.Dropout(0.5))
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.5, ascent="momentum")
    train(model, optimizer, batches(2))
    masks = []
    model[1].register_forward_hook(lambda module, inputs, output: masks.append(output == 0))
    optimizer.backward(batch_closure(model, cross_entropy, *batches(1)[0]))
    survey, look, descend = masks
    assert same([survey], [look])
    assert len(descend) == 4


@pytest.mark.parametrize("base", BASES)
def test_steering_in_low_precision_leaves_the_last_pass_alone(base):
    kind, options = BASES[base]
    model, seen = mlp(), []
    optimizer = ESAM(
        model.parameters(), kind, **options, ascent="momentum", steering_dtype=torch.bfloat16, selection="increase"
    )
    model[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    train(model, optimizer, batches(1))
    assert seen == [torch.bfloat16, torch.bfloat16, torch.float32]
    seen.clear()
    optimizer.param_groups[0]["gamma"] = 1
    train(model, optimizer, batches(1))
    assert seen == [torch.float32]


@pytest.fixture
def slow_bf16(monkeypatch):
    evaluate.warn_if_bf16_is_slow.cache_clear()
    monkeypatch.setattr(evaluate.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    yield monkeypatch
    evaluate.warn_if_bf16_is_slow.cache_clear()


def steer(model: nn.Module) -> None:
    train(model, ESAM(model.parameters(), torch.optim.SGD, lr=0.1, steering_dtype=torch.bfloat16), batches(2))


def test_low_precision_without_its_units_is_warned_of_once(slow_bf16):
    with pytest.warns(UserWarning, match="without bf16 units.*slower.*leave it out") as found:
        steer(mlp())
    assert len(found) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steer(mlp())


@pytest.mark.parametrize("known", ["_is_amx_tile_supported", "_is_avx512_bf16_supported", None])
def test_low_precision_with_its_units_or_where_torch_cannot_tell_is_not_warned_of(slow_bf16, known):
    if known is None:
        slow_bf16.delattr(torch.cpu, "_is_amx_tile_supported")
    else:
        slow_bf16.setattr(torch.cpu, known, lambda: True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steer(mlp())


def test_zero_redundancy_optimizer_is_refused(one_rank):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    for ascent in ("momentum", "previous"):
        with pytest.raises(ValueError, match=r"ZeroRedundancyOptimizer.*one rank.*'gradient'.*fully_shard"):
            ESAM(network().parameters(), ZeroRedundancyOptimizer, optimizer_class=torch.optim.Adam, ascent=ascent)


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_share_of_the_rows_needs_a_loss_for_each(by_hand):
    """One loss in all has no rows, also where no others are selected."""
    model = network()
    closure = batch_closure(model, lambda *batch: cross_entropy(*batch).mean(), *data(1)[0])
    given = (lambda index: closure(index)) if by_hand else closure
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, gamma=1, ascent_share=0.5, model=model)
    with pytest.raises(ValueError, match=r"scalar.*gamma=1 \(and ascent_share=1\)"):
        optimizer.backward(given)
    optimizer.param_groups[0]["ascent_share"] = 1
    optimizer.backward(given)


def test_batch_norm_gets_two_rows_of_the_smallest_share():
    model = mlp(nn.BatchNorm1d(8))
    sizes = []
    model.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    train(model, ESAM(model.parameters(), torch.optim.SGD, lr=0.1, gamma=1, ascent_share=0.01), batches(1))
    assert sizes == [2, 8]


@pytest.mark.parametrize(
    ("options", "passes"),
    [
        ({"ascent": "momentum"}, ["survey", "look", "descend"]),
        ({"ascent": "momentum", "gamma": 1}, ["descend"]),
        ({"ascent_share": 0.5}, ["survey", "ascend", "look", "descend"]),
        ({"ascent_share": 0.5, "gamma": 1}, ["ascend", "descend"]),
    ],
    ids=str,
)
def test_a_model_can_tell_the_first_of_the_passes(options, passes):
    model, seen = mlp(), []
    model.register_forward_pre_hook(lambda *_: seen.append((current_pass(), first_pass())))
    train(model, ESAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, **options), batches(1))
    assert seen == [(name, passes[0]) for name in passes]
    assert current_pass() is None


@pytest.mark.parametrize("options", [{"ascent": "momentum", "gamma": 1}, {"ascent": "previous", "gamma": 1}], ids=str)
def test_weights_that_a_forward_writes_are_put_back_when_the_only_pass_fails(options):
    """``nn.Embedding(max_norm=...)`` writes them; the perturbation's writes are not taken for such."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(8, 4, max_norm=0.5), nn.Flatten(), nn.Linear(8, 3))
    inputs, targets = torch.randint(8, (6, 2)), torch.randint(3, (6,))
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.5, momentum=0.9, beta=1, **options)

    def failing(index):
        model(inputs)
        raise InterruptedError

    failing.model = model
    for _ in range(3):
        before = values(model)
        with pytest.raises(InterruptedError):
            optimizer.backward(failing)
        assert same(before, values(model))
        optimizer.step(batch_closure(model, cross_entropy, inputs, targets))
    assert optimizer._progress.findings.written == [0]


class Stateless(torch.optim.Optimizer):
    """Keeps nothing of its parameters in ``state``; something else may be there."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})
        self.state["k"] = torch.zeros(())

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                param -= group["lr"] * param.grad.sign()
        self.state["k"] += 1


@pytest.mark.parametrize("several", [False, True])
def test_momentum_is_refused_over_a_base_that_keeps_nothing_once_it_has_stepped(several):
    model = network()
    base = Stateless(model[0].parameters() if several else model.parameters())
    others = [torch.optim.SGD(model[2:].parameters(), lr=0.1, momentum=0.9)] if several else []
    optimizer = ESAM(None, [base, *others] if several else base, ascent="momentum", beta=1)
    train(model, optimizer, data(1))
    before = values(model)
    with pytest.raises(ValueError, match=r"Stateless.*keeps nothing.*exp_avg or momentum_buffer.*'previous'"):
        train(model, optimizer, data(2)[1:])
    assert same(before, values(model))
    for group in optimizer.param_groups:
        group["ascent"] = "gradient"
    train(model, optimizer, data())


@pytest.mark.parametrize("ascent", ["gradient", "previous"])
def test_what_a_base_keeps_beside_its_parameters_stays(ascent):
    model = network()
    optimizer = ESAM(model.parameters(), Stateless, ascent=ascent, beta=1)
    train(model, optimizer, data())
    assert optimizer.state["k"] == STEPS


class Skips(nn.Module):
    """A network that leaves its last layer out when it is told so."""

    def __init__(self) -> None:
        super().__init__()
        self.network, self.last, self.skip = network(), nn.LazyLinear(4, dtype=torch.float64), False

    def forward(self, inputs):
        outputs = self.network(inputs)
        return outputs if self.skip else self.last(outputs)


def test_a_weight_without_a_gradient_in_the_last_step_stays_and_its_entry_too():
    """An entry that came and went would be missing in a checkpoint, and would have a compiled step compiled anew."""
    model = Skips()
    model(data(1)[0][0])
    optimizer = ESAM(model.parameters(), torch.optim.AdamW, lr=0.01, ascent="previous", beta=1, gamma=1, rho=0.5)
    train(model, optimizer, data(1))
    kept = {param: optimizer.state[param][PREVIOUS] for param in model.parameters()}
    assert all(one.any() for one in kept.values())
    model.skip = True
    train(model, optimizer, data(1))
    assert all(optimizer.state[param][PREVIOUS] is one for param, one in kept.items())
    assert all(one.any() == (param not in set(model.last.parameters())) for param, one in kept.items())
    model.skip = False
    moved = dict(zip(model.parameters(), perturbation(model, optimizer, data(1)[0])))
    assert all(e.any() == (param not in set(model.last.parameters())) for param, e in moved.items())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_compiled_base_step_is_not_compiled_anew():
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    model = network()
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=torch.tensor(0.1), ascent="previous", gamma=1)
    optimizer.base.step = torch.compile(optimizer.base.step, backend=backend)
    train(model, optimizer, data(3))
    before = len(compiled)
    train(model, optimizer, data(3))
    assert len(compiled) == before > 0


@pytest.mark.parametrize("name", ["GaLore", "Fira", "APOLLO"])
def test_a_first_moment_in_another_basis_is_refused(name):
    kind = getattr(pytest.importorskip("pytorch_optimizer"), name)
    weight = nn.Parameter(torch.ones(4, 4))
    group = {"params": [weight], "rank": 4, "update_proj_gap": 2, "scale": 1.0, "projection_type": "std"}
    ESAM([weight], kind, ascent="momentum")  # without a rank it is AdamW
    with pytest.raises(ValueError, match=rf"ascent = 'momentum': {name}.*another basis.*'previous' or 'gradient'"):
        ESAM(None, kind([group]), ascent="momentum")
