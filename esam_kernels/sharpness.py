"""The passes of a step in their order, the sharpness-aware one and the plain one.

Source: ESAM (Du et al., ICLR 2022, arXiv 2110.03141) algorithm 1, with the scale rho / beta of the authors' code.

Contexts such as ``torch.no_grad`` are applied as decorators in the passes and never as ``with`` blocks: an exception
that lands between the body of a block and its exit would leave the context entered.
"""

from collections.abc import Callable

from torch import Tensor

from .closure import BatchClosure
from .passes.ascend import Ascent, ascend, check_gradient, check_reached
from .passes.descend import descend
from .passes.evaluate import mean
from .passes.perturb import perturb, restore
from .passes.select import look, select
from .passes.sources import along_momentum, along_previous
from .schedule import is_sharp, passes
from .step import Step

WITHOUT_PASS: dict[str, Callable[[Step], Ascent]] = {"momentum": along_momentum, "previous": along_previous}


def backward(step: Step) -> Tensor:
    """Leave the step's gradient in ``.grad``; the mean loss of the first forward, 0-dimensional, detached."""
    sharp = step.weights and is_sharp(step.settings, step.number)
    return sharp_backward(step) if sharp else plain_backward(step)


def plain_backward(step: Step) -> Tensor:
    """The base optimizer's own gradient, at w on the whole batch."""
    step.model_state.keep(step.rollback)
    return mean(descend(step, [None] * len(step.closures)))


def sharp_backward(step: Step) -> Tensor:
    """The sharpness-aware gradient: survey, ascend, perturb, look, select, descend, restore, each if it is needed."""
    state, settings = step.model_state, step.settings
    if state.shards and settings.select_over == "all" and len(step.closures) > 1:
        raise ValueError(
            "select_over='all' may leave out a micro-batch on one rank and not on another, where every rank has to "
            "gather the sharded weights for it: set select_over='micro_batch'"
        )
    todo = passes(settings, all(isinstance(closure, BatchClosure) for closure in step.closures))
    replay_random_state = state.keep(step.rollback)
    use_replicas = state.bypass_replicas(step.rollback) if len(todo) > 1 else None

    surveyed = look(step) if "survey" in todo else []
    put_back_buffers = state.keep_buffers() if surveyed else None  # to what the first forward of several has left
    ascent = ascend(step, surveyed) if "ascend" in todo else WITHOUT_PASS[settings.ascent](step)
    if "ascend" in todo and not surveyed:
        put_back_buffers = state.keep_buffers()
    before = surveyed or (ascent.losses if settings.ascent_share == 1 else [])  # of all rows at w, if they are known
    perturbation = perturb(step, ascent)

    after = []
    if "look" in todo:
        replay_random_state()  # what drops out is what the first pass dropped
        after = look(step, before)
    if use_replicas is not None:
        use_replicas()
    rows = select(step, before, after)
    descended = descend(step, rows, before, perturbation.norm)
    for weight in step.weights:  # the drawn ones were checked in pass 1; what is refused must not depend on the draw
        check_gradient(weight, weight.param.grad)
    check_reached(step, ascent)

    restore(step, perturbation)
    if put_back_buffers is not None:
        put_back_buffers()
    return mean(surveyed or ascent.losses or descended)
