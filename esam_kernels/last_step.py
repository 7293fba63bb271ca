"""What a step has found on its way, for progress bars and logs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from .passes.evaluate import MicroBatch, mean


@dataclass(frozen=True)
class LastStep:
    """What the last ``backward()``, ``step(closure)`` or ``first_step()`` did, as ``ESAM.last_step``.

    Tensors are 0-dimensional, detached, and on the device: to read one waits for it, ``float(last.loss)``, and to hold
    one does not. Like the loss that ``backward`` returns they are this rank's, but for the norm over shards.

    Attributes:
        sharp: whether it was a sharpness-aware step.
        norm: of the direction that was climbed along: the drawn weights' gradient, or what stood for it, scaled by the
            weights where these are adaptive. Where it is not finite no weight was moved. None in a plain step.
        weights: how many weights were perturbed; with ``granularity="element"`` how many are on average.
        rows: how many rows of each micro-batch the gradient was taken on; 1 where a closure by hand returned one loss
            of the micro-batch, and empty where nothing is known of rows.
    """

    sharp: bool
    norm: Tensor | None = None
    weights: int = 0
    rows: tuple[int, ...] = ()
    _at_weights: Sequence[MicroBatch] = field(default=(), repr=False)
    _perturbed: Sequence[MicroBatch] = field(default=(), repr=False)

    @cached_property
    def loss(self) -> Tensor | None:
        """The mean loss of the first pass at the weights; None if there was none, or the closure did not return it."""
        return mean(self._at_weights) if self._at_weights else None

    @property
    def first_loss(self) -> Tensor | None:
        """What ``backward`` returns: ``loss``, or where no pass ran at the weights ``perturbed_loss``."""
        return self.perturbed_loss if self.loss is None else self.loss

    @cached_property
    def perturbed_loss(self) -> Tensor | None:
        """The mean loss of the last pass, at the perturbed weights, over its rows; None if it is not known."""
        return mean(self._perturbed) if self._perturbed else None
