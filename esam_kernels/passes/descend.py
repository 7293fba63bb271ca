"""The last pass: the gradient of the selected samples at the weights as they are, for all weights, into ``.grad``."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..closure import Closure
from ..step import Step
from .evaluate import MicroBatch, divisor, evaluate
from .partial_gradients import guard_group_norms

Scale = Callable[[Tensor], Tensor]


def descend(
    step: Step, rows: Sequence[Tensor | None], before: Sequence[MicroBatch] = (), norm: Tensor | None = None
) -> list[MicroBatch]:
    """Leave in ``.grad`` the gradient of the weighted mean over these rows of the micro-batches.

    Args:
        step: the step; no parameter has a ``.grad``.
        rows: of each micro-batch, int64 of shape [k]; None for all of them.
        before: what the first pass found of each micro-batch, if there was one.
        norm: that of the perturbed gradient, if a perturbation was made.

    Returns:
        Losses of the rows.
    """
    total = sum(one.rows(index).total_weight for one, index in zip(before, rows)) if before else None
    return accumulate(step, rows, evaluate, loss_scale(step, norm), total)


def accumulate(
    step: Step,
    rows: Sequence[Tensor | None],
    evaluate: Callable[..., MicroBatch],
    scale: Scale,
    total: Tensor | int | None = None,
    graph: bool = True,
) -> list[MicroBatch]:
    """Add the gradients of the micro-batches up in ``.grad``.

    They are synchronized at the end: the mean over the ranks of each one's mean. ``total`` is the weight of all these
    rows, if it is known; ``graph`` is whether losses must have one.
    """
    state = step.model_state
    state.forget_weight_copies()
    work = [(closure, index) for closure, index in zip(step.closures, rows) if index is None or len(index) > 0]
    done: list[MicroBatch] = []
    # What this step adds to them is rescaled, and not what was there.
    put_back = state.set_aside_others(step.rollback) if total is None and len(work) > 1 else None

    def add(closure: Closure, index: Tensor | None) -> None:
        seen = sum(one.total_weight for one in done)
        unchanged = state.watch_gradients()
        micro_batch = evaluate(step, closure, index, graph=graph)
        unchanged()
        weight = total
        if weight is None:  # how much is still to come: what is there becomes a running mean
            weight = seen + micro_batch.total_weight
            grads = state.unsynchronized_gradients() + (state.gradients_of_others() if put_back else [])
            multiply_(grads, seen / divisor(weight))
        loss = scale(micro_batch.weighted_sum / divisor(weight))
        if loss.requires_grad:
            guard_group_norms(loss, state.params)
            step.rollback.interruptible(loss.backward)
        done.append(micro_batch.detach())

    for closure, index in work[:-1]:
        state.without_gradient_sync(add)(closure, index)
    add(*work[-1])
    if put_back is not None:
        put_back(added=True)
    return done


def multiply_(tensors: Sequence[Tensor], factor: Tensor | float) -> None:
    """Multiply tensors on any devices in place with a number, which may be 0-dimensional on one of them."""
    for device in dict.fromkeys(tensor.device for tensor in tensors):
        here = [tensor for tensor in tensors if tensor.device == device]
        torch._foreach_mul_(here, factor.to(device) if isinstance(factor, Tensor) else factor)


def unscaled(step: Step, norm: Tensor) -> Tensor:
    """The norm of a gradient whose loss ``loss_scale`` has scaled, as if it had not; it stays on the device."""
    scaler = step.grad_scaler
    if scaler is None or not scaler.is_enabled():
        return norm
    one: Tensor = scaler.scale(torch.ones((), device=norm.device))
    return norm / one


def loss_scale(step: Step, norm: Tensor | None = None) -> Scale:
    """What the loss is multiplied with before its backward.

    A perturbation whose norm is not finite has moved no weight; the loss then becomes NaN, so that the scaler finds
    it, backs off and skips the step, on every rank alike.
    """
    scaler = step.grad_scaler
    if scaler is None or not scaler.is_enabled():
        return lambda loss: loss
    if norm is None:
        return scaler.scale
    poison = torch.where(norm.isfinite(), 1.0, math.nan)
    return lambda loss: scaler.scale(loss * poison.to(loss.device))
