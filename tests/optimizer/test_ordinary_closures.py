"""step(closure) with torch.optim's closure is SAM wherever gamma is 1, and looks after what backward() does."""

import copy
import gc
import pickle
import warnings
from functools import partial

import pytest
import torch
from networks import BASES, batches, grads, mlp, perturbed, random_state, same, values
from torch import nn
from torch.nn.functional import cross_entropy, dropout

from esam_kernels import ESAM, batch_closure, current_pass, first_pass

each = nn.CrossEntropyLoss(reduction="none")
BATCHES = batches(4, dtype=torch.float64)


def ordinary(model, optimizer, inputs, targets, calls=None):
    def closure():
        optimizer.zero_grad()
        loss = cross_entropy(model(inputs), targets)
        loss.backward()
        if calls is not None:
            calls.append(loss)
        return loss

    return closure


def esam(model, base="sgd", **options):
    kind, base_options = BASES[base]
    return ESAM(model.parameters(), kind, **{"rho": 0.5, "beta": 1, "gamma": 1} | base_options | options)


@pytest.mark.parametrize("base", BASES)
def test_it_is_sam_by_hand(base):
    model = mlp(nn.BatchNorm1d(8), dtype=torch.float64)
    other = copy.deepcopy(model)
    optimizer = esam(model, base)
    kind, base_options = BASES[base]
    by_hand = kind(other.parameters(), **base_options)
    for inputs, targets in BATCHES:
        loss = optimizer.step(ordinary(model, optimizer, inputs, targets))
        moved = perturbed(copy.deepcopy(other), lambda network, x=inputs, y=targets: cross_entropy(network(x), y), 0.5)
        first = cross_entropy(other(inputs), targets)  # whose statistics stay
        cross_entropy(moved(inputs), targets).backward()
        for param, twin in zip(other.parameters(), moved.parameters()):
            param.grad = twin.grad
        by_hand.step()
        torch.testing.assert_close(loss, first)
        for mine, theirs in zip(values(model), values(other)):
            torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"adaptive": True},
        {"granularity": "element", "beta": 0.4},
        {"ascent": "momentum"},
        {"ascent": "previous"},
        {"start": 1, "interval": 2},
        {"rho": 0.0},
        {"rho": 0.0, "gamma": 0.5},
    ],
    ids=str,
)
def test_it_is_what_backward_of_the_batch_is(options):
    model = mlp(nn.BatchNorm1d(8), nn.Dropout(0.3), dtype=torch.float64)
    other = copy.deepcopy(model)
    mine, theirs = esam(model, **options), esam(other, **options)
    for i, (inputs, targets) in enumerate(BATCHES):
        torch.manual_seed(i)
        loss = mine.step(ordinary(model, mine, inputs, targets))
        drawn = random_state()
        torch.manual_seed(i)
        expected = theirs.step(batch_closure(other, each, inputs, targets))
        torch.testing.assert_close(loss.detach(), expected)
        assert random_state() == drawn
        for a, b in zip(values(model), values(other)):
            torch.testing.assert_close(a, b)
    assert mine.param_groups[0]["esam_step"] == len(BATCHES)


def test_beta_masks_the_complete_gradient_by_tensors():
    model, other = mlp(dtype=torch.float64), mlp(dtype=torch.float64)
    mine, theirs = esam(model, beta=0.5), esam(other, beta=0.5)
    for inputs, targets in BATCHES:
        mine.step(ordinary(model, mine, inputs, targets))
        theirs.step(batch_closure(other, cross_entropy, inputs, targets))
        for a, b in zip(values(model), values(other)):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, 2), ({"ascent": "momentum"}, 1), ({"ascent": "previous"}, 1), ({"start": 1}, 1), ({"rho": 0.0}, 1)],
    ids=str,
)
def test_how_often_it_is_called_and_what_is_returned(options, expected):
    model, calls = mlp(), []
    optimizer = esam(model, **options)
    returned = optimizer.step(ordinary(model, optimizer, *batches(1)[0], calls))
    assert len(calls) == expected
    assert torch.equal(returned, calls[0])  # of the first call, which may be a copy


@pytest.mark.parametrize("result", [None, 0.5, {"loss": torch.ones(()), "extra": 1}, "text"])
def test_whatever_the_closure_returns_is_returned(result):
    model = mlp()
    optimizer = esam(model)
    closure = ordinary(model, optimizer, *batches(1)[0])
    assert optimizer.step(lambda: (closure(), result)[1]) is result


