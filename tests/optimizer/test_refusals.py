"""Bad input is refused before anything changes, with the value and the fix in the message; a good call then works."""

import warnings
from functools import partial

import pytest
import torch
from networks import batches, cross_entropy, grads, mlp, random_state, same, train, values
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from esam_kernels import ESAM, batch_closure
from esam_kernels.passes import ascend

INPUTS, TARGETS = batches(1)[0]
NAN, INF = float("nan"), float("inf")


def sgd(network: nn.Module, **options) -> ESAM:
    return ESAM(network.parameters(), torch.optim.SGD, lr=0.1, **options)


OUT_OF_RANGE = [
    ("rho", -0.05, ">= 0"),
    ("rho", NAN, ">= 0"),
    ("rho", INF, ">= 0"),
    ("rho", "0.05", ">= 0"),
    ("beta", 0.0, r"\(0, 1\]"),
    ("beta", -0.5, r"\(0, 1\]"),
    ("beta", 1.5, r"\(0, 1\]"),
    ("beta", NAN, r"\(0, 1\]"),
    ("gamma", 0.0, r"\(0, 1\]"),
    ("gamma", 1.01, r"\(0, 1\]"),
    ("gamma", NAN, r"\(0, 1\]"),
    ("gamma", None, r"\(0, 1\]"),
    ("interval", 0, ">= 1"),
    ("interval", -3, ">= 1"),
    ("interval", 2.5, ">= 1"),
    ("ascent", "velocity", "'gradient', 'momentum' or 'previous'"),
    ("ascent_share", 0.0, r"\(0, 1\]"),
    ("ascent_share", 1.5, r"\(0, 1\]"),
    ("start", -1, ">= 0"),
    ("start", 2.5, ">= 0"),
    ("adaptive", "yes", "True or False"),
    ("granularity", "layer", "'tensor' or 'element'"),
    ("selection", "top", "'increase', 'loss' or 'random'"),
    ("select_over", "batch", "'micro_batch' or 'all'"),
    ("seed", -1, r"2\*\*64"),
    ("seed", 2**64, r"2\*\*64"),
    ("seed", 1.5, r"2\*\*64"),
    ("steering_dtype", torch.float16, "bfloat16"),
    ("steering_dtype", "float32", "bfloat16"),
]


@pytest.mark.parametrize(("name", "value", "fix"), OUT_OF_RANGE)
def test_a_value_out_of_range_at_construction(name, value, fix):
    with pytest.raises(ValueError, match=rf"{name} = .*{fix}") as refusal:
        sgd(mlp(), **{name: value})
    assert str(value).removeprefix("torch.") in str(refusal.value)


@pytest.mark.parametrize(("name", "value", "fix"), [row for row in OUT_OF_RANGE if row[0] != "steering_dtype"])
def test_a_value_out_of_range_that_was_set_later(name, value, fix):
    model = mlp(nn.BatchNorm1d(8))
    optimizer = sgd(model)
    good = optimizer.param_groups[0][name]

    def set_to(value):
        optimizer.param_groups[0][name] = value

    set_to(value)
    refused(model, optimizer, ValueError, rf"{name} = .*{fix}", batch_closure(model, cross_entropy, INPUTS, TARGETS))
    set_to(good)
    works(model, optimizer)


