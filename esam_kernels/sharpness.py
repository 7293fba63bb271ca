"""The passes of a step in their order, the sharpness-aware one and the plain one.

Source: ESAM (Du et al., ICLR 2022, arXiv 2110.03141) algorithm 1, with the scale rho / beta of the authors' code.

Contexts such as ``torch.no_grad`` are applied as decorators in the passes and never as ``with`` blocks: an exception
that lands between the body of a block and its exit would leave the context entered.
"""

from collections.abc import Callable, Sequence
from itertools import zip_longest

from torch import Tensor

from .closure import BatchClosure, Closure
from .last_step import LastStep
from .passes.ascend import Ascent, ascend, check_gradient, check_reached
from .passes.between import Between, batch_closures
from .passes.descend import descend, unscaled
from .passes.evaluate import MicroBatch
from .passes.ordinary import ascend_by_closure, descend_by_closure
from .passes.perturb import perturb, restore
from .passes.select import look, select
from .passes.sources import along_momentum, along_previous
from .schedule import is_sharp, passes
from .step import Step

WITHOUT_PASS: dict[str, Callable[[Step], Ascent]] = {"momentum": along_momentum, "previous": along_previous}


def backward(step: Step) -> LastStep:
    """Leave the step's gradient in ``.grad``."""
    for closure in batch_closures(step):
        closure.begin()
    sharp = step.weights and is_sharp(step.settings, step.number)
    return sharp_backward(step) if sharp else plain_backward(step)


def plain_backward(step: Step) -> LastStep:
    """The base optimizer's own gradient, at w on the whole batch."""
    between = Between(step, passes=1)
    rows: list[Tensor | None] = [None] * len(step.closures)

    between.begin("descend")
    losses = descend_by_closure(step, step.ordinary) if step.ordinary else descend(step, rows)
    between.end()
    for closure in batch_closures(step):
        closure.leave_weights()
    between.finish()
    return LastStep(False, rows=counts(step.closures, rows, losses), _at_weights=losses)


def sharp_backward(step: Step) -> LastStep:
    """The sharpness-aware gradient: survey, ascend, perturb, look, select, descend, restore, each if it is needed."""
    settings = step.settings
    if step.model_state.shards and settings.select_over == "all" and len(step.closures) > 1:
        raise ValueError(
            "select_over='all' may leave out a micro-batch on one rank and not on another, where every rank has to "
            "gather the sharded weights for it: set select_over='micro_batch'"
        )
    todo = passes(settings, len(batch_closures(step)) == len(step.closures))
    between = Between(step, len(todo))

    surveyed: list[MicroBatch] = []
    if "survey" in todo:
        between.begin("survey")
        surveyed = look(step, between)
        between.end()
    if "ascend" in todo:
        between.begin("ascend")
        ascent = ascend_by_closure(step, step.ordinary) if step.ordinary else ascend(step, surveyed)
        between.end()
    else:
        ascent = WITHOUT_PASS[settings.ascent](step)
    before = surveyed or (ascent.losses if settings.ascent_share == 1 else [])  # of all rows at w, if they are known

    perturbation = perturb(step, ascent)
    between.weights_have_moved()

    after: list[MicroBatch] = []
    if "look" in todo:
        between.begin("look")
        after = look(step, between, before)
    rows = select(step, before, after)

    between.begin("descend")
    if step.ordinary:
        descended = descend_by_closure(step, step.ordinary)
    else:
        descended = descend(step, rows, before, perturbation.norm)
    between.end()
    for weight in step.weights:  # the drawn ones were checked in pass 1; what is refused must not depend on the draw
        check_gradient(weight, weight.param.grad)
    check_reached(step, ascent)

    restore(step, perturbation)
    between.finish()
    return LastStep(
        True,
        unscaled(step, perturbation.norm) if ascent.losses else perturbation.norm,
        perturbation.weights,
        counts(step.closures, rows, descended),
        _at_weights=surveyed or ascent.losses,
        _perturbed=descended,
    )


def counts(closures: Sequence[Closure], rows: Sequence[Tensor | None], losses: Sequence[MicroBatch]) -> tuple[int, ...]:
    """How many rows of each micro-batch the last pass took."""
    return tuple(
        len(index) if index is not None else closure.size if isinstance(closure, BatchClosure) else len(one.losses)
        # Only where all rows are taken is there a loss of each micro-batch, and of some no row may be.
        for closure, index, one in zip_longest(closures, rows, losses if closures else ())
    )