def test_a_variable_bound_by_a_default_is_no_index():
    model = mlp()
    optimizer = esam(model)
    before = values(model)
    for inputs, targets in batches(2):
        optimizer.step(lambda x=inputs, y=targets: ordinary(model, optimizer, x, y)())
    assert not same(values(model), before)
    before = values(model)
    inputs, targets = batches(1)[0]
    optimizer.step(lambda index=None: cross_entropy(model(inputs), targets, reduction="none"))
    assert not same(values(model), before)


@pytest.mark.parametrize("options", [{"gamma": 0.5}, {"ascent_share": 0.5}, {"gamma": 0.5, "ascent": "momentum"}])
def test_a_share_of_the_rows_is_refused_before_anything_is_changed(options):
    model, calls = mlp(), []
    optimizer = esam(model, **options)
    with pytest.raises(ValueError, match=r"(gamma|ascent_share) = 0\.5 .*(gamma|ascent_share)=1.*batch_closure"):
        optimizer.step(ordinary(model, optimizer, *batches(1)[0], calls))
    assert not calls


@pytest.mark.parametrize("options", [{}, {"ascent": "previous"}, {"rho": 0.0}], ids=str)
@pytest.mark.parametrize("grads_before", [False, True])
def test_a_closure_that_makes_no_gradient_is_refused(options, grads_before):
    model = mlp()
    optimizer = esam(model, **options)
    inputs, targets = batches(1)[0]
    if grads_before:
        cross_entropy(model(inputs), targets).backward()
    before = values(model)
    with pytest.raises(RuntimeError, match=r"made no gradient.*loss\.backward\(\)"):
        optimizer.step(lambda: cross_entropy(model(inputs), targets))
    assert same(values(model), before)


CLEARS = {
    "optimizer.zero_grad": lambda model, optimizer: optimizer.zero_grad(),
    "optimizer.zero_grad in place": lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
    "model.zero_grad": lambda model, optimizer: model.zero_grad(),
    "model.zero_grad in place": lambda model, optimizer: model.zero_grad(set_to_none=False),
}


@pytest.mark.parametrize("clear", CLEARS)
def test_gradients_that_the_closure_clears_do_not_count(clear):
    inputs, targets = batches(1)[0]
    found = []
    for stale in (False, True):
        model = mlp()
        optimizer = esam(model)
        if stale:
            cross_entropy(model(-inputs), targets).backward()

        def closure(model=model, optimizer=optimizer):
            CLEARS[clear](model, optimizer)
            loss = cross_entropy(model(inputs), targets)
            loss.backward()
            return loss

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.step(closure)
        found.append(values(model))
    assert same(*found)


def test_gradients_that_the_closure_does_not_clear_are_added_as_under_any_optimizer():
    (first, y1), (second, y2) = batches(2, dtype=torch.float64)
    model = mlp(dtype=torch.float64)
    moved = perturbed(model, lambda network: cross_entropy(network(second), y2), 0.5)
    cross_entropy(model(first), y1).backward()
    expected = [param.grad.clone() for param in model.parameters()]
    cross_entropy(moved(second), y2).backward()
    for grad, param in zip(expected, moved.parameters()):
        grad += param.grad
    optimizer = esam(model)

    def closure():
        loss = cross_entropy(model(second), y2)
        loss.backward()
        return loss

    with pytest.warns(UserWarning, match=r"adds to gradients from before the step.*optimizer\.zero_grad\(\)"):
        optimizer.step(closure)
    for mine, theirs in zip(grads(model), expected):
        torch.testing.assert_close(mine, theirs)


def test_micro_batches_inside_the_closure_are_one_batch():
    model, other = mlp(dtype=torch.float64), mlp(dtype=torch.float64)
    mine, theirs = esam(model), esam(other)
    for inputs, targets in BATCHES:

        def closure(inputs=inputs, targets=targets):
            mine.zero_grad()
            for x, y in zip(inputs.chunk(4), targets.chunk(4)):
                (cross_entropy(model(x), y) / 4).backward()

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            mine.step(closure)
        theirs.step(ordinary(other, theirs, inputs, targets))
    for a, b in zip(values(model), values(other)):
        torch.testing.assert_close(a, b)


