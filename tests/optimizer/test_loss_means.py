"""Losses whose mean is not the mean over the rows: as (losses, weights) they are trained on as by themselves."""

import pytest
import torch
from networks import batches, cross_entropy, grads, mlp, perturbed
from torch import Tensor, nn
from torch.nn import functional

from esam_kernels import ESAM, batch_closure, token_loss

SIZE = 8
INPUTS, TARGETS = batches(1, size=SIZE)[0]
CLASS_WEIGHTS = torch.tensor([0.2, 3.0, 1.0])
SPLITS = pytest.mark.parametrize("sizes", [[8], [2, 5, 1]], ids=str)


def check(model: nn.Module, loss_fn, mean, inputs: Tensor, targets, sizes: list[int]) -> None:
    """With gamma = 1 loss and gradient are those of the loss's own mean over the whole batch, at w and at w + e."""
    moved = perturbed(model, lambda network: mean(network(inputs), targets), 0.5)
    mean(moved(inputs), targets).backward()
    parts = [targets.split(sizes)] if isinstance(targets, Tensor) else [part.split(sizes) for part in targets]
    pieces = [part[0] if isinstance(targets, Tensor) else part for part in zip(*parts)]
    closures = [batch_closure(model, loss_fn, x, y) for x, y in zip(inputs.split(sizes), pieces)]
    loss = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.5, beta=1, gamma=1).backward(closures)
    torch.testing.assert_close(loss, mean(model(inputs), targets).detach())
    for mine, theirs in zip(grads(model), grads(moved)):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4)


@SPLITS
def test_class_weights(sizes):
    def loss_fn(outputs, targets):
        return cross_entropy(outputs, targets), CLASS_WEIGHTS[targets]

    check(mlp(), loss_fn, nn.CrossEntropyLoss(CLASS_WEIGHTS), INPUTS, TARGETS, sizes)


@SPLITS
def test_ignored_targets(sizes):
    targets = TARGETS.clone()
    targets[[0, 3, 7]] = -100

    def loss_fn(outputs, y):
        return cross_entropy(outputs, y), y != -100

    check(mlp(), loss_fn, nn.CrossEntropyLoss(), INPUTS, targets, sizes)


@SPLITS
def test_ctc(sizes):
    """Its mean divides each sample's loss by the length of its target, and then takes the mean over the rows."""
    inputs = torch.randn(SIZE, 12, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(1, 3, (SIZE, 5), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([5, 1, 3, 2, 5, 4, 1, 2])
    steps = torch.full((SIZE,), 12)

    def loss_fn(outputs, targets):
        y, lengths, steps = targets
        log_probs = outputs.log_softmax(2).transpose(0, 1)
        return functional.ctc_loss(log_probs, y, steps, lengths, reduction="none") / lengths.clamp(min=1)

    def mean(outputs, targets):
        y, lengths, steps = targets
        return functional.ctc_loss(outputs.log_softmax(2).transpose(0, 1), y, steps, lengths)

    check(mlp(), loss_fn, mean, inputs, (labels, lengths, steps), sizes)


OPTIONS = {
    "plain": {},
    "weight": {"weight": CLASS_WEIGHTS},
    "ignore_index": {"ignore_index": 1},
    "label_smoothing": {"label_smoothing": 0.2},
    "all": {"weight": CLASS_WEIGHTS, "ignore_index": 1, "label_smoothing": 0.2},
}


@SPLITS
@pytest.mark.parametrize("options", OPTIONS)
def test_tokens(options, sizes):
    options = OPTIONS[options]
    inputs = torch.randn(SIZE, 6, 4, generator=torch.Generator().manual_seed(0))
    targets = torch.randint(3, (SIZE, 6), generator=torch.Generator().manual_seed(1))
    targets[2] = options.get("ignore_index", -100)  # a row of padding
    targets[4, 2:] = options.get("ignore_index", -100)

    def mean(outputs, y):
        return functional.cross_entropy(outputs.flatten(0, 1), y.flatten(), **options)

    def loss_fn(outputs, y):
        return token_loss(outputs, y, **options)

    check(mlp(), loss_fn, mean, inputs, targets, sizes)
    losses, weights = loss_fn(mlp()(inputs), targets)
    assert losses.shape == weights.shape == (SIZE,)
    assert losses[2] == weights[2] == 0


@pytest.mark.parametrize("options", OPTIONS)
def test_one_target_for_each_sample(options):
    options = OPTIONS[options]
    check(
        mlp(),
        lambda outputs, y: token_loss(outputs, y, **options),
        lambda outputs, y: functional.cross_entropy(outputs, y, **options),
        INPUTS,
        TARGETS,
        [8],
    )


def test_a_batch_of_padding_alone_has_no_gradient_rather_than_nan():
    model = mlp()
    targets = torch.full((SIZE,), -100)
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1)
    assert optimizer.backward(batch_closure(model, token_loss, INPUTS, targets)) == 0
    assert all((param.grad == 0).all() for param in model.parameters())


def test_low_precision_logits_are_summed_in_float32():
    logits = torch.randn(2, 4096, 3, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    targets = torch.randint(3, (2, 4096), generator=torch.Generator().manual_seed(1))
    losses, weights = token_loss(logits, targets)
    assert losses.dtype == weights.dtype == torch.float32
    exact, _ = token_loss(logits.float(), targets)
    torch.testing.assert_close(losses, exact, rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("logits", "targets"),
    [((2, 3, 5), (2, 5)), ((2, 5, 3), (2, 4)), ((2, 5, 3), (10,)), ((3,), ()), ((2, 2, 2, 3), (2, 2, 2))],
)
def test_shapes_that_do_not_fit_are_refused(logits, targets):
    with pytest.raises(ValueError, match=r"logits \[b, T, V\] and targets \[b, T\]"):
        token_loss(torch.zeros(logits), torch.zeros(targets, dtype=torch.long))


@pytest.mark.parametrize("options", [{"ascent": "momentum"}, {"rho": 0.0}, {}], ids=str)
@pytest.mark.parametrize("before", [False, True])
def test_weights_of_another_optimizer_get_the_mean_over_micro_batches(options, before):
    """Also with a gradient from before, to which it is added."""
    model, twin = mlp(), mlp()
    inputs, targets = batches(1)[0]
    options = {"rho": 1e-9, "beta": 1, "gamma": 1, "momentum": 0.9} | options
    optimizer = ESAM(model[0].parameters(), torch.optim.SGD, lr=0.1, **options)
    for one in (model, twin) if before else ():
        cross_entropy(one(inputs), targets).sum().backward()
        one[4].bias.requires_grad_(False)  # frozen from now on, with a gradient
    parts = [slice(0, 2), slice(2, 5), slice(5, None)]
    optimizer.backward([batch_closure(model, cross_entropy, inputs[part], targets[part]) for part in parts])
    cross_entropy(twin(inputs), targets).mean().backward()
    for param, other in zip(model[2:].parameters(), twin[2:].parameters()):
        torch.testing.assert_close(param.grad, other.grad)
