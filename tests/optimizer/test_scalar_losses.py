"""With gamma = 1 a micro-batch may have one loss in all, as of contrastive losses, detectors and others' models."""

from collections import OrderedDict, UserDict
from types import SimpleNamespace

import pytest
import torch
from networks import batches, cross_entropy, grads, mlp, perturbed, same, values
from torch import Tensor, nn

from esam_kernels import ESAM, batch_closure

SIZE = 8
INPUTS, TARGETS = batches(1, size=SIZE)[0]


class ModelOutput(OrderedDict):
    """As the Transformers library's: a mapping, whose entries are attributes too."""

    def __getattr__(self, name: str):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


KINDS = {
    "tensor": lambda loss: loss,
    "dict": lambda loss: {"loss": loss, "logits": torch.zeros(8, 3)},
    "mapping": lambda loss: UserDict(loss=loss),
    "model output": lambda loss: ModelOutput(loss=loss, logits=torch.zeros(8, 3)),
    "attribute": lambda loss: SimpleNamespace(loss=loss),
    "terms": lambda loss: {"classes": 0.25 * loss, "boxes": 0.75 * loss},
    "weighted terms": lambda loss: ({"classes": 0.25 * loss, "boxes": 0.75 * loss}, 2),
    "weighted model output": lambda loss: (ModelOutput(loss=loss), 2),
    "weighted": lambda loss: (loss, 3),
    "weighted by a tensor": lambda loss: (loss, torch.tensor(2.5)),
}


def spread(outputs: Tensor) -> Tensor:
    """A loss of the batch that is none of its rows: how alike their outputs are."""
    return (outputs @ outputs.T).logsumexp(1).mean()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rho", [0.5, 0.0])
def test_one_loss_of_the_batch(kind, rho):
    model = mlp()
    moved = perturbed(model, lambda network: spread(network(INPUTS)), rho)
    spread(moved(INPUTS)).backward()
    closure = batch_closure(model, lambda outputs, _: KINDS[kind](spread(outputs)), INPUTS, TARGETS)
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=rho, beta=1, gamma=1)
    loss = optimizer.backward(closure)
    assert loss.shape == ()
    torch.testing.assert_close(loss, spread(model(INPUTS)).detach())
    for mine, theirs in zip(grads(model), grads(moved)):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(("weights", "shares"), [(None, [0.5, 0.5]), ([3, 1], [0.75, 0.25]), ([0.0, 2.0], [0, 1])])
@pytest.mark.parametrize("rho", [0.5, 0.0])
@pytest.mark.parametrize("as_tensors", [False, True])
def test_micro_batches_weigh_alike_or_by_their_weights(weights, shares, rho, as_tensors):
    pieces = [INPUTS[:5], INPUTS[5:]]
    model = mlp()

    def mean(network: nn.Module) -> Tensor:
        return sum(share * spread(network(x)) for share, x in zip(shares, pieces))

    moved = perturbed(model, mean, rho)
    mean(moved).backward()

    def closure(i: int):
        weight = weights and (torch.tensor(weights[i]) if as_tensors else weights[i])
        return lambda index: spread(model(pieces[i])) if weights is None else (spread(model(pieces[i])), weight)

    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=rho, beta=1, gamma=1)
    loss = optimizer.backward([closure(0), closure(1)])
    torch.testing.assert_close(loss, mean(model).detach())
    for mine, theirs in zip(grads(model), grads(moved)):
        torch.testing.assert_close(mine, theirs)


def test_a_batch_that_has_no_rows_needs_no_rows():
    """A closure by hand over a list of images of different sizes."""
    model = nn.Conv2d(1, 2, 3)
    images = [torch.randn(1, 5, 7), torch.randn(1, 9, 4)]
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, gamma=1)
    before = values(model)
    optimizer.step(lambda index: sum(model(image).square().mean() for image in images))
    assert not same(values(model), before)


def test_losses_of_samples_may_be_in_a_mapping_whatever_gamma_is():
    models = [mlp(), mlp()]
    for model, kind in zip(models, (lambda losses: losses, lambda losses: {"loss": losses})):
        closure = batch_closure(model, lambda outputs, y, kind=kind: kind(cross_entropy(outputs, y)), INPUTS, TARGETS)
        ESAM(model.parameters(), torch.optim.SGD, lr=0.1).step(closure)
    assert same(values(models[0]), values(models[1]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_selection_of_samples_needs_the_loss_of_each(kind):
    model = mlp()
    closure = batch_closure(model, lambda outputs, _: KINDS[kind](spread(outputs)), INPUTS, TARGETS)
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1)
    with pytest.raises((ValueError, TypeError), match=r"\(losses, weights\).*gamma=1"):
        optimizer.backward(closure)


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (lambda loss: {"classes": loss, "accuracy": loss.detach()}, "dict in which accuracy is no loss with a graph"),
        (lambda loss: {"classes": loss, "boxes": 0.5}, "dict in which boxes is no loss"),
        (lambda loss: {}, "dict.*loss"),
        (lambda loss: SimpleNamespace(loss=None), "NoneType"),
        (lambda loss: (loss, "3"), "tuple"),
        (lambda loss: loss.item(), "float"),
    ],
)
def test_what_has_no_loss_is_refused(result, words):
    model = mlp()
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, gamma=1)
    with pytest.raises(TypeError, match=words):
        optimizer.backward(lambda index: result(spread(model(INPUTS))))


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_terms_of_which_one_is_made_of_others_are_refused(scale):
    model = mlp()
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, gamma=1)
    inputs = batches(1)[0][0]

    def losses(index):
        a, b = model(inputs).square().mean(), model(inputs).abs().mean()
        return {"total": a + scale * b, "a": a, "b": b}

    before = values(model)
    with pytest.raises(ValueError, match=r"'total' is made of 'a'.*\{'loss': losses\['total'\]\}"):
        optimizer.step(losses)
    assert same(values(model), before)
    optimizer.step(lambda index: {name: loss for name, loss in losses(index).items() if name != "total"})
    optimizer.step(lambda index: {"loss": losses(index)["total"], "a": 0.0})
    assert not same(values(model), before)