def test_modules_are_found_without_a_name_and_are_not_kept_alive():
    """Batch norm's statistics are those of one pass, also of a model that the closure reaches in ways of its own."""
    holder = {"model": mlp(nn.BatchNorm1d(8, affine=False))}
    optimizer = esam(holder["model"])
    for count, (inputs, targets) in enumerate(batches(3), start=1):
        optimizer.step(lambda x=inputs, y=targets: ordinary(holder["model"], optimizer, x, y)())
        assert holder["model"][1].num_batches_tracked == count
    copied = pickle.loads(pickle.dumps(optimizer))
    assert not any(isinstance(one, nn.Module) for one in vars(copied).values())
    found = len(optimizer._progress.models._roots)
    assert found == 1
    reference = optimizer._progress.models._roots[0]
    holder.clear()
    gc.collect()
    assert reference() is None


def test_modules_that_are_hidden_from_the_search_are_asked_for():
    model = mlp(nn.BatchNorm1d(8))
    optimizer, given = esam(model), ESAM(model.parameters(), torch.optim.SGD, lr=0.1, beta=1, gamma=1, model=model)
    inputs, targets = batches(1)[0]
    gc.freeze()
    try:
        with pytest.warns(UserWarning, match=r"gc\.freeze\(\).*ESAM\(\.\.\., model=model\)") as said:
            optimizer.step(ordinary(model, optimizer, inputs, targets))
        assert len(said) == 1
        count = int(model[1].num_batches_tracked)
        given.step(ordinary(model, given, inputs, targets))
    finally:
        gc.unfreeze()
    assert model[1].num_batches_tracked == count + 1


def test_the_given_model_is_the_one_that_is_looked_after():
    model, other = mlp(nn.BatchNorm1d(8)), nn.BatchNorm1d(4)
    whole = nn.Sequential(other, model)
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, beta=1, gamma=1, model=whole)
    optimizer.step(ordinary(whole, optimizer, *batches(1)[0]))
    assert other.num_batches_tracked == model[1].num_batches_tracked == 1


@pytest.mark.parametrize("call", [0, 1])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_in_a_call_leaves_all_as_it_was(call, error):
    model = mlp(nn.BatchNorm1d(8), nn.Dropout(0.2))
    optimizer = esam(model)
    closure = ordinary(model, optimizer, *batches(1)[0])
    optimizer.step(closure)
    before, state, random_before = values(model), copy.deepcopy(optimizer.state_dict()), random_state()
    left = [call]

    def failing():
        result = closure()
        if not left[0]:
            raise error
        left[0] -= 1
        return result

    with pytest.raises(error):
        optimizer.step(failing)
    assert same(values(model), before)
    assert random_state() == random_before
    assert all(grad is None for grad in grads(model))
    assert current_pass() is None
    assert optimizer.state_dict()["param_groups"] == state["param_groups"]
    twin = mlp(nn.BatchNorm1d(8), nn.Dropout(0.2))
    twin.load_state_dict(model.state_dict())
    again = esam(twin)
    again.load_state_dict(state)
    torch.manual_seed(1)
    optimizer.step(closure)
    after = values(model)
    torch.manual_seed(1)
    again.step(ordinary(twin, again, *batches(1)[0]))
    assert same(after, values(twin))


def test_the_closure_may_not_step_or_save():
    model = mlp()
    optimizer = esam(model)
    closure = ordinary(model, optimizer, *batches(1)[0])
    for action in (optimizer.step, optimizer.state_dict, lambda: optimizer.step(closure)):
        with pytest.raises(RuntimeError, match=r"was called during step\(\)"):
            optimizer.step(lambda action=action: (closure(), action()))


def test_passes_have_names():
    model, names = mlp(), []
    optimizer = esam(model)
    closure = ordinary(model, optimizer, *batches(1)[0])
    optimizer.step(lambda: (names.append((first_pass(), current_pass())), closure()))
    assert names == [("ascend", "ascend"), ("ascend", "descend")]


def test_the_outer_autocast_does_not_hide_the_perturbation():
    inputs, targets = batches(1)[0]
    found = []
    for outer in (False, True):
        model = mlp()
        optimizer = esam(model, rho=2.0)

        def closure(model=model, optimizer=optimizer, outer=outer):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=not outer):
                loss = cross_entropy(model(inputs), targets)
            loss.backward()
            return loss

        if outer:
            with torch.autocast("cpu", torch.bfloat16):
                optimizer.step(ordinary(model, optimizer, inputs, targets))
        else:
            optimizer.step(closure)
        found.append(values(model))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-2)


