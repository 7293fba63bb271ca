"""The passes of a step whose closure is torch.optim's: it runs the backward of each itself, into ``.grad``."""

from dataclasses import replace

import torch

from ..ordinary import OrdinaryClosure
from ..step import Step
from .ascend import Ascent, check_gradient
from .draw import drawn
from .evaluate import MicroBatch, in_steering_precision, one_loss


def check_ordinary(step: Step) -> None:
    """Refuse settings that need the losses of single rows.

    Raises:
        ValueError: if gamma or ascent_share takes a part of the rows.
    """
    settings = step.settings
    needed = {"gamma": 1} | ({"ascent_share": 1} if settings.ascent == "gradient" else {})
    for name in needed if step.weights else ():
        value = getattr(settings, name)
        if value != 1:
            raise ValueError(
                f"{name} = {value!r} takes a part of the samples, which a closure without an index cannot: set "
                f"{name}=1, or give backward() or step() what esam_kernels.batch_closure makes"
            )


def ascend_by_closure(step: Step, closure: OrdinaryClosure) -> Ascent:
    """Pass 1: the complete gradient at w, of which that of the drawn weights is climbed along.

    Raises:
        ValueError: if a gradient is sparse.
        RuntimeError: if the closure made none.
    """
    put_back = step.model_state.set_aside_others(step.rollback)
    losses = _run(step, closure, last=False)
    put_back()
    trained = [weight for weight in step.weights if weight.param.requires_grad]
    weights = drawn(replace(step, weights=trained)) if trained else []
    grads = [weight.param.grad for weight in weights]
    for weight, grad in zip(weights, grads):
        check_gradient(weight, grad)
    for param in closure.params:
        param.grad = None
    return Ascent(weights, grads, losses)


def descend_by_closure(step: Step, closure: OrdinaryClosure) -> list[MicroBatch]:
    """The last pass: the gradient at the weights as they are, added to what the closure has not cleared.

    Raises:
        RuntimeError: if the closure made none.
    """
    return _run(step, closure, last=True)


def _run(step: Step, closure: OrdinaryClosure, last: bool) -> list[MicroBatch]:
    step.model_state.forget_weight_copies()
    closure.begin(last)
    # As torch.optim, whose steps are under no_grad(), calls a closure.
    call = torch.enable_grad()(closure.call)
    result = step.rollback.interruptible(call if last else in_steering_precision(step, call), last)
    if not last and not step.findings.iterators:
        step.findings.iterators = True
        closure.check_iterators()
    step.findings.closure_works |= closure.check(last, step.findings.closure_works, result)
    return one_loss(result)
