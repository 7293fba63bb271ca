"""ESAM takes the place of an optimizer in a script that has everything scripts have, and of SAM in SAM's."""

import copy
import warnings
from functools import partial

import pytest
import torch
from networks import BASES, batches, cross_entropy, grads, mlp, perturbed, same, train, values
from torch import Tensor, nn
from torch.optim import lr_scheduler, swa_utils
from torch.optim.optimizer import register_optimizer_step_post_hook

from esam_kernels import ESAM, batch_closure

DATA = batches(8)
INPUTS, TARGETS = DATA[0]


def optimizer_of(network: nn.Module, base=torch.optim.SGD, **options) -> ESAM:
    return ESAM(network.parameters(), base, **{"lr": 0.1, **options})


def closure_of(model: nn.Module, batch: tuple[Tensor, Tensor] = DATA[0]):
    return batch_closure(model, cross_entropy, *batch)


def plain_step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, targets: Tensor) -> None:
    optimizer.zero_grad()
    cross_entropy(model(inputs), targets).mean().backward()
    optimizer.step()


def step_at_once(model, optimizer, batch):
    optimizer.step(closure_of(model, batch))


def step_in_two(model, optimizer, batch):
    optimizer.backward(closure_of(model, batch))
    optimizer.step()


def step_by_halves(model, optimizer, batch):
    optimizer.zero_grad()
    cross_entropy(model(batch[0]), batch[1]).mean().backward()
    optimizer.first_step(zero_grad=True)
    cross_entropy(model(batch[0]), batch[1]).mean().backward()
    optimizer.second_step(zero_grad=True)


ways = pytest.mark.parametrize("step", [step_at_once, step_in_two, step_by_halves])


def test_step_with_a_closure_is_backward_and_step():
    models = [mlp(nn.BatchNorm1d(8), nn.Dropout()) for _ in range(2)]
    losses = []
    for model, step in zip(models, (step_at_once, step_in_two)):
        optimizer = optimizer_of(model, momentum=0.9)
        torch.manual_seed(0)
        for batch in DATA:
            step(model, optimizer, batch)
        losses.append(optimizer.step(closure_of(model)))
    assert same(values(models[0]), values(models[1]))
    assert same(losses[:1], losses[1:])


# Every base optimizer.

NAMES = "SGD Adam AdamW Adagrad Adamax ASGD NAdam RAdam RMSprop Rprop Adafactor"
# Adadelta's rho has the name of ESAM's: only a ready one can be the base (see test_refusals).
CLASSES = [(name, ready) for name in NAMES.split() for ready in (False, True)] + [("Adadelta", True)]


@pytest.mark.parametrize(("name", "ready"), CLASSES)
def test_any_optimizer_of_torch_can_be_the_base(name, ready):
    kind = getattr(torch.optim, name)
    plain, model = mlp(), mlp()
    base = kind(plain.parameters(), lr=0.01)
    if ready:
        optimizer = ESAM(None, kind(model.parameters(), lr=0.01), rho=0.0)
    else:
        optimizer = ESAM(model.parameters(), kind, lr=0.01, rho=0.0)
    for batch in DATA[:3]:
        plain_step(plain, base, *batch)
        step_at_once(model, optimizer, batch)
    assert same(values(plain), values(model))
    optimizer.param_groups[0]["esam_rho" if name == "Adadelta" else "rho"] = 0.1
    train(model, optimizer, DATA)
    assert not same(values(plain), values(model))
    assert all(value.isfinite().all() for value in values(model))


def test_parameters_may_come_with_names_and_in_groups():
    model, other = mlp(), mlp()
    named = ESAM(model.named_parameters(), torch.optim.SGD, lr=0.1)
    grouped = ESAM(
        [{"params": layer.parameters()} for layer in other if len(list(layer.parameters()))], torch.optim.SGD, lr=0.1
    )
    train(model, named, DATA)
    train(other, grouped, DATA)
    assert same(values(model), values(other))
    assert isinstance(named, torch.optim.Optimizer)
    assert named.param_groups[0]["param_names"][0] == "0.weight"


# What stands around a step.

SCHEDULERS = {
    "StepLR": partial(lr_scheduler.StepLR, step_size=2),
    "LambdaLR": partial(lr_scheduler.LambdaLR, lr_lambda=lambda epoch: 0.9**epoch),
    "CosineAnnealingLR": partial(lr_scheduler.CosineAnnealingLR, T_max=8),
    "CosineAnnealingWarmRestarts": partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=3),
    "OneCycleLR": partial(lr_scheduler.OneCycleLR, max_lr=0.5, total_steps=9),
    "CyclicLR": partial(lr_scheduler.CyclicLR, base_lr=0.01, max_lr=0.1, step_size_up=2),
    "SWALR": partial(swa_utils.SWALR, swa_lr=0.05, anneal_epochs=4),
}