@pytest.mark.parametrize(
    ("base", "options", "error", "words"),
    [
        (torch.optim.LBFGS, {}, ValueError, "LBFGS.*closure"),
        (ESAM, {"lr": 0.1}, ValueError, "base is ESAM, which is sharpness-aware itself"),
        (torch.optim.Adadelta, {}, ValueError, r"'rho'.*ESAM\(None, Adadelta\(params"),
        (nn.Linear, {}, TypeError, r"Linear.*torch\.optim\.SGD"),
        ("sgd", {}, TypeError, r"'sgd'.*torch\.optim\.SGD"),
        (None, {}, TypeError, r"None.*torch\.optim\.SGD"),
        (torch.optim.SGD, {"lr": 0.1, "bta": 0.5}, TypeError, "bta"),
        (torch.optim.SGD, {"lr": -0.1}, ValueError, "-0.1"),
        (torch.optim.SGD, {"lr": 0.1, "maximize": True}, ValueError, "maximize = True: .*negate"),
    ],
)
def test_a_base_that_cannot_serve(base, options, error, words):
    with pytest.raises(error, match=words):
        ESAM(mlp().parameters(), base, **options)


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("Lion", {"maximize": True}, "maximize = True: .*negate"),
        ("SophiaH", {"lr": 0.1}, "SophiaH, which needs a graph of the gradients"),
        ("AliG", {"max_lr": 0.1}, "AliG evaluates a closure in its own step"),
        ("AdaHessian", {"lr": 0.1}, "AdaHessian, which needs a graph of the gradients"),
        ("SafeFP16Optimizer", {}, "SafeFP16Optimizer, which does not show its optimizer's defaults"),
    ],
)
def test_bases_of_pytorch_optimizer_that_cannot_serve(kind, options, words):
    others = pytest.importorskip("pytorch_optimizer")
    base = getattr(others, kind)
    make = (
        base(mlp().parameters(), **options)
        if kind != "SafeFP16Optimizer"
        else base(torch.optim.SGD(mlp().parameters()))
    )
    with pytest.raises(ValueError, match=words):
        ESAM(None, make)
    if options:
        with pytest.raises(ValueError, match=words):
            ESAM(mlp().parameters(), base, **options)


@pytest.mark.parametrize("params", [None, mlp()], ids=["None", "module"])
def test_what_is_no_parameters_of_a_base_that_is_to_be_made(params):
    what = "None" if params is None else "a Sequential"
    with pytest.raises(TypeError, match=rf"params is {what}, .*model\.parameters\(\).*ESAM\(None, SGD\("):
        ESAM(params, torch.optim.SGD, lr=0.1)


@pytest.mark.parametrize("model", [[nn.Linear(1, 1), nn.Linear(1, 1)], (nn.Linear(1, 1),), "resnet18"], ids=str)
def test_networks_that_are_no_module(model):
    with pytest.raises(TypeError, match=r"model is .*several networks as one nn\.ModuleList"):
        sgd(mlp(), model=model)


def test_ready_lbfgs():
    with pytest.raises(ValueError, match=r"LBFGS.*closure"):
        ESAM(None, torch.optim.LBFGS(mlp().parameters()))


