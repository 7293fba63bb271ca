"""The Transformers library's Trainer with ESAM: ``ESAMTrainer`` in place of ``Trainer``."""

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from .. import options
from ..closure import batch_closure
from ..losses import token_loss
from ..optimizer import ESAM
from ..options import OPTIONS


class ESAMTrainer(Trainer):
    """A ``Trainer`` whose steps are ESAM's, over the optimizer that its arguments say.

        trainer = ESAMTrainer(model, arguments, train_dataset=dataset, rho=0.05, gamma=1)

    With ``gamma=1`` and ``ascent_share=1`` the loss is the Trainer's own: the model's, with label smoothing, or
    ``compute_loss_func``'s. Below, samples are selected by the losses of ``sample_losses``, the cross-entropy of what
    ``labels`` there are: one for each sample, or one for each token. Another loss is given by overriding it.

    ``gradient_accumulation_steps`` makes one perturbation of all batches of a step. The loss that is logged is the one
    at the weights. With several processes, each climbs along its own batches' gradient.

    Args:
        args: of ``Trainer``.
        kwargs: of ``Trainer``, and ESAM's options.

    Raises:
        ValueError: if an option is out of its range, or ``compute_loss_func`` is given where samples are selected.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        options.make(self._options, base_has_betas=False)
        self._batches: list[Any] = []  # of the step whose last batch is to come
        super().__init__(*args, **kwargs)
        own = type(self).sample_losses is not ESAMTrainer.sample_losses
        if self.compute_loss_func is not None and self._selects(self._options) and not own:
            raise ValueError(
                "compute_loss_func returns one loss of a batch, of which gamma < 1 cannot take samples: set gamma=1 "
                "(and ascent_share=1), or override sample_losses"
            )

    @property
    def esam(self) -> ESAM | None:
        """The optimizer, without what Accelerate wraps around it; None before it is created."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return optimizer if isinstance(optimizer, ESAM) else None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer that the Trainer's arguments say, or that it was given, with ESAM around it."""
        if self.is_deepspeed_enabled:
            raise ValueError("DeepSpeed runs backward() and steps in one, between which ESAM has its passes: leave it")
        optimizer = super().create_optimizer(model)
        if self.esam is None:
            self.optimizer = optimizer = ESAM(None, optimizer, **self._options)
        return optimizer

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Keep the batch; with the last one of a step, leave its gradient in ``.grad``, for clipping and the step."""
        self._batches.append(inputs)
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        batches, self._batches = self._batches, []
        assert self.esam is not None
        if self._selects(self.esam.param_groups[0]):
            return self._step_by_samples(model, batches)
        step = partial(super().training_step, model, num_items_in_batch=num_items_in_batch)

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            losses = [self.accelerator.no_sync(model)(step)(inputs=batch) for batch in batches[:-1]]
            return torch.stack([*losses, step(inputs=batches[-1])]).sum()

        return self.esam._run_ordinary(closure)

    def _step_by_samples(self, model: nn.Module, batches: list[Any]) -> Tensor:
        model.train()
        assert self.esam is not None
        closures = []
        for batch in batches:
            inputs = dict(self._prepare_inputs(batch))
            if "labels" not in inputs:
                raise ValueError(
                    f"samples cannot be selected without labels, and the batch has {', '.join(inputs)}: set gamma=1 "
                    "(and ascent_share=1) for the model's own loss"
                )
            labels = inputs["labels"]
            if not getattr(getattr(self.model, "config", None), "is_encoder_decoder", False):
                del inputs["labels"]  # else the model needs them for its decoder
            closures.append(batch_closure(model, self.sample_losses, inputs, labels))
        return self.esam.backward(closures, self.accelerator.scaler)

    def sample_losses(self, outputs: Any, labels: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """One loss for each sample, or losses and weights; the mean is what the model's own loss is.

        Args:
            outputs: the model's.
            labels: the batch's, -100 where there is none.

        Raises:
            TypeError: if the labels are no classes.
        """
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
        if labels.is_floating_point() or logits.shape[:-1] != labels.shape or logits.shape[-1] == 1:
            raise TypeError(
                f"{labels.dtype} labels of shape {list(labels.shape)} for logits of shape {list(logits.shape)} are no "
                "classes: set gamma=1 (and ascent_share=1) for the model's own loss, or override sample_losses"
            )
        if self._loss_shifts_labels:
            logits, labels = logits[:, :-1], labels[:, 1:]
        return token_loss(logits, labels, label_smoothing=self.args.label_smoothing_factor)

    @staticmethod
    def _selects(settings: dict[str, Any]) -> bool:
        """Whether a step takes a part of the samples."""
        return any(settings.get(name, OPTIONS[name].default) < 1 for name in ("gamma", "ascent_share"))


ESAMTrainer.__init__.__signature__ = options.signature(inspect.signature(ESAMTrainer.__init__))  # type: ignore[attr-defined]
