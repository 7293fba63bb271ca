"""The passes of a step in their order, the sharpness-aware one and the plain one.

Source: ESAM (Du et al., ICLR 2022, arXiv 2110.03141) algorithm 1, with the scale rho / beta of the authors' code.

Contexts such as ``torch.no_grad`` are applied as decorators in the passes and never as ``with`` blocks: an exception
that lands between the body of a block and its exit would leave the context entered.
"""

from collections.abc import Callable

from torch import Tensor

from .closure import BatchClosure
from .passes.ascend import Ascent, ascend, check_gradient, check_reached
from .passes.current import enter, leave
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
    start = step.model_state.keep(step.rollback, step.findings, several=False)
    enter(step, "descend")
    losses = descend(step, [None] * len(step.closures))
    start.written.first_pass_has_run()
    leave(step)
    return mean(losses)


def sharp_backward(step: Step) -> Tensor:
    """The sharpness-aware gradient: survey, ascend, perturb, look, select, descend, restore, each if it is needed."""
    state, settings = step.model_state, step.settings
    if state.shards and settings.select_over == "all" and len(step.closures) > 1:
        raise ValueError(
            "select_over='all' may leave out a micro-batch on one rank and not on another, where every rank has to "
            "gather the sharded weights for it: set select_over='micro_batch'"
        )
    todo = passes(settings, all(isinstance(closure, BatchClosure) for closure in step.closures))
    several = len(todo) > 1
    start = state.keep(step.rollback, step.findings, several)
    use_replicas = state.bypass_replicas(step.rollback) if several else None
    put_back_first: Callable[[], None] | None = None  # what the first of several passes has left

    surveyed = []
    if "survey" in todo:
        enter(step, "survey")
        surveyed = look(step, start)
        put_back_first = state.keep_first_pass(start, step.findings)
    if "ascend" in todo:
        enter(step, "ascend")
        if surveyed:
            start.buffers()
        ascent = ascend(step, surveyed)
        put_back_first = put_back_first or state.keep_first_pass(start, step.findings)
    else:
        ascent = WITHOUT_PASS[settings.ascent](step)
    before = surveyed or (ascent.losses if settings.ascent_share == 1 else [])  # of all rows at w, if they are known
    perturbation = perturb(step, ascent)
    if not several:
        start.written.first_pass_begins()

    after = []
    if "look" in todo:
        enter(step, "look")
        after = look(step, start, before)
    if use_replicas is not None:
        use_replicas()
    rows = select(step, before, after)

    enter(step, "descend")
    if several:
        start.buffers()
    descended = descend(step, rows, before, perturbation.norm)
    if not several:
        start.written.first_pass_has_run()
    for weight in step.weights:  # the drawn ones were checked in pass 1; what is refused must not depend on the draw
        check_gradient(weight, weight.param.grad)
    check_reached(step, ascent)

    restore(step, perturbation)
    if put_back_first is not None:
        put_back_first()
    leave(step)
    return mean(surveyed or ascent.losses or descended)