def test_options_and_other_parameters_for_a_ready_base():
    model = mlp()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    groups = [dict(group) for group in base.param_groups]
    for params, options, words in [
        (None, {"momentum": 0.9}, "momentum"),
        (mlp().parameters(), {}, "params"),
        (None, {"rho": -1.0}, "rho = -1.0"),
    ]:
        with pytest.raises(ValueError, match=words):
            ESAM(params, base, **options)
        assert [dict(group) for group in base.param_groups] == groups
    ESAM(model.parameters(), base)  # the same parameters are fine
    ESAM(model.named_parameters(), torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize("disabled", [torch.no_grad, torch.inference_mode])
def test_backward_where_gradients_are_disabled(disabled):
    model = mlp()
    optimizer = sgd(model)
    with disabled(), pytest.raises(RuntimeError, match=r"no_grad.*outside"):
        optimizer.backward(batch_closure(model, cross_entropy, INPUTS, TARGETS))
    works(model, optimizer)


def test_a_bad_group_of_a_ready_base_leaves_it_as_it_was():
    base = torch.optim.SGD([{"params": [nn.Parameter(torch.ones(2))], "rho": -1.0}], lr=0.1)
    defaults, groups = dict(base.defaults), [dict(group) for group in base.param_groups]
    with pytest.raises(ValueError, match=r"rho = -1\.0"):
        ESAM(None, base)
    assert base.defaults == defaults
    assert [dict(group) for group in base.param_groups] == groups


@pytest.mark.parametrize("base", [torch.optim.Adadelta, torch.optim.RMSprop])
def test_a_ready_base_keeps_options_of_the_same_name_apart(base):
    """Adadelta has a rho of its own; RMSprop stands for the rest."""
    models = [mlp(), mlp()]
    own = {"rho": 0.7} if base is torch.optim.Adadelta else {"alpha": 0.7}
    plain = base(models[0].parameters(), **own)
    esam = ESAM(None, base(models[1].parameters(), **own), rho=0.0)
    for inputs, targets in batches(5):
        plain.zero_grad()
        cross_entropy(models[0](inputs), targets).mean().backward()
        plain.step()
        esam.step(batch_closure(models[1], cross_entropy, inputs, targets))
    assert same(values(models[0]), values(models[1]))
    for name, value in own.items():
        assert esam.param_groups[0][name] == value
    assert esam.param_groups[0]["esam_rho" if "rho" in own else "rho"] == 0.0


@pytest.mark.parametrize("params", [[], [{"params": []}]])
def test_no_parameters(params):
    with pytest.raises(ValueError, match=r"empty parameter list.*model\.parameters\(\)"):
        ESAM(params, torch.optim.SGD, lr=0.1)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_tied_weights_that_are_listed_twice():
    encoder, decoder = nn.Linear(4, 4), nn.Linear(4, 4)
    decoder.weight = encoder.weight
    params = [*encoder.parameters(), *decoder.parameters()]
    words = r"\[4, 4\] is 2 times in the list: .*list\(dict\.fromkeys\(params\)\)"
    with pytest.raises(ValueError, match=words):
        ESAM(params, torch.optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match=words):
        ESAM([{"params": params}], torch.optim.SGD, lr=0.1)
    optimizer = sgd(mlp())
    with pytest.raises(ValueError, match=words):
        optimizer.add_param_group({"params": params})
    assert len(optimizer.param_groups) == 1
    assert len(ESAM(list(dict.fromkeys(params)), torch.optim.SGD, lr=0.1).param_groups[0]["params"]) == 3


@pytest.mark.parametrize("scaler", [True, 65536.0, "scaler", torch.optim.SGD, nn.Linear(1, 1)], ids=str)
def test_what_is_no_grad_scaler(scaler):
    model = mlp(nn.BatchNorm1d(8))
    optimizer = sgd(model)
    before = values(model), random_state()
    with pytest.raises(TypeError, match=r"grad_scaler is .*give the GradScaler"):
        optimizer.backward(batch_closure(model, cross_entropy, INPUTS, TARGETS), scaler)
    assert same(values(model), before[0])
    assert random_state() == before[1]
    works(model, optimizer)


@pytest.mark.parametrize("later", [False, True], ids=["at construction", "in a group added later"])
def test_complex_parameters(later):
    params = [nn.Parameter(torch.ones(2, 3, dtype=torch.complex64))]
    optimizer = sgd(mlp())
    with pytest.raises(ValueError, match=r"\[2, 3\].*complex64.*view_as_real"):
        optimizer.add_param_group({"params": params}) if later else ESAM(params, torch.optim.SGD, lr=0.1)
    assert len(optimizer.param_groups) == 1


GROUPS = [
    ({"rho": -1.0}, "rho = -1.0.*>= 0"),
    ({"adaptive": 1}, "adaptive = 1.*True or False"),
    ({"beta": 0.3}, "beta.*only rho and adaptive may differ"),
    ({"gamma": 0.3}, "gamma.*only rho and adaptive may differ"),
    ({"seed": 3}, "seed.*only rho and adaptive may differ"),
    ({"interval": 3}, "interval.*only rho and adaptive may differ"),
    ({"granularity": "element"}, "granularity.*only rho and adaptive may differ"),
    ({"ascent": "previous"}, "ascent.*only rho and adaptive may differ"),
    ({"rho": None}, "rho = None.*>= 0"),
]


@pytest.mark.parametrize(("settings", "words"), GROUPS)
def test_a_group_with_settings_that_cannot_be(settings, words):
    model = mlp()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), **settings}]
    with pytest.raises(ValueError, match=words):
        ESAM(groups, torch.optim.SGD, lr=0.1)
    optimizer = ESAM(model[0].parameters(), torch.optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match=words):
        optimizer.add_param_group({"params": model[2].parameters(), **settings})
    assert len(optimizer.param_groups) == 1
    works(model, optimizer)
    optimizer.add_param_group({"params": list(model[2].parameters()), "rho": 0.3, "adaptive": True})
    works(model, optimizer)


