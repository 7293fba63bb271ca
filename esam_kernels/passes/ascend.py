"""Pass 1: the losses at w, and the gradient of the drawn weights, along which they are perturbed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from .. import ops
from ..ops.reference import ASCENT_STREAM
from ..options import count_of
from ..step import Step, Weight
from ..warn import warn
from .descend import accumulate, loss_scale
from .draw import drawn, random_scores
from .evaluate import MicroBatch, divisor, steered
from .partial_gradients import needed_edges, nodes
from .select import at_least, extents, without_padding


@dataclass(frozen=True)
class Ascent:
    """Where to climb, and from what losses.

    Attributes:
        weights: the drawn weights.
        grads: their gradients, or what stands for them, up to a common factor: only their direction matters. None for
            a weight that stays. ``perturb`` is the last to need them and clears the list, which frees their memory.
        losses: those at w of the rows that a gradient was taken of.
        unreached: those of the weights that the losses gave no gradient.
    """

    weights: Sequence[Weight]
    grads: list[Tensor | None]
    losses: Sequence[MicroBatch] = ()
    unreached: Sequence[Weight] = ()


def ascend(step: Step, before: Sequence[MicroBatch]) -> Ascent:
    """Run pass 1 on the share of the rows that is set.

    Args:
        step: the step.
        before: losses at w of all rows, if they are known.

    Raises:
        ValueError: if a gradient is sparse.
        RuntimeError: if the model uses reentrant activation checkpoints.
    """
    weights, rows = drawn(step), ascent_rows(step, before)
    losses, grads = (ascend_on_shards if step.model_state.shards else ascend_on_replica)(step, weights, rows)
    for weight, grad in zip(weights, grads):
        check_gradient(weight, grad)
    return Ascent(weights, grads, losses, [weight for weight, grad in zip(weights, grads) if grad is None])


def ascent_rows(step: Step, before: Sequence[MicroBatch]) -> list[Tensor | None]:
    """For each micro-batch the rows that pass 1 runs on, ascending; None for all of them.

    At least two where a batch norm takes its statistics from them, which it cannot from one.
    """
    share = step.settings.ascent_share
    if share == 1:
        return [None] * len(step.closures)
    scores = [random_scores(step, ASCENT_STREAM, i, *extent) for i, extent in enumerate(extents(step, before))]
    if before:
        scores = [without_padding(x, one) for x, one in zip(scores, before)]
    counts = [at_least(step, count_of(share, len(x)), len(x)) for x in scores]
    return [ops.select_top(torch.zeros_like(x), x, k) for x, k in zip(scores, counts)]


def ascend_on_replica(
    step: Step, weights: Sequence[Weight], rows: Sequence[Tensor | None]
) -> tuple[list[MicroBatch], list[Tensor | None]]:
    """The gradient of this rank's own samples, as the SAM paper has it for data parallelism."""
    step.model_state.forget_weight_copies()
    put_back = step.model_state.set_aside_others(step.rollback)
    params = [weight.param for weight in weights]
    evaluate, scale = steered(step), loss_scale(step)
    losses: list[MicroBatch] = []
    grads: list[Tensor | None] = [None] * len(params)
    seen: Tensor | int = 0
    for closure, index in zip(step.closures, rows):
        unchanged = step.model_state.watch_gradients()
        micro_batch = evaluate(step, closure, index)
        unchanged()
        losses.append(micro_batch.detach())
        # How much is still to come is not known: what is there becomes a running mean.
        before, seen = seen, seen + losses[-1].total_weight
        loss = scale(micro_batch.weighted_sum / divisor(seen))
        # Not backward(): that would fill .grad, fire the hooks on it, and compute the gradients of all weights.
        asked: list[Any] = [*params, *needed_edges(loss, params)]
        found: list[Tensor | None] = list(
            step.rollback.interruptible(torch.autograd.grad, loss, asked, allow_unused=True)
        )
        del asked, found[len(params) :]  # edges hold the graph
        refuse_reentrant_checkpoints(step, loss, {w.tensor_id for w, grad in zip(weights, found) if grad is None})
        for i, (total, grad) in enumerate(zip(grads, found)):
            grads[i] = _sum(total, before / divisor(seen), grad)
            found[i] = None  # two lists are in memory at most
        del micro_batch, loss, found  # the graph, with its activations, before the next one is built
    # A function may give one weight as the gradient of another, and it is about to move.
    moving = set(map(Tensor.data_ptr, params)) - {0}
    dense = [grad for grad in grads if grad is not None and grad.layout == torch.strided]
    if not moving.isdisjoint(map(Tensor.data_ptr, dense)):
        grads = [None if grad is None else grad.clone() for grad in grads]
    # What a backward inside the graph's own, as of reversible layers, has left in .grad is not the last pass's.
    for param in step.model_state.params:
        param.grad = None
    put_back()
    return losses, grads