@ways
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_act_as_on_the_base_optimizer_and_do_not_warn(name, step):
    model = mlp()
    esam = optimizer_of(model, momentum=0.9, gamma=1.0)
    base = torch.optim.SGD(mlp().parameters(), lr=0.1, momentum=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedulers = [SCHEDULERS[name](optimizer) for optimizer in (base, esam)]
        for batch in DATA:
            base.step()
            step(model, esam, batch)
            for scheduler in schedulers:
                scheduler.step()
            for key in ("lr", "momentum"):
                assert esam.param_groups[0][key] == base.param_groups[0][key]
    assert schedulers[1].get_last_lr() == [esam.base.param_groups[0]["lr"]]


@ways
def test_step_hooks_fire_once_a_step(step):
    model = mlp()
    optimizer = optimizer_of(model, gamma=1.0)
    calls = []
    everywhere = register_optimizer_step_post_hook(lambda *_: calls.append("any"))
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    removed = optimizer.register_step_post_hook(lambda *_: calls.append("removed"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    removed.remove()
    try:
        for batch in DATA[:3]:
            step(model, optimizer, batch)
    finally:
        everywhere.remove()
    assert sorted(calls) == sorted(["pre", "post", "any"] * 3)


def test_state_dict_hooks_fire_once():
    optimizer = optimizer_of(mlp())
    calls = []
    optimizer.register_state_dict_pre_hook(lambda *_: calls.append("before saving"))
    optimizer.register_state_dict_post_hook(lambda *_: calls.append("saved"))
    optimizer.register_load_state_dict_pre_hook(lambda *_: calls.append("before loading"))
    optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("loaded"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["before saving", "saved", "before loading", "loaded"]


def test_gradients_can_be_clipped_between_backward_and_step():
    model = mlp()
    optimizer = optimizer_of(model)
    optimizer.backward(closure_of(model))
    before = values(model)
    assert nn.utils.clip_grad_norm_(model.parameters(), 0.01) > 0.01
    optimizer.step()
    moved = torch.cat([(a - b).flatten() for a, b in zip(before, values(model))])
    torch.testing.assert_close(moved.norm(), torch.tensor(0.1 * 0.01), rtol=1e-3, atol=0)


def test_hooks_on_parameters_and_modules_act_on_the_gradient():
    plain, hooked = mlp(), mlp()
    for param in hooked.parameters():
        param.register_hook(lambda grad: 2 * grad)
    passes = []
    hooked[2].register_full_backward_hook(lambda *_: passes.append("backward"))
    hooked[2].register_forward_hook(lambda *_: passes.append("forward"))
    optimizer_of(plain).backward(closure_of(plain))
    optimizer_of(hooked).backward(closure_of(hooked))
    for one, two in zip(grads(plain), grads(hooked)):
        torch.testing.assert_close(two, 2 * one)
    assert passes.count("forward") == 3
    assert passes[-1] == "backward"


def test_gradients_from_before_do_not_count():
    fresh, stale = mlp(), mlp()
    cross_entropy(stale(INPUTS), TARGETS).mean().backward()
    for model in (fresh, stale):
        optimizer_of(model).backward(closure_of(model))
    assert same(grads(fresh), grads(stale))


def test_a_moving_average_never_sees_perturbed_weights():
    model = mlp(nn.BatchNorm1d(8))
    optimizer = optimizer_of(model, rho=1.0)
    swa = swa_utils.AveragedModel(model)
    ema = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.5))
    after = []
    for batch in DATA:
        step_at_once(model, optimizer, batch)
        swa.update_parameters(model)
        ema.update_parameters(model)
        after.append([param.detach().clone() for param in model.parameters()])
    for i, (of_swa, of_ema) in enumerate(zip(swa.module.parameters(), ema.module.parameters())):
        torch.testing.assert_close(of_swa, torch.stack([weights[i] for weights in after]).mean(0))
        average = after[0][i]
        for weights in after[1:]:
            average = 0.5 * average + 0.5 * weights[i]
        torch.testing.assert_close(of_ema, average)
    swa_utils.update_bn(DATA, swa)


def test_a_compiled_model_does_not_recompile_as_masks_change():
    torch._dynamo.reset()
    model, plain = mlp(), mlp()
    compiled = torch.compile(model, backend="eager")
    optimizer, other = optimizer_of(model, beta=0.5), optimizer_of(plain, beta=0.5)
    for batch in DATA[:3]:
        step_at_once(compiled, optimizer, batch)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in DATA[3:]:
            step_at_once(compiled, optimizer, batch)
    train(plain, other, DATA)
    for mine, theirs in zip(values(model), values(plain)):
        torch.testing.assert_close(mine, theirs)
    torch._dynamo.reset()


# Parameters of every standing.


@pytest.mark.parametrize("rho", [0.4, 0.0])
@pytest.mark.parametrize("later", [False, True], ids=["at construction", "added"])
def test_each_group_has_its_own_rho_within_one_norm(rho, later):
    model = mlp()
    first, second = {"params": list(model[0].parameters())}, {"params": list(model[2:].parameters()), "rho": rho}
    options = {"lr": 0.1, "beta": 1.0, "gamma": 1.0, "rho": 0.1}
    if later:
        optimizer = ESAM([first], torch.optim.SGD, **options)
        optimizer.add_param_group(second)
    else:
        optimizer = ESAM([first, second], torch.optim.SGD, **options)
    w = [param.detach().clone() for param in model.parameters()]
    g = torch.autograd.grad(cross_entropy(model(INPUTS), TARGETS).mean(), list(model.parameters()))
    seen = []

    def closure(index):
        seen.append([param.detach().clone() for param in model.parameters()])
        return closure_of(model)(index)

    optimizer.backward(closure)
    counted = g if rho > 0 else g[:2]
    norm = torch.cat([x.flatten() for x in counted]).norm()
    for i, there in enumerate(seen[1]):
        torch.testing.assert_close(there - w[i], (0.1 if i < 2 else rho) * g[i] / norm, atol=1e-6, rtol=1e-4)


def test_parameters_can_be_frozen_and_thawed_in_the_middle():
    model = mlp()
    model[0].requires_grad_(False)
    optimizer = optimizer_of(model, momentum=0.9)
    frozen = values(model[0])
    train(model, optimizer, DATA)
    assert same(frozen, values(model[0]))
    assert grads(model[0]) == [None, None]
    model[0].requires_grad_(True)
    model[4].requires_grad_(False)
    last = values(model[4])
    train(model, optimizer, DATA)
    assert not same(frozen, values(model[0]))
    assert same(last, values(model[4]))  # also no momentum, since there is no gradient
    assert grads(model[4]) == [None, None]


@pytest.mark.parametrize("beta", [1.0, 1e-9])
def test_parameters_that_the_loss_does_not_use_stay(beta):
    model = mlp()
    unused = nn.Linear(3, 3)
    params = [*unused.parameters(), *model.parameters()]
    for seed in range(8):  # with beta so small one tensor is drawn, now and then one of the unused
        optimizer = ESAM(params, torch.optim.SGD, lr=0.1, beta=beta, seed=seed, rho=0.01)
        before, standing = values(model), values(unused)
        train(model, optimizer, DATA[:2])
        assert same(standing, values(unused))
        assert grads(unused) == [None, None]
        assert not same(before, values(model))
        assert all(value.isfinite().all() for value in values(model))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.decoder = nn.Linear(4, 4), nn.Linear(4, 4)
        self.decoder.weight = self.encoder.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(torch.tanh(self.encoder(x)))


def test_tied_weights_are_perturbed_once():
    model = Tied()
    there = perturbed(model, lambda network: cross_entropy(network(INPUTS), TARGETS).mean(), rho=0.5)
    cross_entropy(there(INPUTS), TARGETS).mean().backward()
    optimizer_of(model, beta=1.0, gamma=1.0, rho=0.5).backward(closure_of(model))
    for mine, theirs in zip(grads(model), grads(there)):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("options", [{}, {"granularity": "element"}, {"rho": 0.0}, {"adaptive": True}], ids=str)
def test_layers_that_the_first_forward_initializes(options):
    """They are perturbed from the second step on."""
    model = nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.LazyLinear(3))
    optimizer = optimizer_of(model, **options)
    optimizer.add_param_group({"params": nn.LazyLinear(3).parameters()})  # never used
    torch.manual_seed(0)
    twin = copy.deepcopy(model)
    twin(INPUTS)
    torch.manual_seed(0)
    optimizer.step(closure_of(model))
    plain_step(twin, torch.optim.SGD(twin.parameters(), lr=0.1), *DATA[0])
    assert same(values(model), values(twin))  # nothing could be perturbed
    other = optimizer_of(twin, **options)
    other.param_groups[0]["esam_step"] = 1
    mixed = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.LazyLinear(3))
    train(mixed, optimizer_of(mixed, **options), DATA)
    assert all(value.isfinite().all() for value in values(mixed))
    train(model, optimizer, DATA)
    train(twin, other, DATA)
    assert same(values(model), values(twin))


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_lazy_parameters_are_compared_before_they_have_a_shape():
    optimizer = optimizer_of(nn.LazyLinear(8))
    with pytest.raises(ValueError, match="a parameter that is not initialized is 2 times"):
        optimizer.add_param_group({"params": [*nn.LazyLinear(3).parameters()] * 2})