@pytest.mark.parametrize(("name", "value"), [("beta", 0.3), ("gamma", 1.0), ("seed", 3), ("interval", 4)])
def test_global_settings_that_were_set_to_differ_later(name, value):
    model = mlp(nn.BatchNorm1d(8))
    optimizer = ESAM([{"params": [param]} for param in model.parameters()], torch.optim.SGD, lr=0.1)
    good = optimizer.param_groups[1][name]
    optimizer.param_groups[1][name] = value
    words = f"{name}.*{good}.*{value}.*only rho and adaptive"
    refused(model, optimizer, ValueError, words, batch_closure(model, cross_entropy, INPUTS, TARGETS))
    optimizer.param_groups[1][name] = good
    works(model, optimizer)


# Closures. Each entry makes one from the good one, whose result it spoils.


def spoiled(by) -> object:
    return lambda good: lambda index: by(good(index), index)


CLOSURES = {
    "scalar": (spoiled(lambda losses, _: losses.mean()), ValueError, r"scalar.*reduction='none'"),
    "two-dimensional": (spoiled(lambda losses, _: losses[:, None]), ValueError, r"\[8, 1\].*flatten\(1\)\.mean\(1\)"),
    "integers": (spoiled(lambda losses, _: losses.long()), ValueError, "int64.*floating"),
    "booleans": (spoiled(lambda losses, _: losses > 0), ValueError, "bool.*floating"),
    "complex": (spoiled(lambda losses, _: losses + 0j), ValueError, "complex64.*floating"),
    "no graph": (spoiled(lambda losses, _: losses.detach()), ValueError, "without a graph.*not detached"),
    "no rows": (spoiled(lambda losses, _: losses[:0]), ValueError, "0 losses"),
    "the whole batch for an index": (
        lambda good: lambda index: good(None),
        ValueError,
        "8 losses for 4 samples.*rows in index",
    ),
    "a row too few for an index": (
        spoiled(lambda losses, index: losses if index is None else losses[1:]),
        ValueError,
        "3 losses for 4 samples.*rows in index",
    ),
    "another length in pass 2": (
        spoiled(lambda losses, _: losses if torch.is_grad_enabled() else losses[1:]),
        ValueError,
        "7 losses for 8 samples.*same batch",
    ),
    "a number": (spoiled(lambda losses, _: 1.0), TypeError, r"float.*one loss per sample.*\[b\]"),
    "nothing": (spoiled(lambda losses, _: None), TypeError, "NoneType.*one loss per sample"),
    "a list": (spoiled(lambda losses, _: [losses, losses]), TypeError, r"list.*\(losses, weights\)"),
    "three tensors": (spoiled(lambda losses, _: (losses,) * 3), TypeError, r"tuple.*\(losses, weights\)"),
    "a weight that is no tensor": (spoiled(lambda losses, _: (losses, 1.0)), TypeError, r"\(losses, weights\)"),
    "a scalar weight": (spoiled(lambda losses, _: (losses, losses.mean())), ValueError, r"\[\].*one real weight"),
    "weights of another shape": (
        spoiled(lambda losses, _: (losses, torch.ones(3))),
        ValueError,
        r"\[3\].*\[8\].*one real weight for each loss",
    ),
    "complex weights": (spoiled(lambda losses, _: (losses, losses + 0j)), ValueError, "complex64.*one real weight"),
    "no argument": (lambda good: lambda: good(None), TypeError, r"takes no index.*closure\(index\)"),
    "two arguments": (lambda good: lambda a, b: good(None), TypeError, r"closure\(index\)"),
    "not callable": (lambda good: good(None), TypeError, r"closure\(index\)"),
    "an empty list": (lambda good: [], ValueError, "empty list of closures.*one for each micro-batch"),
    "one of a list": (lambda good: [good, lambda: good(None)], TypeError, "takes no index"),
}