@pytest.mark.filterwarnings("ignore:steering_dtype")
def test_only_the_first_call_is_steered_in_low_precision():
    model, dtypes = mlp(), []
    optimizer = esam(model, steering_dtype=torch.bfloat16)
    inputs, targets = batches(1)[0]

    def closure():
        optimizer.zero_grad()
        outputs = model(inputs)
        dtypes.append(outputs.dtype)
        cross_entropy(outputs, targets).backward()

    optimizer.step(closure)
    assert dtypes == [torch.bfloat16, torch.float32]


def test_dropout_draws_anew_in_the_second_call():
    """As in backward(): the passes need no common random numbers where nothing is selected."""
    model, masks = mlp(), []
    optimizer = esam(model)
    closure = ordinary(model, optimizer, *batches(1)[0])
    optimizer.step(lambda: (masks.append(dropout(torch.ones(64), 0.5)), closure()))
    assert not torch.equal(*masks)


def test_under_no_grad_the_closure_has_gradients():
    """As torch.optim calls it."""
    models = [mlp(), mlp()]
    for model, enabled in zip(models, (True, False)):
        optimizer = esam(model)
        torch.set_grad_enabled(enabled)
        try:
            optimizer.step(ordinary(model, optimizer, *batches(1)[0]))
            assert torch.is_grad_enabled() is enabled
        finally:
            torch.set_grad_enabled(True)
    assert same(values(models[0]), values(models[1]))


def test_after_backward_a_closure_is_only_called():
    model, calls = mlp(), []
    optimizer = esam(model)
    optimizer.backward(batch_closure(model, each, *batches(1)[0]))
    expected = grads(model)
    optimizer.step(lambda: calls.append(1))
    assert calls == [1]
    assert same(grads(model), expected)


@pytest.mark.parametrize("positional", [False, True])
def test_a_grad_scaler_gives_no_closure(positional):
    model = mlp()
    optimizer = esam(model)
    scaler = torch.amp.GradScaler("cpu")
    closure = ordinary(model, optimizer, *batches(1)[0])
    inputs, targets = batches(1)[0]
    scaler.scale(cross_entropy(model(inputs), targets)).backward()
    with pytest.raises(RuntimeError, match=r"backward\(closure, grad_scaler\)|not currently supported"):
        scaler.step(optimizer, closure) if positional else scaler.step(optimizer, closure=closure)
    disabled = torch.amp.GradScaler("cpu", enabled=False)
    assert disabled.step(optimizer, closure) is not None


def test_it_is_pytorch_optimizer_sam():
    pytorch_optimizer = pytest.importorskip("pytorch_optimizer")
    model, other = mlp(dtype=torch.float64), mlp(dtype=torch.float64)
    optimizer = esam(model, rho=0.05)
    theirs = pytorch_optimizer.SAM(other.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9)
    for inputs, targets in BATCHES:
        optimizer.step(ordinary(model, optimizer, inputs, targets))
        loss = cross_entropy(other(inputs), targets)
        loss.backward()
        theirs.step(lambda x=inputs, y=targets: cross_entropy(other(x), y).backward())
        theirs.zero_grad()
    for a, b in zip(values(model), values(other)):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-7)


def test_after_a_base_step_that_failed_the_next_step_is_sharp_again():
    model, calls = mlp(), []
    optimizer = esam(model)
    closure = ordinary(model, optimizer, *batches(1)[0], calls)
    handle = optimizer.register_step_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        optimizer.step(closure)
    handle.remove()
    optimizer.step(closure)
    assert len(calls) == 4


@pytest.mark.parametrize("before", [False, True])
def test_weights_of_another_optimizer_get_the_gradient_of_the_last_call(before):
    model, twin = mlp(), mlp()
    optimizer = ESAM(model[0].parameters(), torch.optim.SGD, lr=0.1, rho=0.5, beta=1, gamma=1)
    inputs, targets = batches(1)[0]
    if before:
        cross_entropy(model[2](torch.ones(2, 8)), targets[:2]).backward()
        had = model[2].weight.grad.clone()
    optimizer.step(ordinary(model, optimizer, inputs, targets))
    ascent = torch.autograd.grad(cross_entropy(twin(inputs), targets), list(twin[0].parameters()))
    norm = torch.stack([one.norm() for one in ascent]).norm()
    with torch.no_grad():
        for param, one in zip(twin[0].parameters(), ascent):
            param += 0.5 * one / norm
    cross_entropy(twin(inputs), targets).backward()
    expected = twin[2].weight.grad + (had if before else 0)
    torch.testing.assert_close(model[2].weight.grad, expected)


