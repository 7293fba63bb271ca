"""Which pass of a step is running, for models that keep state outside of buffers."""

import threading
from collections import defaultdict
from functools import partial

from ..eager import eager
from ..step import Step

Running = list[tuple[Step, str, str]]  # each with its pass and its first one; a closure may run another step

_running: dict[int, Running] = defaultdict(list)  # by thread


def _here() -> Running:
    """Of this thread, or if it has none and one other has, of that: a forward may use threads, and so may autograd."""
    own = _running.get(threading.get_ident())
    if own:
        return own
    others = list(_running.values())
    return others[0] if len(others) == 1 else []


@eager
def current_pass() -> str | None:
    """Which pass of a step calls the model: "survey", "ascend", "look" or "descend"; None outside of a step.

    With an ``ascent_share`` or another ``ascent`` a "survey" of all losses may come first; a plain step is "descend".
    A step runs the model several times. Buffers begin each pass as they were before the step and end it as the first
    pass left them, but what a model keeps elsewhere is updated in every pass: counters, metrics, a momentum encoder, a
    generator of its own. Guard such an update, so that a step makes it once:

        if current_pass() in (None, first_pass()):
            self.update_momentum_encoder()

    In a thread that runs no step it is the pass of the step that another thread runs, if there is one such.
    """
    steps = _here()
    return steps[-1][1] if steps else None


@eager
def first_pass() -> str | None:
    """The first pass of the step that is running; None outside of a step."""
    steps = _here()
    return steps[-1][2] if steps else None


def enter(step: Step, name: str) -> None:
    """Say that a pass begins; the step's rollback takes it back."""
    steps = _running[threading.get_ident()]
    if steps and steps[-1][0] is step:
        steps[-1] = (step, name, steps[-1][2])
    else:
        step.rollback.undo_by(partial(leave, step))
        steps.append((step, name, name))


def leave(step: Step) -> None:
    """Say that the step has no more passes; one that it runs in goes on."""
    thread = threading.get_ident()
    steps = _running.get(thread, [])
    if steps and steps[-1][0] is step:
        steps.pop()
    if not steps:
        _running.pop(thread, None)
