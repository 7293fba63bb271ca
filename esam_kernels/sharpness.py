"""The passes of one ESAM step, in their order: ascend, perturb, look, select, descend, restore.

Source: ESAM (Du et al., ICLR 2022, arXiv 2110.03141) algorithm 1, with the scale rho / beta of the authors' code.

Contexts such as ``torch.no_grad`` are applied as decorators here and never as ``with`` blocks: an exception that lands
between the body of a block and its exit would leave the context entered.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import ops
from .closure import Closure
from .engines import is_sharded, local_shard, shard_offset, sum_over_shards
from .model_state import ModelState
from .ops.reference import SAMPLE_STREAM, element_words
from .passes.partial_gradients import guard_group_norms, needed_edges
from .rollback import Rollback
from .weight_mask import draw_tensors

Scale = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Settings:
    """What ESAM is told, apart from the rho and adaptive of each parameter group; ``ESAM`` documents each of them."""

    beta: float
    gamma: float
    granularity: str
    selection: str
    select_over: str
    interval: int
    steering_dtype: torch.dtype | None
    seed: int


@dataclass(frozen=True)
class Target:
    """A parameter that can be perturbed."""

    param: Tensor
    tensor_id: int  # its place among all parameters of the optimizer, as in the state dict
    rho: float
    adaptive: bool


@dataclass(frozen=True)
class Sample:
    """What one pass found out about one micro-batch: losses, and their weights if the closure gives any; shape [b]."""

    losses: Tensor
    weights: Tensor | None

    @property
    def total_weight(self) -> Tensor | int:
        """The sum of the weights; each is 1 if there are none."""
        return len(self.losses) if self.weights is None else self.weights.sum()

    @property
    def weighted_sum(self) -> Tensor:
        """The sum of the losses, each times its weight."""
        return (self.losses if self.weights is None else self.losses * self.weights).sum()

    def rows(self, index: Tensor | None) -> "Sample":
        """Some of the micro-batch; all of it if None."""
        if index is None:
            return self
        weights = None if self.weights is None else self.weights.index_select(0, index)
        return Sample(self.losses.index_select(0, index), weights)

    def detach(self) -> "Sample":
        """The same without the graph."""
        return Sample(self.losses.detach(), self.weights)


class Perturbation:
    """The weights that a step moves uphill, and what they were."""

    def __init__(self, settings: Settings, step: int) -> None:
        self._settings = settings
        self._step = step
        self._params: list[Tensor] = []
        self._backups: list[Tensor] = []

    def apply(self, targets: Sequence[Target], grads: Sequence[Tensor | None]) -> Tensor:
        """w <- w + e with e = (rho / beta) * m*g / (‖m*g‖ + eps), the norm being that over all targets and ranks.

        Each rank moves its own shards of them.

        Args:
            targets: the drawn parameters.
            grads: their gradients; None for a parameter that the loss does not depend on, which stays as it is.

        Returns:
            The norm ‖m*g‖, 0-dimensional, on a device. If it is not finite, no weight has moved.
        """
        lists = []  # an operator takes parameters of one kind, adaptive or not
        for adaptive in (False, True):
            kind = [(t, g) for t, g in zip(targets, grads) if g is not None and t.adaptive is adaptive]
            if kind:
                kind_targets = [t for t, _ in kind]
                params = [local_shard(t.param) for t in kind_targets]
                coefficients = [t.rho / self._settings.beta for t in kind_targets]
                gradients = [local_shard(g) for _, g in kind]
                lists.append((params, gradients, coefficients, adaptive, self._mask(kind_targets)))
        if len(lists) == 1 and not is_sharded(targets[0].param):
            return self._perturb(*lists[0])  # which is all, so that the operator has the norm
        squares = [ops.squared_norm(params, gs, adaptive, mask) for params, gs, _, adaptive, mask in lists]
        square = torch.stack([square.to(squares[0]) for square in squares] or [torch.zeros(())]).sum()
        norm = sum_over_shards(square, [target.param for target in targets]).sqrt()
        for one in lists:
            self._perturb(*one, norm)
        return norm

    def _perturb(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        coefficients: Sequence[float],
        adaptive: bool,
        mask: ops.ElementMask | None,
        norm: Tensor | None = None,
    ) -> Tensor:
        backups = [torch.empty_like(param) for param in params]
        self._backups += backups
        self._params += params
        return ops.perturb_(params, grads, backups, coefficients, norm, adaptive, mask)

    def restore(self) -> None:
        """Put every weight back, bit for bit. Doing it again changes nothing."""
        # A backup is whole as soon as its version has moved (see ops.perturb_); until then its weight is untouched.
        whole = [(param, backup) for param, backup in zip(self._params, self._backups) if backup._version > 0]
        if whole:
            ops.restore_([param for param, _ in whole], [backup for _, backup in whole])

    def _mask(self, targets: Sequence[Target]) -> ops.ElementMask | None:
        by_element = self._settings.granularity == "element"
        low_precision = any(target.param.dtype in (torch.bfloat16, torch.float16) for target in targets)
        if not by_element and not low_precision:
            return None
        ids = [target.tensor_id for target in targets]
        offsets = [shard_offset(target.param) for target in targets]
        beta = self._settings.beta if by_element else 1.0
        return ops.ElementMask(self._settings.seed, self._step, ids, beta, offsets)


class ReentrantCheckpoints:
    """Refuses reentrant activation checkpoints, which hide the weights in them from ``torch.autograd.grad``.

    A graph is searched for them in the first ESAM step, whatever that draws, and where a parameter is missed that never
    was before: one that no loss depends on costs one search, and not one in each step that draws it.
    """

    def __init__(self) -> None:
        self._missed: set[int] | None = None  # the ids of the parameters that graphs without checkpoints did not reach

    def refuse(self, loss: Tensor, missed: set[int]) -> None:
        """Check the graph of a loss, from which the drawn parameters ``missed`` got no gradient.

        Raises:
            RuntimeError: if there is a reentrant checkpoint in it.
        """
        if self._missed is not None and missed <= self._missed:
            return
        if has_reentrant_checkpoint(loss):
            raise RuntimeError(
                "the model uses reentrant activation checkpointing, which hides the gradients of single weights: "
                "give torch.utils.checkpoint.checkpoint use_reentrant=False"
            )
        self._missed = missed | (self._missed or set())


def esam_backward(
    closures: Sequence[Closure],
    targets: Sequence[Target],
    settings: Settings,
    step: int,
    state: ModelState,
    checkpoints: ReentrantCheckpoints,
    grad_scaler: torch.amp.GradScaler | None,
    rollback: Rollback,
) -> Tensor:
    """One ESAM step up to and including restore; leaves the sharpness-aware gradient in ``.grad``.

    Args:
        closures: one for each micro-batch.
        targets: the parameters that can be perturbed; not empty. No parameter has a ``.grad``.
        settings: see ``ESAM``.
        step: number of the step, for its draws.
        state: what the passes must not disturb.
        checkpoints: what is known of them from the steps before.
        grad_scaler: scales the losses, or None.
        rollback: where changes are registered before they are made.

    Returns:
        The mean loss at w, 0-dimensional, detached, on the losses' device.
    """
    if state.shards and settings.select_over == "all" and len(closures) > 1:
        raise ValueError(
            "select_over='all' may leave out a micro-batch on one rank and not on another, where every rank has to "
            "gather the sharded weights for it: set select_over='micro_batch'"
        )
    steered = state.low_precision(evaluate, settings.steering_dtype)
    replay_random_state = state.keep(rollback)
    use_replicas = state.bypass_replicas(rollback)

    # Pass 1, ascend: the losses at w, and the gradient of the drawn weights.
    chosen = drawn(targets, settings, step)
    before, grads = ascend(closures, chosen, state, checkpoints, steered, loss_scale(grad_scaler), rollback)
    put_back_buffers = state.keep_buffers()

    # Perturb: w <- w + e.
    perturbation = Perturbation(settings, step)
    rollback.undo_by(perturbation.restore)
    norm = perturbation.apply(chosen, grads)
    missed = [target for target, grad in zip(chosen, grads) if grad is None]
    grads.clear()

    # Pass 2, look: the losses at w + e, with the random numbers of pass 1. Only the increase is selected by it.
    after: list[Sample] = []
    if settings.gamma < 1 and settings.selection == "increase":
        replay_random_state()
        state.forget_weight_copies()
        look = torch.no_grad()(steered)
        sizes = [len(sample.losses) for sample in before]
        after = [look(closure, rollback, size=size, graph=False) for closure, size in zip(closures, sizes)]
    use_replicas()

    # Pass 3, descend: the gradient of the selected samples at w + e, for all weights.
    indices = select(before, after, settings, step)
    total = sum(sample.rows(index).total_weight for sample, index in zip(before, indices))
    descend(closures, indices, state, evaluate, loss_scale(grad_scaler, norm), rollback, total)
    for target in targets:  # the drawn ones were checked in pass 1; what is refused must not depend on the draw
        check_gradient(target, target.param.grad)
    check_reached(chosen, missed)

    perturbation.restore()
    put_back_buffers()
    state.forget_weight_copies()
    return mean(before)


def drawn(targets: Sequence[Target], settings: Settings, step: int) -> list[Target]:
    """The parameters that a step perturbs as a whole, or elements of which it perturbs."""
    if settings.granularity == "element":
        return list(targets)
    ids = [target.tensor_id for target in targets]
    return [targets[i] for i in draw_tensors(ids, settings.beta, settings.seed, step)]


def ascend(
    closures: Sequence[Closure],
    targets: Sequence[Target],
    state: ModelState,
    checkpoints: ReentrantCheckpoints,
    evaluate: Callable[..., Sample],
    scale: Scale,
    rollback: Rollback,
) -> tuple[list[Sample], list[Tensor | None]]:
    """The losses at w, and the gradients of the targets alone, up to a common factor: only their direction matters."""
    ascend_on = ascend_on_shards if state.shards else partial(ascend_on_replica, checkpoints)
    samples, grads = ascend_on(targets, closures, state, evaluate, scale, rollback)
    return samples, [check_gradient(target, grad) for target, grad in zip(targets, grads)]


def ascend_on_replica(
    checkpoints: ReentrantCheckpoints,
    targets: Sequence[Target],
    closures: Sequence[Closure],
    state: ModelState,
    evaluate: Callable[..., Sample],
    scale: Scale,
    rollback: Rollback,
) -> tuple[list[Sample], list[Tensor | None]]:
    """The gradient of this rank's own samples, as the SAM paper has it for data parallelism."""
    state.forget_weight_copies()
    params = [target.param for target in targets]
    samples: list[Sample] = []
    grads: list[Tensor | None] = [None] * len(params)
    for closure in closures:
        sample = evaluate(closure, rollback)
        samples.append(sample.detach())
        loss = scale(sample.weighted_sum / divisor(samples[0].total_weight))
        # Not backward(): that would fill .grad, fire the hooks on it, and compute the gradients of all weights.
        inputs: list[Any] = [*params, *needed_edges(loss, params)]
        found: list[Tensor | None] = list(rollback.interruptible(torch.autograd.grad, loss, inputs, allow_unused=True))
        del inputs, found[len(params) :]
        checkpoints.refuse(loss, {target.tensor_id for target, grad in zip(targets, found) if grad is None})
        for i, (total, grad) in enumerate(zip(grads, found)):
            # Not in place: autograd may return one tensor for two parameters, or a view that repeats an element.
            grads[i] = grad if total is None else total if grad is None else total + grad
            found[i] = None  # two lists are in memory at most
        del sample, loss, found  # the graph, with its activations, before the next one is built
    return samples, grads