def test_a_step_whose_closure_leaves_out_its_backward_does_nothing_once_one_has_been_made():
    """As where a loss that is not finite is skipped."""
    model, other = mlp(), mlp()
    mine, theirs = esam(model), torch.optim.SGD(other.parameters(), lr=0.1)

    def closure(optimizer, network, inputs, targets):
        optimizer.zero_grad()
        loss = cross_entropy(network(inputs), targets)
        if loss.isfinite():
            loss.backward()
        return loss

    inputs, targets = batches(1)[0]
    mine.step(partial(closure, mine, model, inputs, targets))
    other.load_state_dict(model.state_dict())
    before = values(model)
    nothing = torch.full_like(inputs, torch.nan)
    assert mine.step(partial(closure, mine, model, nothing, targets)).isnan()
    theirs.step(partial(closure, theirs, other, nothing, targets))
    assert same(values(model), before)
    assert same(values(other), before)
    mine.step(partial(closure, mine, model, inputs, targets))
    assert not same(values(model), before)


@pytest.mark.parametrize("named_by", ["cell", "default", "partial", "tuple"])
def test_a_batch_that_the_closure_writes_is_named(named_by):
    model = mlp()
    optimizer = esam(model)
    inputs, targets = batches(1)[0]

    def work(images, labels):
        optimizer.zero_grad()
        loss = cross_entropy(model(images.div_(255)), labels)
        loss.backward()
        return loss

    batch = (inputs, targets)
    closures = {
        "cell": lambda: work(inputs, targets),
        "default": lambda inputs=inputs: work(inputs, targets),
        "partial": partial(work, inputs, targets),
        "tuple": lambda: work(*batch),
    }
    held = [param.detach() for param in model.parameters()]  # which the perturbation writes, and no closure
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(lambda: ordinary(model, optimizer, inputs.clone(), targets)() + 0 * held[0].sum())
    with pytest.warns(UserWarning, match=r"writes into \w+ in place, and is called twice in a step.*copy") as said:
        optimizer.step(closures[named_by])
    assert said[0].filename == __file__
    assert len(said) == 1


def test_modules_that_only_the_closure_names_are_looked_after():
    model = mlp()
    optimizer = esam(model)
    inputs, targets = batches(1)[0]
    optimizer.step(ordinary(model, optimizer, inputs, targets))
    later, target = nn.Sequential(model, nn.BatchNorm1d(3, affine=False)), nn.BatchNorm1d(4, affine=False)

    def closure():
        optimizer.zero_grad()
        loss = cross_entropy(later(target(inputs)), targets)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert later[1].num_batches_tracked == target.num_batches_tracked == 1


def test_modules_elsewhere_that_refuse_to_be_asked_do_no_harm():
    class Remote(nn.Module):
        def parameters(self, recurse=True):
            raise ValueError("not supported on a remote module")

    class Numbers(nn.Module):
        parameters = {"a": 1}  # noqa: RUF012

    others = Remote(), Numbers()
    model = mlp(nn.BatchNorm1d(8))
    optimizer = esam(model)
    optimizer.step(ordinary(model, optimizer, *batches(1)[0]))
    assert model[1].num_batches_tracked == 1
    del others


@pytest.mark.parametrize("ascent", ["gradient", "momentum", "previous"])
def test_gradients_with_a_graph(ascent):
    """As of ``backward(create_graph=True)``, for a penalty on their norm."""
    model, other = mlp(), mlp()
    options = {"momentum": 0.9, "ascent": ascent, "gamma": 1, "beta": 1}
    mine, theirs = (ESAM(net.parameters(), torch.optim.SGD, lr=0.1, **options) for net in (model, other))
    for inputs, targets in batches(3):

        def closure(graph, net, optimizer, inputs=inputs, targets=targets):
            optimizer.zero_grad()
            loss = cross_entropy(net(inputs), targets)
            loss.backward(create_graph=graph)
            return loss.detach()

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Using backward")
            mine.step(partial(closure, True, model, mine))
        theirs.step(partial(closure, False, other, theirs))
    assert same(values(model), values(other))


def test_a_first_loss_that_is_not_finite_may_be_skipped():
    model = mlp(dtype=torch.float64)
    optimizer, before = esam(model), copy.deepcopy(values(model))

    def closure():
        optimizer.zero_grad()
        loss = model(BATCHES[0][0] * torch.nan).square().mean()
        if loss.isfinite():
            loss.backward()
        return loss

    optimizer.step(closure)
    assert same(values(model), before)


