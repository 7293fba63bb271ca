"""The forwards without a graph, and the samples that the gradient is taken on: those whose loss rose most.

Source: sharpness-sensitive data selection, ESAM (Du et al., ICLR 2022, arXiv 2110.03141) section 3.2.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ops
from ..closure import BatchClosure
from ..ops.reference import SAMPLE_STREAM
from ..options import count_of
from ..step import Step
from .draw import random_scores
from .evaluate import MicroBatch, steered


def look(step: Step, before: Sequence[MicroBatch] = ()) -> list[MicroBatch]:
    """The losses at the weights as they are, without a graph; as many as there were ``before``, if that is known."""
    step.model_state.forget_weight_copies()
    evaluate = torch.no_grad()(steered(step))
    sizes: Sequence[int | None] = [len(one.losses) for one in before] or [None] * len(step.closures)
    return [evaluate(step, closure, size=size, graph=False) for closure, size in zip(step.closures, sizes)]


def extents(step: Step, before: Sequence[MicroBatch]) -> list[tuple[int, torch.device]]:
    """How many rows each micro-batch has and where, from its losses, or without them from its closure."""
    if before:
        return [(len(one.losses), one.losses.device) for one in before]
    return [(closure.size, closure.device) for closure in step.closures if isinstance(closure, BatchClosure)]


def select(step: Step, before: Sequence[MicroBatch], after: Sequence[MicroBatch]) -> list[Tensor | None]:
    """For each micro-batch the rows that the gradient is taken on, ascending; None for all of them.

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
        if one.sample_weights is not None:  # what has no weight, such as rows of padding, comes last
            padding = one.sample_weights == 0
            low[i], high[i] = low[i].masked_fill(padding, 0), high[i].masked_fill(padding, -math.inf)
    if settings.select_over == "micro_batch" or len(high) == 1:
        return [ops.select_top(a, b, count_of(settings.gamma, len(a))) for a, b in zip(low, high)]
    sizes = [len(x) for x in low]
    index = ops.select_top(torch.cat(low), torch.cat(high), count_of(settings.gamma, sum(sizes)))
    ends = torch.tensor(sizes).cumsum(0)
    # How many rows each micro-batch gets is known on the device alone: the one synchronization of this option.
    cuts = torch.searchsorted(index, ends.to(index.device)).tolist()
    starts = [0, *ends.tolist()]
    return [index[i:j] - start for i, j, start in zip([0, *cuts], cuts, starts)]
