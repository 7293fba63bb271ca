"""Begins and ends the passes of a step: each finds the buffers from before the step, and the first one's stay."""

from collections.abc import Callable

from ..closure import BatchClosure
from ..step import Step
from .current import enter, leave


class Between:
    """Stands before the first pass of a step, between each two, and after the last."""

    def __init__(self, step: Step, passes: int) -> None:
        """Keep what passes must not disturb; the step's rollback puts it back if the step fails."""
        self._step = step
        self._several = passes > 1
        self._start = step.model_state.keep(step.rollback, step.findings, self._several)
        # The gradient of the last pass alone is reduced over replicas; an ordinary closure reduces in each.
        ordinary = step.ordinary is not None
        self._use_replicas = step.model_state.bypass_replicas(step.rollback, ordinary) if self._several else None
        self._put_back: Callable[[], None] | None = None  # to what the first of several passes has left

    def begin(self, name: str) -> None:
        """Before a pass at the weights or near them: begin with the buffers from before the step."""
        if name == "descend" and self._use_replicas is not None:
            self._use_replicas()
        if self._put_back is not None and name != "look":  # which calls replay() itself, twice if it runs twice
            self._start.buffers()
        enter(self._step, name)

    def replay(self) -> None:
        """Before a forward that is compared with another: begin with its random numbers, too, and drop out the same."""
        self._start.buffers()
        self._start.random_state()
        self._step.model_state.forget_weight_copies()

    def end(self) -> None:
        """After a pass: what the first one has left is what stays."""
        step = self._step
        if not self._several:
            self._start.written.first_pass_has_run()
        elif self._put_back is None:
            self._put_back = step.model_state.keep_first_pass(self._start, step.findings, step.number)

    def weights_have_moved(self) -> None:
        """After the perturbation: closures keep no outputs from now on, and its writes do not count as a forward's."""
        for closure in batch_closures(self._step):
            closure.leave_weights()
        if not self._several:
            self._start.written.first_pass_begins()

    def finish(self) -> None:
        """After the last pass, and when the weights are where they were."""
        if self._put_back is not None:
            self._put_back()
        leave(self._step)


def batch_closures(step: Step) -> list[BatchClosure]:
    """Those of the closures that know their batch."""
    return [closure for closure in step.closures if isinstance(closure, BatchClosure)]