def wrapped(function):
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


def counted(function):
    def wrapper(*args):
        wrapper.calls += 1
        return function(*args)

    wrapper.calls = 0
    return wrapper


@pytest.mark.parametrize("decorate", [wrapped, counted])
def test_a_closure_that_is_decorated(decorate):
    model, other = mlp(dtype=torch.float64), mlp(dtype=torch.float64)
    optimizer, by_hand = esam(model), esam(other)
    optimizer.step(decorate(ordinary(model, optimizer, *BATCHES[0])))
    by_hand.step(ordinary(other, by_hand, *BATCHES[0]))
    assert same(values(model), values(other))
    optimizer.step(decorate(batch_closure(model, each, *BATCHES[0]).__call__))  # this one takes an index
    by_hand.step(batch_closure(other, each, *BATCHES[0]))
    assert same(values(model), values(other))


@pytest.mark.parametrize("retain", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
def test_a_loss_from_outside_of_the_closure_is_refused(layers, retain):
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(layers)))
    optimizer, before = esam(model), copy.deepcopy(values(model))
    loss = model(torch.ones(2, 3)).square().mean()

    def closure():
        optimizer.zero_grad()
        loss.backward(retain_graph=retain)
        return loss

    with pytest.raises(RuntimeError) as raised:
        optimizer.step(closure)
    said = [str(raised.value), *getattr(raised.value, "__notes__", ())]
    if hasattr(raised.value, "add_note"):  # from Python 3.11 on
        assert any("compute the loss inside the closure" in text for text in said)
    assert same(values(model), before)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("what", ["zeros from before", "a flat buffer of gradients", "a trained image"])
def test_what_is_looked_after_or_does_no_harm_is_not_warned_of(what):
    model = mlp(dtype=torch.float64)
    params = list(model.parameters())
    inputs = nn.Parameter(BATCHES[0][0].clone())
    optimizer = esam(nn.ParameterList([*params, inputs]))
    flat = torch.zeros(sum(param.numel() for param in (*params, inputs)), dtype=torch.float64)
    if what == "a flat buffer of gradients":
        for param, part in zip((*params, inputs), flat.split([param.numel() for param in (*params, inputs)])):
            param.grad = part.view_as(param)
    for _ in range(3):
        if what == "zeros from before":
            optimizer.zero_grad(set_to_none=False)

        def closure():
            if what == "a trained image":
                inputs.data.clamp_(-1, 1)
                with torch.no_grad():
                    inputs.clamp_(-1, 1)
                optimizer.zero_grad()
            if what == "a flat buffer of gradients":
                flat.zero_()
            loss = cross_entropy(model(inputs), BATCHES[0][1])
            loss.backward()
            return loss

        optimizer.step(closure)


def test_a_closure_that_takes_from_an_iterator_is_told_so():
    model = mlp(dtype=torch.float64)
    optimizer, taken = esam(model), iter(BATCHES * 2)

    def closure():
        inputs, targets = next(taken)
        return ordinary(model, optimizer, inputs, targets)()

    with pytest.warns(UserWarning, match=r"names the iterator taken.*before step\(closure\)"):
        optimizer.step(closure)


def test_a_frozen_part_has_no_share_in_the_draw():
    """As many weights move as would if the frozen ones were not among the parameters."""
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(8)))
    model[:7].requires_grad_(False)
    optimizer = esam(model, beta=0.1)
    inputs = torch.ones(2, 3)

    def closure():
        optimizer.zero_grad()
        loss = model(inputs).square().mean()
        loss.backward()
        return loss

    for _ in range(12):
        optimizer.step(closure)
        assert optimizer.last_step.weights > 0


def test_a_frozen_model_with_a_head_that_is_not_perturbed():
    body, head = nn.Linear(3, 3).requires_grad_(False), nn.Linear(3, 1)
    groups = [{"params": body.parameters()}, {"params": head.parameters(), "rho": 0.0}]
    optimizer = ESAM(groups, torch.optim.SGD, lr=0.1, gamma=1)
    before = copy.deepcopy((values(body), values(head)))

    def closure():
        optimizer.zero_grad()
        loss = head(body(torch.ones(2, 3))).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert same(values(body), before[0])
    assert not same(values(head), before[1])
