"""The way of the drawn weights uphill and back: w <- w + e with e = ±(rho / beta) * m*g / (‖m*g‖ + eps).

Source: ESAM (Du et al., ICLR 2022, arXiv 2110.03141) algorithm 1, with the scale rho / beta of the authors' code.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ops
from ..schedule import coefficient
from ..sharding import is_sharded, local_shard, shard_offset, sum_over_shards
from ..step import Step, Weight
from .ascend import Ascent


class Perturbation:
    """The weights that a step has moved uphill, and what they were.

    Attributes:
        norm: the norm ‖m*g‖ over all drawn weights and ranks, 0-dimensional, on a device. If it is not finite, no
            weight has moved.
        weights: how many weights have moved, on average if they are drawn one by one.
    """

    norm: Tensor

    def __init__(self) -> None:
        self.weights = 0
        self._saved: list[tuple[ops.Served, list[Tensor]]] = []

    def back_up(self, served: ops.Served) -> None:
        """Save weights that are about to be moved.

        They are recorded when they have been saved and before they move, so that an exception at any instant finds
        either weights that have not moved or a record of whole backups. A record that the moving operator left would
        be made by a call after it, which an exception can come before.
        """
        self._saved.append((served, served.back_up()))

    @torch.no_grad()
    def restore(self) -> None:
        """Put every weight back, bit for bit. Doing it again changes nothing."""
        for served, backups in self._saved:
            served.restore_(backups)


@torch.no_grad()
def perturb(step: Step, ascent: Ascent) -> Perturbation:
    """Move the drawn weights along their gradients, which are given up; each rank moves its own shards.

    The undo is registered with the step's rollback.
    """
    perturbation = Perturbation()
    step.rollback.undo_by(perturbation.restore)
    lists = []  # an operator takes weights of one kind, adaptive or not
    for adaptive in (False, True):
        kind = [
            (w, g) for w, g in zip(ascent.weights, ascent.grads) if g is not None and w.settings.adaptive is adaptive
        ]
        if kind:
            weights, grads = [weight for weight, _ in kind], [grad for _, grad in kind]
            params = [weight.param for weight in weights]
            if step.model_state.shards:
                params, grads = list(map(local_shard, params)), list(map(local_shard, grads))
            coefficients = [coefficient(step.settings, weight.settings) for weight in weights]
            lists.append((ops.Served(params), grads, coefficients, adaptive, element_mask(step, weights)))
    if len(lists) == 1 and not is_sharded(ascent.weights[0].param):
        norm = None  # these are all, so that the operator computes it
    else:
        squares = [served.squared_norm(grads, adaptive, mask) for served, grads, _, adaptive, mask in lists]
        nothing = [torch.zeros((), device=weight.param.device) for weight in step.weights[:1]]
        square = torch.stack([square.to(squares[0]) for square in squares] or nothing).sum()
        norm = perturbation.norm = sum_over_shards(square, [weight.param for weight in ascent.weights]).sqrt()
    for served, grads, coefficients, adaptive, mask in lists:
        perturbation.back_up(served)
        perturbation.norm = served.perturb_(grads, coefficients, norm, adaptive, mask)
    count = sum(weight.param.numel() for weight, grad in zip(ascent.weights, ascent.grads) if grad is not None)
    perturbation.weights = round(count * step.settings.beta) if step.settings.granularity == "element" else count
    ascent.grads.clear()
    return perturbation


def restore(step: Step, perturbation: Perturbation) -> None:
    """Put the weights back, and give up what copies of the perturbed ones there are."""
    perturbation.restore()
    step.model_state.forget_weight_copies()


def element_mask(step: Step, weights: Sequence[Weight]) -> ops.ElementMask | None:
    """What the operators draw for these weights: kept elements, and the rounding of low precision."""
    settings = step.settings
    by_element = settings.granularity == "element"
    if not by_element and not any(weight.param.dtype in (torch.bfloat16, torch.float16) for weight in weights):
        return None
    ids = [weight.tensor_id for weight in weights]
    offsets = [shard_offset(weight.param) for weight in weights]
    return ops.ElementMask(settings.seed, step.number, ids, settings.beta if by_element else 1.0, offsets)
