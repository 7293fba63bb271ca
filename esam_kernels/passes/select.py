"""The forwards without a graph, and the samples that the gradient is taken on: those whose loss rose most.

Source: sharpness-sensitive data selection, ESAM (Du et al., ICLR 2022, arXiv 2110.03141) section 3.2.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from .. import ops
from ..closure import BatchClosure
from ..ops.reference import SAMPLE_STREAM
from ..options import count_of
from ..step import Step
from .between import Between
from .draw import random_scores
from .evaluate import MicroBatch, steered


def look(step: Step, between: Between, before: Sequence[MicroBatch] = ()) -> list[MicroBatch]:
    """The losses of all rows at the weights as they are, with the random numbers from before the step.

    It runs without a graph, unless forwards ask for gradients themselves.

    Args:
        step: the step.
        between: replays buffers and random numbers.
        before: losses at w, if they are known: there must be as many.
    """
    # In eval mode and without a graph torch's encoder layers take a way of their own, which cuts padding out: its
    # losses cannot be compared with those of the other passes.
    token = object()
    step.rollback.undo_by(partial(_fast_path_back, token))

    def run(evaluate: Callable[..., MicroBatch]) -> list[MicroBatch]:
        between.replay()
        sizes: Sequence[int | None] = [len(one.losses) for one in before] or [None] * len(step.closures)
        _fast_path_off(token)
        losses = [
            evaluate(step, closure, size=size, graph=False).detach() for closure, size in zip(step.closures, sizes)
        ]
        _fast_path_back(token)
        return losses

    if step.findings.forward_needs_graph:
        return run(steered(step))
    try:
        return run(torch.no_grad()(steered(step)))
    except Exception as error:
        # Missed gradients are a RuntimeError of autograd's, or a None where something is computed with it.
        if not isinstance(error, (AttributeError, TypeError, AssertionError)) and "grad" not in str(error):
            raise
    losses = run(steered(step))
    step.findings.forward_needs_graph = True
    return losses


_looking: dict[object, bool] = {}  # in all threads, with what the fast path was before


def _fast_path_off(token: object) -> None:
    # It is a switch of the whole process: the first to look finds what it was, and the last puts that back.
    _looking[token] = next(iter(_looking.values()), torch.backends.mha.get_fastpath_enabled())
    torch.backends.mha.set_fastpath_enabled(False)


def _fast_path_back(token: object) -> None:
    before = _looking.get(token)
    if before is None:
        return
    if len(_looking) == 1:  # before it is forgotten what it was
        torch.backends.mha.set_fastpath_enabled(before)
    _looking.pop(token, None)


def extents(step: Step, before: Sequence[MicroBatch]) -> list[tuple[int, torch.device]]:
    """How many rows each micro-batch has and where, from its losses, or without them from its closure."""
    if before:
        return [(len(one.losses), one.losses.device) for one in before]
    return [(closure.size, closure.device) for closure in step.closures if isinstance(closure, BatchClosure)]


def select(step: Step, before: Sequence[MicroBatch], after: Sequence[MicroBatch]) -> list[Tensor | None]:
    """For each micro-batch the rows that the gradient is taken on, ascending; None for all of them.

    At least two where a batch norm takes its statistics from them, which it cannot from one.

    Args:
        step: the step.
        before: losses at w; none if no pass found those of all rows, which a random selection can do without. It
            then does not know either which rows have no weight.
        after: losses at w + e, if the selection needs them.
    """
    settings = step.settings
    if settings.gamma == 1:
        return [None] * len(step.closures)
    if settings.selection == "random":
        high = [random_scores(step, SAMPLE_STREAM, i, *extent) for i, extent in enumerate(extents(step, before))]
    else:
        high = [one.losses for one in (after if settings.selection == "increase" else before)]
    low = [one.losses for one in before] if settings.selection == "increase" else [torch.zeros_like(x) for x in high]
    for i, one in enumerate(before):
        if one.sample_weights is not None:
            low[i], high[i] = low[i].masked_fill(one.sample_weights == 0, 0), without_padding(high[i], one)
    sizes = [len(x) for x in low]
    if settings.select_over == "micro_batch" or len(high) == 1:
        counts = [at_least(step, count_of(settings.gamma, size), size) for size in sizes]
        return [ops.select_top(a, b, k) for a, b, k in zip(low, high, counts)]
    index = ops.select_top(torch.cat(low), torch.cat(high), count_of(settings.gamma, sum(sizes)))
    ends = torch.tensor(sizes, device="cpu").cumsum(0)
    # How many rows each micro-batch gets is known on the device alone: the one synchronization of this option.
    cuts = torch.searchsorted(index, ends.to(index.device)).tolist()
    starts = [0, *ends.tolist()]
    rows = [index[i:j] - start for i, j, start in zip([0, *cuts], cuts, starts)]
    for i, (a, b, one) in enumerate(zip(low, high, rows)):
        if len(one) > 0 and (k := at_least(step, len(one), len(a))) > len(one):
            rows[i] = ops.select_top(a, b, k)  # which contains the one
    return rows


def without_padding(scores: Tensor, rows: MicroBatch) -> Tensor:
    """Scores by which rows without weight, such as those of padding, come last."""
    weights = rows.sample_weights
    return scores if weights is None else scores.masked_fill(weights == 0, -math.inf)


def at_least(step: Step, count: int, size: int) -> int:
    """``count`` rows of ``size``, or two where a batch norm needs them and there are two."""
    return 2 if count == 1 and size > 1 and step.model_state.trains_batch_norm else count