def _sum(total: Tensor | None, share: Tensor | float, grad: Tensor | None) -> Tensor | None:
    """``share * total + grad``, where None is 0.

    Not in place: autograd may return one tensor for two parameters, or a view that repeats an element.
    """
    if total is None:
        return grad
    if isinstance(share, Tensor):
        share = share.to(total.device)
    if grad is None:
        return total * share
    if {total.layout, grad.layout} != {torch.strided}:  # refused when all are added up
        return total * share + grad
    return torch.addcmul(grad, total, share) if isinstance(share, Tensor) else torch.add(grad, total, alpha=share)


def ascend_on_shards(
    step: Step, weights: Sequence[Weight], rows: Sequence[Tensor | None]
) -> tuple[list[MicroBatch], list[Tensor | None]]:
    """The gradient of all ranks' samples, of which each rank gets its shards, by a backward into ``.grad`` alone."""
    shards, params = step.model_state.shards, [weight.param for weight in weights]
    put_back = shards.train_only(params, step.rollback)
    # These parameters may all be unused in a micro-batch: its losses have no graph then, and it no backward.
    losses = accumulate(step, rows, steered(step), loss_scale(step), graph=False)
    shards.reduce_rest()
    put_back()
    grads = [param.grad for param in params]
    for param in params:
        param.grad = None
    return losses, grads


def check_gradient(weight: Weight, grad: Tensor | None) -> None:
    """Refuse a gradient along which its weight cannot be perturbed.

    Raises:
        ValueError: if it is sparse.
    """
    if grad is not None and grad.layout != torch.strided:
        raise ValueError(
            f"parameter {weight.tensor_id}, of shape {list(weight.param.shape)}, has a sparse gradient, which cannot "
            "be perturbed: make its layer with sparse=False, or give its parameter group rho=0"
        )


def check_reached(step: Step, ascent: Ascent) -> None:
    """After the last pass, refuse a step whose first one cannot reach the weights, though now some have a gradient.

    SAM would silently be SGD. Without a function that is written in Python nothing hides weights: layers are left out
    at random, and what pass 1 left out is perturbed in another step.

    Raises:
        RuntimeError: if no weight has had a gradient in any pass 1 so far, and some have one now; a warning says it
            once if some had, or if pass 1 ran on a share of the rows, which need not use what others use.
    """
    findings = step.findings
    findings.reached |= len(ascent.unreached) < len(ascent.weights)
    late = [weight for weight in ascent.unreached if weight.param.grad is not None]
    if not late or not findings.has_own_functions or findings.hidden_said:
        return
    message = (
        f"{len(late)} of {len(ascent.weights)} drawn parameters got a gradient in the last pass of the step but none "
        "in the first, so they were not perturbed: torch.autograd.grad did not reach them. If no layers are left out "
        "at random, pass them as inputs to the autograd.Function that uses them; if it is torch.utils.checkpoint, give "
        "that use_reentrant=False"
    )
    if not findings.reached and step.settings.ascent_share == 1:
        raise RuntimeError(message)
    findings.hidden_said = True
    warn(message)


def refuse_reentrant_checkpoints(step: Step, loss: Tensor, unreached: set[int]) -> None:
    """Refuse reentrant activation checkpoints, which hide the weights in them from ``torch.autograd.grad``.

    The graph is searched for them in the first sharp step, and in a later one only if a weight gets no gradient that is
    not known to get none. So a weight that no loss depends on costs one search, and not one in each step that draws it.

    Raises:
        RuntimeError: if there is a reentrant checkpoint in the graph of the loss.
    """
    known = step.findings.unreached
    if known is not None and unreached <= known:
        return
    names, own = function_names(loss)
    if "CheckpointFunctionBackward" in names:
        raise RuntimeError(
            "the model uses reentrant activation checkpointing, which hides the gradients of single weights: "
            "give torch.utils.checkpoint.checkpoint use_reentrant=False"
        )
    step.findings.unreached = unreached | (known or set())
    step.findings.has_own_functions |= own


def function_names(loss: Tensor) -> tuple[set[str], bool]:
    """What the functions in the graph of the loss are called, and whether some are written in Python."""
    found = nodes(loss)
    return {node.name() for node in found}, any(isinstance(node, BackwardCFunction) for node in found)