def ascend_on_shards(
    targets: Sequence[Target],
    closures: Sequence[Closure],
    state: ModelState,
    evaluate: Callable[..., Sample],
    scale: Scale,
    rollback: Rollback,
) -> tuple[list[Sample], list[Tensor | None]]:
    """The gradient of all ranks' samples, of which each rank gets its shards, by a backward into ``.grad`` alone."""
    params = [target.param for target in targets]
    put_back = state.shards.train_only(params, rollback)
    # These parameters may all be unused in a micro-batch: its losses have no graph then, and it no backward.
    evaluate = partial(evaluate, graph=False)
    samples = descend(closures, [None] * len(closures), state, evaluate, scale, rollback)
    state.shards.reduce_rest()
    put_back()
    grads = [param.grad for param in params]
    for param in params:
        param.grad = None
    return samples, grads


def has_reentrant_checkpoint(loss: Tensor) -> bool:
    """Whether the graph of the loss has a node of ``torch.utils.checkpoint``'s reentrant kind."""
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
            if node.name() == "CheckpointFunctionBackward":
                return True
    return False


def select(before: Sequence[Sample], after: Sequence[Sample], settings: Settings, step: int) -> list[Tensor | None]:
    """For each micro-batch the rows that the gradient is taken on, ascending; None for all of them."""
    if settings.gamma == 1:
        return [None] * len(before)
    low = [sample.losses for sample in before]
    if settings.selection == "increase":
        high = [sample.losses for sample in after]
    else:
        high = low if settings.selection == "loss" else [random_scores(x, i, settings, step) for i, x in enumerate(low)]
        low = [torch.zeros_like(x) for x in high]
    for i, sample in enumerate(before):
        if sample.weights is not None:  # what has no weight, such as rows of padding, comes last
            padding = sample.weights == 0
            low[i], high[i] = low[i].masked_fill(padding, 0), high[i].masked_fill(padding, -math.inf)
    if settings.select_over == "micro_batch" or len(before) == 1:
        return [ops.select_top(a, b, count(settings.gamma, len(a))) for a, b in zip(low, high)]
    sizes = [len(x) for x in low]
    index = ops.select_top(torch.cat(low), torch.cat(high), count(settings.gamma, sum(sizes)))
    ends = torch.tensor(sizes).cumsum(0)
    # How many rows each micro-batch gets is known on the device alone: the one synchronization of this option.
    cuts = torch.searchsorted(index, ends.to(index.device)).tolist()
    starts = [0, *ends.tolist()]
    return [index[i:j] - start for i, j, start in zip([0, *cuts], cuts, starts)]


