"""The Transformers library's Trainer with ESAM: ``ESAMTrainer`` in place of ``Trainer``."""

import inspect
from collections.abc import Mapping, Sequence
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
from ..schedule import draws_rows

CHECKS = 20


class ESAMTrainer(Trainer):
    """A ``Trainer`` whose steps are ESAM's, over the optimizer that its arguments say.

    Example::

        trainer = ESAMTrainer(model, arguments, train_dataset=dataset, rho=0.05, gamma=1)

    With ``gamma=1`` and ``ascent_share=1`` the loss is the Trainer's own: the model's, with label smoothing, or
    ``compute_loss_func``'s. Below, samples are selected by the losses of ``sample_losses``, the cross-entropy of the
    classes in ``labels``: one for each sample, or one for each token. Where that is not the model's own loss, the first
    step says so, and another is given by overriding ``sample_losses``.

    ``gradient_accumulation_steps`` makes one perturbation of all batches of a step. The loss that is logged is the one
    at the weights. With several processes, each climbs along its own batches' gradient.

    Args:
        args: of ``Trainer``.
        kwargs: of ``Trainer``, and ESAM's options.

    Raises:
        ValueError: if an option is out of its range, or ``compute_loss_func`` is given, or ``compute_loss`` is
            overridden, where samples are selected.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        settings = options.make(self._options, base_has_betas=False)
        self._batches: list[Any] = []  # of the step whose last batch is to come
        self._shifts: bool | None = None  # whether logits are of the next token, once that is found out
        self._to_check = CHECKS  # batches of which the loss is still to be compared with the model's own
        super().__init__(*args, **kwargs)
        own = type(self).sample_losses is not ESAMTrainer.sample_losses
        by_method = type(self).compute_loss is not Trainer.compute_loss
        if (self.compute_loss_func is not None or by_method) and not own and _selects([settings]):
            raise ValueError(
                f"compute_loss{'' if by_method else '_func'} returns one loss of a batch, of which gamma < 1 cannot "
                "take samples: set gamma=1 (and ascent_share=1), or override sample_losses"
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

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, without what a training that ended within a step has left of it."""
        self._batches = []
        return super().train(*args, **kwargs)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Keep the batch; with the last one of a step, leave its gradient in ``.grad``, for clipping and the step."""
        self._batches.append(inputs)
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        batches, self._batches = self._batches, []
        esam = self.esam
        assert esam is not None
        model.train()
        if callable(train := getattr(esam, "train", None)):  # of schedule-free optimizers, which move the weights
            train()
        if _selects(esam.param_groups, esam._keys):
            return self._step_by_samples(model, batches)
        step = partial(super().training_step, model, num_items_in_batch=num_items_in_batch)

        def closure() -> Tensor:
            esam.zero_grad()
            losses = [self.accelerator.no_sync(model)(step)(inputs=batch) for batch in batches[:-1]]
            return torch.stack([*losses, step(inputs=batches[-1])]).sum()

        loss = esam._run_ordinary(closure)
        esam._progress.has_gradient = True  # for the step that the Trainer takes once it has clipped it
        return loss

    def _step_by_samples(self, model: nn.Module, batches: list[Any]) -> Tensor:
        assert self.esam is not None
        closures = []
        for batch in batches:
            inputs = dict(self._prepare_inputs(batch))
            if "labels" not in inputs:
                raise ValueError(
                    f"samples cannot be selected without labels, and the batch has {', '.join(inputs)}: set gamma=1 "
                    "(and ascent_share=1) for the model's own loss"
                )
            if self._to_check and type(self).sample_losses is ESAMTrainer.sample_losses:
                self._shifts = self._find_shift(inputs)
                # Of one class alone a weighted mean is the mean.
                several = len(inputs["labels"][inputs["labels"] != -100].unique()) > 1
                alone = self.accelerator.num_processes == 1  # several have to run as many forwards each
                self._to_check = self._to_check - 1 if alone and not several else 0
            labels = inputs["labels"]
            if not getattr(getattr(self.model, "config", None), "is_encoder_decoder", False):
                del inputs["labels"]  # else the model needs them for its decoder
            closures.append(batch_closure(model, self.sample_losses, inputs, labels))
        model.train()  # which looking for the model's own loss has changed
        return self.esam.backward(closures, self.accelerator.scaler)

    def sample_losses(self, outputs: Any, labels: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """One loss for each sample, or losses and weights: their mean is the model's own loss, with label smoothing.

        Args:
            outputs: the model's.
            labels: the batch's, -100 where there is none.
        """
        return _cross_entropy(outputs, labels, bool(self._shifts), self.args.label_smoothing_factor)

    @torch.no_grad()
    def _find_shift(self, inputs: dict[str, Any]) -> bool:
        """Whether the logits at a token are of the next one: with which of both the loss is the model's own.

        Raises:
            ValueError: if it is with none of them.
        """
        model: Any = self.model
        names = inspect.signature(type(model).forward).parameters
        if "labels" not in names and all(name.kind is not inspect.Parameter.VAR_KEYWORD for name in names.values()):
            return self._loss_shifts_labels
        model.eval()  # neither statistics nor random numbers are touched
        outputs = model(**inputs)
        own = outputs.get("loss") if isinstance(outputs, dict) else outputs[0]
        found = {}
        for shifts in (False, True) if inputs["labels"].dim() > 1 else (False,):
            losses, weights = _cross_entropy(outputs, inputs["labels"], shifts)
            found[shifts] = float((losses * weights).sum() / weights.sum())
        if own is None:
            return self._loss_shifts_labels
        shifts = min(found, key=lambda one: abs(found[one] - float(own)))
        if abs(found[shifts] - float(own)) > 1e-3 * abs(float(own)):
            raise ValueError(
                f"the model's own loss is {float(own):.6g}, and the mean cross-entropy of its logits "
                f"{found[shifts]:.6g}: set gamma=1 (and ascent_share=1) for the model's own, or override sample_losses"
            )
        return shifts


def _selects(groups: Sequence[dict[str, Any]], keys: Mapping[str, str] | None = None) -> bool:
    """Whether steps take a part of the samples."""
    settings, _ = options.read(groups, keys or {name: name for name in groups[0]})
    return draws_rows(settings)


def _cross_entropy(outputs: Any, labels: Tensor, shifts: bool, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """Of each sample.

    Raises:
        TypeError: if the labels are no classes.
    """
    # In a tuple they come first, or second to the loss.
    logits = outputs["logits"] if isinstance(outputs, dict) else next(one for one in outputs if one.dim() > 0)
    if labels.is_floating_point() or logits.shape[:-1] != labels.shape or logits.shape[-1] == 1:
        raise TypeError(
            f"{labels.dtype} labels of shape {list(labels.shape)} for logits of shape {list(logits.shape)} are no "
            "classes: set gamma=1 (and ascent_share=1) for the model's own loss, or override sample_losses"
        )
    if shifts:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return token_loss(logits.float(), labels, label_smoothing=smoothing)


ESAMTrainer.__init__.__signature__ = options.signature(inspect.signature(ESAMTrainer.__init__))  # type: ignore[attr-defined]