# A plain step, as all take at rho = 0, calls the closure once, for the whole batch.
LATE = ("the whole batch for an index", "a row too few for an index", "another length in pass 2")


@pytest.mark.parametrize(
    ("closure", "rho"), [(name, 0.05) for name in CLOSURES] + [(name, 0.0) for name in CLOSURES if name not in LATE]
)
def test_a_bad_closure(closure, rho):
    make, error, words = CLOSURES[closure]
    model = mlp(nn.BatchNorm1d(8), nn.Dropout())
    optimizer = sgd(model, rho=rho, model=model)
    refused(model, optimizer, error, words, make(batch_closure(model, cross_entropy, INPUTS, TARGETS)))
    works(model, optimizer)


@pytest.mark.parametrize("forget", ["zero_grad", "load_state_dict"])
def test_a_closure_without_an_index_is_called_for_a_gradient_that_is_there_alone(forget):
    """A trainer's own, which runs hooks; with no gradient it would make an ordinary step of ESAM's."""
    model = mlp()
    optimizer = sgd(model)
    calls = []
    optimizer.backward(batch_closure(model, cross_entropy, INPUTS, TARGETS))
    optimizer.step(lambda: calls.append(1))
    assert calls == [1]
    optimizer.backward(batch_closure(model, cross_entropy, INPUTS, TARGETS))
    if forget == "zero_grad":
        optimizer.zero_grad()
    else:
        optimizer.load_state_dict(optimizer.state_dict())
    before = values(model)
    with pytest.raises(ValueError, match=r"gamma = 0\.5 .* closure without an index"):
        optimizer.step(lambda: calls.append(2))
    assert calls == [1]
    assert same(values(model), before)


class Lookup(nn.Module):
    def __init__(self, sparse: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(10, 4, sparse=sparse), nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens)[:, 0])


@pytest.mark.parametrize("beta", [1.0, 1e-9], ids=["drawn", "not drawn"])
def test_sparse_gradients(beta):
    model = Lookup(sparse=True)
    lookup, head = {"params": model.embedding.parameters()}, {"params": model.head.parameters()}
    optimizer = ESAM([head, lookup], torch.optim.SGD, lr=0.1, beta=beta, seed=1)
    closure = batch_closure(model, cross_entropy, torch.arange(8)[:, None], TARGETS)
    refused(model, optimizer, ValueError, r"\[10, 4\].*sparse=False.*rho=0", closure)
    optimizer.param_groups[1]["rho"] = 0.0  # the second of the two fixes
    optimizer.step(closure)
    assert model.embedding.weight.grad.is_sparse


def test_sparse_gradients_in_first_step():
    model = Lookup(sparse=True)
    optimizer = sgd(model, beta=1.0, gamma=1.0)
    before = values(model)
    cross_entropy(model(torch.arange(8)[:, None]), TARGETS).mean().backward()
    with pytest.raises(ValueError, match=r"\[10, 4\].*sparse=False"):
        optimizer.first_step()
    assert same(before, values(model))
    with pytest.raises(RuntimeError, match="first_step"):
        optimizer.restore()


# The two halves of a step.


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gamma": 0.5}, r"gamma = 0\.5.*gamma=1"),
        ({"interval": 2}, "interval = 2.*interval=1"),
        ({"start": 2}, "start = 2.*start=0"),
        ({"ascent": "previous"}, "ascent = 'previous'.*ascent='gradient'"),
        ({"ascent_share": 0.5}, r"ascent_share = 0\.5.*ascent_share=1"),
        ({"steering_dtype": torch.bfloat16}, "steering_dtype.*steering_dtype=None"),
    ],
)
def test_first_step_refuses_what_cannot_apply_to_it(options, words):
    model = mlp()
    optimizer = sgd(model, **{"gamma": 1.0, **options})
    before = values(model)
    cross_entropy(model(INPUTS), TARGETS).mean().backward()
    with pytest.raises(ValueError, match=words):
        optimizer.first_step()
    assert same(before, values(model))
    works(model, optimizer)


@pytest.mark.parametrize("method", ["second_step", "restore"])
def test_nothing_to_restore(method):
    optimizer = sgd(mlp(), gamma=1.0)
    with pytest.raises(RuntimeError, match=r"first_step\(\)"):
        getattr(optimizer, method)()