def count(gamma: float, size: int) -> int:
    """How many of ``size`` samples the keep ratio gamma selects."""
    return max(1, math.floor(gamma * size))


def random_scores(losses: Tensor, micro_batch: int, settings: Settings, step: int) -> Tensor:
    """Uniform numbers for the samples, from the seed and the step alone."""
    words = element_words(settings.seed, step, micro_batch, SAMPLE_STREAM, 0, len(losses), losses.device)
    return words.to(torch.float32)


def descend(
    closures: Sequence[Closure],
    indices: Sequence[Tensor | None],
    state: ModelState,
    evaluate: Callable[..., Sample],
    scale: Scale,
    rollback: Rollback,
    total: Tensor | int | None = None,
) -> list[Sample]:
    """Accumulate in ``.grad`` the gradient of the weighted mean over the rows ``indices`` of the micro-batches.

    It is synchronized at the end: the mean over the ranks of each one's mean. ``total`` is the weight of all these
    rows, if it is known.
    """
    state.forget_weight_copies()
    work = [(closure, index) for closure, index in zip(closures, indices) if index is None or len(index) > 0]
    samples: list[Sample] = []

    def accumulate(closure: Closure, index: Tensor | None) -> None:
        seen = sum(sample.total_weight for sample in samples)
        sample = evaluate(closure, rollback, index)
        weight = total
        if weight is None:  # how much is still to come: what is there becomes a running mean
            weight = seen + sample.total_weight
            grads = state.unsynchronized_gradients()
            if grads:
                torch._foreach_mul_(grads, seen / divisor(weight))
        loss = scale(sample.weighted_sum / divisor(weight))
        if loss.requires_grad:
            guard_group_norms(loss, state.params)
            rollback.interruptible(loss.backward)
        samples.append(sample.detach())

    for closure, index in work[:-1]:
        state.without_gradient_sync(accumulate)(closure, index)
    accumulate(*work[-1])
    return samples


