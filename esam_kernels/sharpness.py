"""The passes of a step in their order, the sharpness-aware one and the plain one.

Source: ESAM (Du et al., ICLR 2022, arXiv 2110.03141) algorithm 1, with the scale rho / beta of the authors' code.

Contexts such as ``torch.no_grad`` are applied as decorators in the passes and never as ``with`` blocks: an exception
that lands between the body of a block and its exit would leave the context entered.
"""

from torch import Tensor

from .options import Settings
from .passes.ascend import ascend, check_gradient, check_reached
from .passes.current import enter, leave
from .passes.descend import descend
from .passes.evaluate import mean
from .passes.perturb import perturb, restore
from .passes.select import look, select
from .step import Step


def is_sharp(step: Step) -> bool:
    """Whether the step is a sharpness-aware one."""
    return bool(step.weights) and step.number % step.settings.interval == 0


def passes(settings: Settings) -> tuple[str, ...]:
    """The passes of a sharpness-aware step: forwards of the whole batch, but for the last."""
    looks = settings.gamma < 1 and settings.selection == "increase"
    return ("ascend", "look", "descend") if looks else ("ascend", "descend")


def backward(step: Step) -> Tensor:
    """Leave the step's gradient in ``.grad``; the mean loss at w, 0-dimensional, detached, on the losses' device."""
    return sharp_backward(step) if is_sharp(step) else plain_backward(step)


def plain_backward(step: Step) -> Tensor:
    """The base optimizer's own gradient, at w on the whole batch."""
    start = step.model_state.keep(step.rollback, step.findings)
    enter(step, "descend")
    losses = descend(step, [None] * len(step.closures))
    start.first_pass_has_run()
    leave()
    return mean(losses)


def sharp_backward(step: Step) -> Tensor:
    """The sharpness-aware gradient: ascend, perturb, look, select, descend, restore."""
    state = step.model_state
    if state.shards and step.settings.select_over == "all" and len(step.closures) > 1:
        raise ValueError(
            "select_over='all' may leave out a micro-batch on one rank and not on another, where every rank has to "
            "gather the sharded weights for it: set select_over='micro_batch'"
        )
    start = state.keep(step.rollback, step.findings, send_buffers=True)
    use_replicas = state.bypass_replicas(step.rollback)

    enter(step, "ascend")
    ascent = ascend(step)
    start.first_pass_has_run()
    put_back_buffers = state.keep_buffers()
    perturbation = perturb(step, ascent)

    after = []
    if "look" in passes(step.settings):
        enter(step, "look")
        after = look(step, ascent.before, start)
    use_replicas()
    rows = select(step, ascent.before, after)

    enter(step, "descend")
    start.buffers()
    descend(step, rows, ascent.before, perturbation.norm)
    for weight in step.weights:  # the drawn ones were checked in pass 1; what is refused must not depend on the draw
        check_gradient(weight, weight.param.grad)
    check_reached(ascent)

    restore(step, perturbation)
    put_back_buffers()
    leave()
    return mean(ascent.before)
