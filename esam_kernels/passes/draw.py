"""Stochastic weight perturbation: which weights a step draws, from the seed and the step's number alone.

Source: ESAM (Du et al., ICLR 2022, arXiv 2110.03141) section 3.1. Masks of single elements are drawn inside the
operators, by ``ops.ElementMask``.
"""

from collections.abc import Sequence
from functools import lru_cache

from ..ops.reference import keep_threshold, tensor_words
from ..step import Step, Weight

BLOCK = 16  # steps that are drawn at once: some hundred small tensor operations take as long for one


def drawn(step: Step) -> list[Weight]:
    """The weights that the step perturbs as a whole, or elements of which it perturbs."""
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