def mean(samples: Sequence[Sample]) -> Tensor:
    """The weighted mean of the losses over all micro-batches, 0-dimensional."""
    total = sum(sample.total_weight for sample in samples)
    return torch.stack([sample.weighted_sum for sample in samples]).sum() / divisor(total)


def divisor(total: Tensor | int) -> Tensor | int:
    """The total weight, or 1 if it is 0: what has no weight, such as rows of padding, gives 0 and not NaN."""
    return total.masked_fill(total == 0, 1) if isinstance(total, Tensor) else total


def loss_scale(grad_scaler: torch.amp.GradScaler | None, norm: Tensor | None = None) -> Scale:
    """What the loss is multiplied with before its backward.

    A perturbation whose norm is not finite has moved no weight; the loss then becomes NaN, so that the scaler finds
    it, backs off and skips the step, on every rank alike.
    """
    if grad_scaler is None or not grad_scaler.is_enabled():
        return lambda loss: loss
    if norm is None:
        return grad_scaler.scale
    poison = torch.where(norm.isfinite(), 1.0, math.nan)
    return lambda loss: grad_scaler.scale(loss * poison.to(loss.device))


def evaluate(
    closure: Closure, rollback: Rollback, index: Tensor | None = None, size: int | None = None, graph: bool = True
) -> Sample:
    """Call the closure for the rows in ``index`` (None: all of them), and check what it returns.

    Args:
        closure: of one micro-batch.
        rollback: lets signals through.
        index: the rows.
        size: how many losses there must be, if it is known.
        graph: whether the losses must have a graph.

    Raises:
        TypeError: if it does not return a tensor, or two.
        ValueError: if the losses are not a floating tensor of shape [b], have no graph, or the weights do not fit.
    """
    size = size if index is None else len(index)
    result = rollback.interruptible(closure, index)
    losses, weights = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    if not isinstance(losses, Tensor) or not isinstance(weights, Tensor | None):
        raise TypeError(
            f"the closure returned {type(result).__name__}: return one loss per sample, a tensor of shape [b], "
            "or a tuple (losses, weights)"
        )
    if losses.dim() == 0:
        raise ValueError("the closure returned a scalar: return one loss per sample, for example with reduction='none'")
    if losses.dim() != 1:
        raise ValueError(
            f"the closure returned losses of shape {list(losses.shape)}: return one loss per sample, shape [b], for "
            "example losses.flatten(1).mean(1), or (losses, weights)"
        )
    if not losses.dtype.is_floating_point:
        raise ValueError(f"the closure returned {losses.dtype} losses: return a floating dtype")
    if len(losses) == 0 or size not in (None, len(losses)):
        raise ValueError(
            f"the closure returned {len(losses)} losses for {'a batch' if size is None else size} samples: "
            "closure(index) is to return the losses of the rows in index, and closure(None) always the same batch"
        )
    if graph and not losses.requires_grad:
        raise ValueError("the closure returned losses without a graph: compute them from the parameters, not detached")
    if weights is not None and (weights.shape != losses.shape or weights.is_complex()):
        raise ValueError(
            f"the closure returned {weights.dtype} weights of shape {list(weights.shape)} for losses of shape "
            f"{list(losses.shape)}: return one real weight for each loss"
        )
    dtype = torch.promote_types(losses.dtype, torch.float32)  # sums of bf16 and fp16 losses would lose their digits
    return Sample(losses.to(dtype), None if weights is None else weights.detach().to(dtype))


