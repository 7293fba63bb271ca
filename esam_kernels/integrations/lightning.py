"""PyTorch Lightning with manual optimization, for what automatic optimization cannot do.

Automatic optimization needs nothing of this: ``configure_optimizers`` returns ``ESAM(..., gamma=1)``.
"""

from typing import Any

from torch import Tensor, nn

from ..closure import Closure
from ..optimizer import ESAM


class ManualESAM:
    """Mixin for a ``LightningModule``: samples are selected, gradients accumulated, and float16 has its scaler.

    Example::

        class Classifier(ManualESAM, LightningModule):
            accumulate_grad_batches = 4

            def training_step(self, batch, batch_idx):
                loss = self.esam_step(batch_closure(self.replica, loss_fn, *batch))

    It stands before ``LightningModule`` among the bases, of ``pytorch_lightning`` or ``lightning`` alike. Schedulers
    are stepped as in automatic optimization. Who overrides ``on_train_epoch_end`` or ``on_before_optimizer_step`` calls
    ``super()``'s.

    Attributes:
        accumulate_grad_batches: how many batches make a step, as the Trainer's argument, which Lightning refuses here.
        gradient_clip_val: as the Trainer's argument, which Lightning refuses here, too.
        gradient_clip_algorithm: "norm" or "value".
    """

    accumulate_grad_batches: int = 1
    gradient_clip_val: float | None = None
    gradient_clip_algorithm: str = "norm"

    # What LightningModule has.
    trainer: Any
    optimizers: Any
    clip_gradients: Any
    lr_scheduler_step: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False
        self._micro_batches: list[Closure] = []

    @property
    def replica(self) -> nn.Module:
        """What closures call: this module, or what wraps it, such as ``DistributedDataParallel``."""
        return self.trainer.strategy.model

    def esam_step(self, closure: Closure) -> Tensor | None:
        """Make a step, once the closures of all its batches are there; call it in ``training_step``.

        Args:
            closure: of one batch, such as ``batch_closure(self.replica, loss_fn, inputs, targets)``.

        Returns:
            What ``ESAM.backward`` does, or None where more batches of the step are to come.

        Raises:
            TypeError: if ``configure_optimizers`` does not return one ESAM.
            ValueError: if ``accumulate_grad_batches`` is no whole number from 1 on.
        """
        optimizer, batches = self.optimizers(), self.accumulate_grad_batches
        if not isinstance(optimizer, ESAM):
            raise TypeError(f"configure_optimizers has returned {optimizer!r}: let it return one ESAM")
        if not isinstance(batches, int) or batches < 1:
            raise ValueError(f"accumulate_grad_batches = {batches!r}: a whole number >= 1 is needed")
        self._micro_batches.append(closure)
        if len(self._micro_batches) < batches and not self.trainer.is_last_batch:
            return None
        closures, self._micro_batches = self._micro_batches, []
        loss = optimizer.backward(closures, getattr(self.trainer.precision_plugin, "scaler", None))
        optimizer.step()
        self._step_schedulers("step", self.trainer.global_step)
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Clip the gradients, which Lightning has unscaled."""
        super().on_before_optimizer_step(optimizer)  # type: ignore[misc]
        if self.gradient_clip_val is not None:
            self.clip_gradients(optimizer, self.gradient_clip_val, self.gradient_clip_algorithm)

    def on_train_epoch_start(self) -> None:
        """Drop the closures of an epoch that was left in the middle of a step."""
        super().on_train_epoch_start()  # type: ignore[misc]
        self._micro_batches = []

    def on_train_epoch_end(self) -> None:
        """Step the schedulers of epochs."""
        super().on_train_epoch_end()  # type: ignore[misc]
        self._step_schedulers("epoch", self.trainer.current_epoch + 1)

    def _step_schedulers(self, interval: str, count: int) -> None:
        for config in self.trainer.lr_scheduler_configs:
            if config.interval != interval or count % config.frequency:
                continue
            metrics = self.trainer.callback_metrics
            if config.reduce_on_plateau and config.monitor not in metrics:
                raise ValueError(f"the scheduler's monitor {config.monitor!r} is not logged: {', '.join(metrics)} are")
            self.lr_scheduler_step(config.scheduler, metrics[config.monitor] if config.reduce_on_plateau else None)