# Losses.


@pytest.mark.parametrize("options", [{}, {"gamma": 1.0}, {"selection": "random"}, {"rho": 0.0}], ids=str)
@pytest.mark.parametrize("sizes", [[8], [2, 5, 1]], ids=str)
def test_the_loss_that_is_returned_is_the_mean_at_w(options, sizes):
    model = mlp()
    expected = cross_entropy(model(INPUTS), TARGETS).mean()
    pieces = zip(INPUTS.split(sizes), TARGETS.split(sizes))
    loss = optimizer_of(model, **options).step([closure_of(model, piece) for piece in pieces])
    assert loss.shape == ()
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected.detach())


@pytest.mark.parametrize("sizes", [[8], [2, 5, 1]], ids=str)
@pytest.mark.parametrize("beta", [1.0, None], ids=["sharpness-aware", "plain"])
def test_weights_of_losses_give_the_mean_over_tokens(sizes, beta):
    """A sequence's loss is its mean over tokens, its weight their number."""
    model = mlp()
    tokens = torch.randn(8, 5, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(3, (8, 5), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([5, 1, 3, 2, 5, 4, 1, 2])
    there = torch.arange(5) < lengths[:, None]

    def over_tokens(network):
        return cross_entropy(network(tokens[there]), labels[there]).mean()

    def per_sequence(outputs, targets):
        y, kept = targets
        losses = cross_entropy(outputs.transpose(1, 2), y) * kept
        return losses.sum(1) / kept.sum(1), kept.sum(1)

    rho = 0.5 if beta else 0.0
    moved = perturbed(model, over_tokens, rho)
    expected = over_tokens(model).detach()
    over_tokens(moved).backward()
    pieces = zip(tokens.split(sizes), labels.split(sizes), there.split(sizes))
    closures = [batch_closure(model, per_sequence, x, (y, kept)) for x, y, kept in pieces]
    loss = optimizer_of(model, rho=rho, beta=1.0, gamma=1.0).backward(closures)
    torch.testing.assert_close(loss, expected)
    for mine, theirs in zip(grads(model), grads(moved)):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4)


def test_a_closure_by_hand_may_have_any_attributes():
    model, plain = mlp(), mlp()

    def closure(index):
        return closure_of(model)(index)

    closure.model = "resnet18"
    optimizer_of(model).backward(closure)
    optimizer_of(plain).backward(closure_of(plain))
    assert same(grads(model), grads(plain))


def test_interval_makes_every_so_manieth_step_an_esam_step():
    model = mlp()
    optimizer = optimizer_of(model, interval=3)
    calls = []
    for batch in DATA[:7]:
        plain = copy.deepcopy(model)
        cross_entropy(plain(batch[0]), batch[1]).mean().backward()
        count = 0

        def closure(index, batch=batch):
            nonlocal count
            count += 1
            return closure_of(model, batch)(index)

        optimizer.step(closure)
        calls.append(count)
        assert same(grads(plain), grads(model)) == (count == 1)
    assert calls == [3, 1, 1, 3, 1, 1, 3]


# The loss scaler of mixed precision.


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("options", [{}, {"gamma": 1.0}, {"rho": 0.0}], ids=str)
def test_a_grad_scaler_changes_nothing(base, fused, clip, options):
    models = [mlp(), mlp()]
    for model, scaler in zip(models, (torch.amp.GradScaler("cpu", enabled=False), torch.amp.GradScaler("cpu"))):
        optimizer = optimizer_of(model, base, lr=0.01, fused=fused, **options)
        for batch in DATA:
            loss = optimizer.backward(closure_of(model, batch), scaler)
            assert loss < 10  # not the scaled one
            if clip:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
        assert not hasattr(optimizer, "found_inf")
    for mine, theirs in zip(values(models[1]), values(models[0])):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("bad", [[1], [3], [1, 2, 3]], ids=str)
@pytest.mark.parametrize("count", [1, 2])
def test_an_overflow_in_any_pass_backs_off_and_skips_the_step(fused, bad, count):
    model = mlp()
    optimizer = optimizer_of(model, fused=fused)  # fused momentum is never initialized if the first step is skipped
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    calls = 0

    def closure(index):
        nonlocal calls
        calls += 1
        return closure_of(model)(index) * (float("inf") if -(-calls // count) in bad else 1.0)

    before = values(model)
    optimizer.backward([closure] * count, scaler)
    scaler.step(optimizer)
    scaler.update()
    assert same(before, values(model))
    assert scaler.get_scale() == 512.0
    calls = 100  # no pass is spoiled now
    optimizer.backward([closure] * count, scaler)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 512.0
    assert not same(before, values(model))
    assert all(value.isfinite().all() for value in values(model))


def test_without_a_scaler_an_overflow_in_pass_1_perturbs_nothing():
    model, plain = mlp(), mlp()
    calls = 0

    def closure(index):
        nonlocal calls
        calls += 1
        return closure_of(model)(index) * (float("inf") if calls == 1 else 1.0)

    optimizer_of(model, gamma=1.0).backward(closure)
    cross_entropy(plain(INPUTS), TARGETS).mean().backward()
    assert same(grads(model), grads(plain))


# The two halves of a step, as in SAM.


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("zero_grad", [False, True])
def test_first_and_second_step_are_those_of_sam(base, adaptive, zero_grad):
    sam = pytest.importorskip("pytorch_optimizer").SAM
    kind, options = BASES[base]
    sides = []
    for make in (sam, partial(ESAM, beta=1.0, gamma=1.0)):
        model = mlp(dtype=torch.float64)
        optimizer = make(model.parameters(), kind, rho=0.3, adaptive=adaptive, **options)
        for inputs, targets in batches(10, dtype=torch.float64):
            optimizer.zero_grad()
            cross_entropy(model(inputs), targets).mean().backward()
            optimizer.first_step(zero_grad=zero_grad)
            assert (next(model.parameters()).grad is None) == zero_grad
            optimizer.zero_grad()
            cross_entropy(model(inputs), targets).mean().backward()
            optimizer.second_step(zero_grad=zero_grad)
            assert (next(model.parameters()).grad is None) == zero_grad
        sides.append(values(model))
    for theirs, mine in zip(*sides):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-8)  # SAM takes its norm in float32


def test_restore_puts_the_weights_back_and_takes_no_step():
    model = mlp()
    optimizer = optimizer_of(model, gamma=1.0, rho=1.0)
    before = values(model)
    cross_entropy(model(INPUTS), TARGETS).mean().backward()
    optimizer.first_step()
    assert not same(before, values(model))
    optimizer.restore()
    assert same(before, values(model))


def test_every_first_step_draws_anew_whether_a_step_followed_the_last_or_not():
    def drawn(*actions: str) -> list[list[bool]]:
        model = mlp()
        optimizer = optimizer_of(model, gamma=1.0, beta=0.5, lr=0.0)
        found = []
        for action in actions:
            before = values(model)
            cross_entropy(model(INPUTS), TARGETS).mean().backward()
            optimizer.first_step()
            found.append([not torch.equal(a, b) for a, b in zip(before, values(model))])
            getattr(optimizer, action)()
            optimizer.zero_grad()
        assert optimizer.param_groups[0]["esam_step"] == len(actions)
        return found

    masks = drawn(*["restore"] * 6)
    assert len(set(map(tuple, masks))) > 3
    assert drawn(*["restore", "second_step"] * 3) == masks  # as second_step counts, and as backward does


@pytest.mark.parametrize("granularity", ["tensor", "element"])
def test_first_step_perturbs_what_backward_would(granularity):
    model = mlp()
    optimizer = optimizer_of(model, gamma=1.0, rho=1.0, granularity=granularity, beta=0.5)
    cross_entropy(model(INPUTS), TARGETS).mean().backward()
    optimizer.first_step()
    halves = values(model)
    optimizer.restore()
    optimizer.param_groups[0]["esam_step"] = 0  # the same draw again
    whole = []

    def closure(index):
        whole.append(values(model))
        return closure_of(model)(index)

    optimizer.backward(closure)
    for mine, theirs in zip(halves, whole[1]):
        torch.testing.assert_close(mine, theirs)
    moved = torch.cat([(a != b).flatten() for a, b in zip(whole[0], whole[1])])
    assert 0 < moved.sum() < moved.numel()