def check_gradient(target: Target, grad: Tensor | None) -> Tensor | None:
    """The gradient, if the target can be perturbed by it.

    Raises:
        ValueError: if the gradient is sparse.
    """
    if grad is not None and grad.layout != torch.strided:
        raise ValueError(
            f"parameter {target.tensor_id}, of shape {list(target.param.shape)}, has a sparse gradient, which cannot "
            "be perturbed: make its layer with sparse=False, or give its parameter group rho=0"
        )
    return grad


def check_reached(chosen: Sequence[Target], missed: Sequence[Target]) -> None:
    """Refuse a first pass that found none of the gradients that the last pass found: SAM would silently be SGD.

    Args:
        chosen: the drawn parameters.
        missed: those of them without a gradient in the first pass.

    Raises:
        RuntimeError: if all were missed that have a gradient now; a warning says it if some were.
    """
    late = [target for target in missed if target.param.grad is not None]
    if not late:
        return
    message = (
        f"{len(late)} of {len(chosen)} drawn parameters got a gradient in the last pass of the step but none in the "
        "first, so they were not perturbed: torch.autograd.grad did not reach them. Pass them as inputs to the "
        "autograd.Function that uses them; if it is torch.utils.checkpoint, give that use_reentrant=False"
    )
    if len(missed) == len(chosen):
        raise RuntimeError(message)
    warnings.warn(message, stacklevel=2)