def test_first_step_twice_or_without_gradients():
    model = mlp()
    optimizer = sgd(model, gamma=1.0)
    start = values(model)
    with pytest.raises(RuntimeError, match=r"no gradients.*loss\.backward\(\)"):
        optimizer.first_step()
    assert same(start, values(model))
    cross_entropy(model(INPUTS), TARGETS).mean().backward()
    optimizer.first_step()
    moved = values(model)
    for again in (optimizer.first_step, lambda: optimizer.step(lambda index: None), optimizer.step):
        with pytest.raises(RuntimeError, match="between first_step"):
            again()
    assert same(moved, values(model))
    optimizer.restore()
    assert same(start, values(model))
    with pytest.raises(RuntimeError, match=r"first_step\(\)"):
        optimizer.restore()
    works(model, optimizer)


def refused(model: nn.Module, optimizer: ESAM, error: type[Exception], words: str, closure: object) -> None:
    """backward(closure) is refused and has changed nothing: weights, buffers, random state, settings, phase."""
    before = values(model), random_state()
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    with pytest.raises(error, match=words):
        optimizer.backward(closure)
    after = values(model), random_state()
    assert same(before[0], after[0])
    assert before[1] == after[1]
    assert repr(groups) == repr([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups])
    assert grads(model) == [None] * len(grads(model))
    optimizer.state_dict()  # no phase is under way


def works(model: nn.Module, optimizer: ESAM) -> None:
    """A good call moves the weights by finite amounts."""
    before = values(model)
    train(model, optimizer, [(INPUTS, TARGETS)])
    after = values(model)
    assert not same(before, after)
    assert all(value.isfinite().all() for value in after)


@pytest.mark.parametrize("part", [slice(None), slice(1, 3)], ids=["whole", "part"])
def test_parameters_that_share_memory(part):
    """The backup of one would hold the perturbed elements of the other."""
    weight = torch.ones(4)
    a, b = nn.Parameter(weight), nn.Parameter(weight[part])
    with pytest.raises(ValueError, match=r"share memory.*one Parameter"):
        ESAM([a, b], torch.optim.SGD, lr=0.1)
    optimizer = ESAM([a], torch.optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match=r"share memory.*one Parameter"):
        optimizer.add_param_group({"params": [b]})
    assert len(optimizer.param_groups) == 1
    ESAM([nn.Parameter(weight[:2]), nn.Parameter(weight[2:])], torch.optim.SGD, lr=0.1)  # neighbours are fine
    ESAM(nn.Linear(2, 2, device="meta").parameters(), torch.optim.SGD, lr=0.1)  # and what has no memory yet


def test_a_base_that_is_wrapped_twice():
    base = torch.optim.SGD(mlp().parameters(), lr=0.1)
    ESAM(None, base, rho=0.2)
    with pytest.raises(ValueError, match="SGD is the base of another ESAM"):
        ESAM(None, base, rho=0.4)
    assert base.param_groups[0]["rho"] == 0.2


def test_a_base_that_has_loaded_a_checkpoint_of_esam_takes_the_new_settings():
    model = mlp()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    base.load_state_dict(sgd(mlp(), rho=0.2, gamma=0.3).state_dict())
    group = ESAM(None, base, rho=0.4).param_groups[0]
    assert (group["rho"], group["gamma"]) == (0.4, 0.5)


def test_zero_grad_in_a_closure():
    """It would lose the gradients of the micro-batches before it."""
    model = mlp()
    optimizer = sgd(model)

    def closure(index):
        optimizer.zero_grad()
        return cross_entropy(model(INPUTS), TARGETS)

    refused(
        model, optimizer, RuntimeError, r"zero_grad\(\) was called during backward.*closure returns losses", closure
    )


