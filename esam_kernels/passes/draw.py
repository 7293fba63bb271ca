"""Which weights a step draws, and which rows, from the seed and the step's number alone.

Source: stochastic weight perturbation, ESAM (Du et al., ICLR 2022, arXiv 2110.03141) section 3.1. Masks of single
elements are drawn inside the operators, by ``ops.ElementMask``.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..ops.reference import element_words, keep_threshold, tensor_words
from ..step import Step, Weight

BLOCK = 16  # steps that are drawn at once: it takes some hundred small tensor operations, as many as for one


def drawn(step: Step) -> list[Weight]:
    """The weights that the step perturbs: those it has drawn as a whole, or all if it draws single elements."""
    weights, settings = step.weights, step.settings
    if settings.granularity == "element" or not weights:
        return list(weights)
    ids = [weight.tensor_id for weight in weights]
    return [weights[i] for i in draw_tensors(ids, settings.beta, settings.seed, step.number)]


def draw_tensors(tensor_ids: Sequence[int], beta: float, seed: int, step: int) -> list[int]:
    """Draw each tensor with probability beta, and at least one.

    Args:
        tensor_ids: the fixed number of each tensor that can be drawn; not empty.
        beta: keep probability, in (0, 1].
        seed: 64-bit key of the generator.
        step: number of the step.

    Returns:
        The positions in ``tensor_ids`` of the drawn tensors, ascending.
    """
    return list(_draw_block(tuple(tensor_ids), beta, seed, step // BLOCK)[step % BLOCK])


@lru_cache(maxsize=16)
def _draw_block(tensor_ids: tuple[int, ...], beta: float, seed: int, block: int) -> list[list[int]]:
    """What each of the steps from ``BLOCK * block`` on draws."""
    threshold = keep_threshold(beta)
    rows = tensor_words(seed, range(BLOCK * block, BLOCK * (block + 1)), tensor_ids).tolist()
    return [
        [i for i, word in enumerate(words) if word < threshold] or [min(range(len(words)), key=words.__getitem__)]
        for words in rows
    ]


def random_scores(step: Step, stream: int, micro_batch: int, size: int, device: torch.device) -> Tensor:
    """Uniform numbers for the rows of a micro-batch: those with the largest are drawn.

    Args:
        step: the step.
        stream: what is drawn for, so that what the ascent draws says nothing of what is selected.
        micro_batch: its number.
        size: how many rows it has.
        device: where they are.
    """
    words = element_words(step.settings.seed, step.number, micro_batch, stream, 0, size, device)
    return words.to(torch.float32)