class Checkpointed(nn.Module):
    """Reentrant activation checkpointing, in which torch.autograd.grad finds the gradient of no weight inside."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, inputs: Tensor) -> Tensor:
        # As a custom function whose backward runs another backward: torch's own refuses torch.autograd.grad by itself.
        return Reentrant.apply(inputs.requires_grad_(), self.inner)


class Reentrant(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs, module):
        ctx.module = module
        ctx.save_for_backward(inputs)
        return module(inputs)

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            ctx.module(ctx.saved_tensors[0].detach()).backward(grad)
        return None, None


def test_a_first_pass_that_reaches_no_weight():
    model = Checkpointed()
    optimizer = sgd(model)
    before = values(model)
    with pytest.raises(RuntimeError, match=r"none in the first.*use_reentrant=False"):
        optimizer.backward(batch_closure(model, cross_entropy, INPUTS, TARGETS))
    assert same(values(model), before)
    assert grads(model) == [None] * 6


class Sometimes(nn.Module):
    """A network whose reentrant checkpoint can be left out, and that has weights which it never uses."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.unused, self.outer = mlp(), nn.Linear(3, 3), nn.Linear(3, 3)
        self.reentrant = False

    def forward(self, inputs: Tensor) -> Tensor:
        inner = partial(checkpoint, self.inner, use_reentrant=True) if self.reentrant else self.inner
        return self.outer(inner(inputs.requires_grad_()))


def test_reentrant_checkpoints_are_looked_for_in_the_first_step_and_when_another_weight_is_missed(monkeypatch):
    searches = 0
    search = ascend.function_names

    def counting(loss: Tensor) -> tuple[set[str], bool]:
        nonlocal searches
        searches += 1
        return search(loss)

    monkeypatch.setattr(ascend, "function_names", counting)
    model = Sometimes()
    optimizer = sgd(model, beta=0.5)
    closure = batch_closure(model, cross_entropy, INPUTS, TARGETS)
    counts = []
    for _ in range(50):
        optimizer.step(closure)
        counts.append(searches)
    assert counts[0] == 1
    assert counts[-1] <= 3  # two weights are never used
    assert counts[20:] == [counts[-1]] * 30

    model.reentrant = True
    optimizer.param_groups[0]["beta"] = 1.0
    before = values(model)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        optimizer.backward(closure)
    assert same(values(model), before)
    model.reentrant = False
    optimizer.step(closure)


class SkipsBlocks(nn.Module):
    """Stochastic depth: each block is left out at random, by itself."""

    def __init__(self, rate: float, through: bool = False) -> None:
        super().__init__()
        self.rate, self.through = rate, through
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if torch.rand(()) >= self.rate:
                x = x + block(Through.apply(x) if self.through else x).tanh()
        return self.head(x)


class Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad


@pytest.mark.parametrize("options", [{}, {"beta": 0.2}, {"beta": 0.2, "gamma": 1}, {"ascent_share": 0.5}], ids=str)
@pytest.mark.parametrize("through", [False, True])
def test_layers_that_are_left_out_at_random_do_no_harm(options, through):
    torch.manual_seed(0)
    model = SkipsBlocks(0.6, through)
    optimizer = sgd(model, **options)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for seed in range(100):
            torch.manual_seed(seed)
            optimizer.step(batch_closure(model, cross_entropy, INPUTS, TARGETS))
    assert len(said) <= through  # what a function written in Python hides looks the same: said once


def test_groups_that_are_added_by_hand():
    model = mlp()
    optimizer = sgd(model)
    optimizer.param_groups.append({"params": [nn.Parameter(torch.ones(3))], "lr": 0.1})
    with pytest.raises(ValueError, match=r"no 'rho'.*add_param_group\(\)"):
        optimizer.backward(batch_closure(model, cross_entropy, INPUTS, TARGETS))


def test_weights_of_samples_with_a_graph():
    model, gate = mlp(), nn.Linear(1, 1)
    optimizer = ESAM([*model.parameters(), *gate.parameters()], torch.optim.SGD, lr=0.1)
    inputs, targets = batches(1)[0]
    weights = gate(torch.ones(len(inputs), 1))[:, 0]
    with pytest.raises(ValueError, match=r"weights with a graph.*weights\.detach\(\).*losses \* weights"):
        optimizer.backward(lambda index: (cross_entropy(model(inputs), targets), weights))
