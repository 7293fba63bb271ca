"""What the benchmarks that train to the end have in common: their task, and one network's way through it."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim.lr_scheduler import CosineAnnealingLR

from ..measuring.clock import Stopwatch
from ..measuring.progress import Progress
from . import landscape, models
from .data import ImageData
from .methods import METHODS
from .trainers import Settings, Trainer, first_moment, trainer

TEST_BATCH = 1000
WATCHED = 4


@dataclass(frozen=True)
class Task:
    """What all methods of a benchmark have alike: images, a network, where they are, and what is asked of it.

    Attributes:
        images: to train and to test on.
        model: one of ``models.MODELS``.
        width: of the network; None: its published one.
        batch_size: of training.
        memory_format: the order of the dimensions of images and weights.
        sharpness_samples: training images on which sharpness is measured; 0: it is not.
        distances: from the weights, at which it is.
    """

    images: ImageData
    model: str
    width: int | None
    device: torch.device
    memory_format: torch.memory_format
    batch_size: int
    sharpness_samples: int
    distances: tuple[float, ...]

    def network(self, seed: int) -> nn.Module:
        """The network with the initial weights of a seed."""
        shape = {"channels": self.images.channels, "classes": self.images.classes}
        model = models.build(self.model, width=self.width, seed=seed, **shape)
        return model.to(self.device, memory_format=self.memory_format)  # type: ignore[call-overload]

    def require_valid(self, methods: Iterable[str], settings: Settings) -> None:
        """Make the network and each method with its options once, before anything is measured.

        Raises:
            ValueError: the network's or an optimizer's, which says what option it does not take.
        """
        self.network(seed=0)
        for name in methods:
            trainer(name, nn.Linear(1, 1), settings, torch.device("cpu"))


class Run:
    """One network in training, by one method from one seed.

    Attributes:
        curve: for each epoch its seconds of training, mean training loss (None if it is not finite) and, if tested,
            test accuracy in percent; of a method that climbs against momentum also ``cosine``, the mean one of the
            first moment and the next step's gradient, over the epoch's first ``WATCHED`` steps.
    """

    def __init__(self, name: str, settings: Settings, epochs: int, task: Task) -> None:
        self.task = task
        if not settings.steps:
            settings = replace(settings, steps=epochs * task.images.steps_per_epoch(task.batch_size))
        self.trainer = trainer(name, task.network(settings.seed), settings, task.device)
        self.scheduler = CosineAnnealingLR(self.trainer.optimizer, T_max=epochs)
        self.generator = torch.Generator(task.device).manual_seed(settings.seed)
        self.stopwatch = Stopwatch(task.device)
        self.curve: list[dict[str, Any]] = []
        self.climbs_against_momentum = (
            METHODS[name].options.get("ascent") == "momentum" and METHODS[name].trainer == "esam"
        )

    def train_epoch(self, progress: Progress, test: bool = True) -> None:
        """Train for an epoch, and test; host and device meet only at its end."""
        self.stopwatch.mark()
        losses: list[Tensor] = []
        cosines: list[Tensor] = []
        for inputs, targets in self.task.images.train_batches(self.task.batch_size, self.generator):
            watched = self.climbs_against_momentum and len(losses) < WATCHED
            moments = copies_of_moments(self.trainer) if watched else []
            losses.append(self.trainer.step(inputs, targets))
            if moments:
                cosines.append(cosine(moments))
            progress.update()
        self.stopwatch.mark()
        self.scheduler.step()
        (seconds,) = self.stopwatch.laps()
        loss = torch.stack(losses).mean().item()
        self.curve.append({"seconds": seconds, "train_loss": loss if math.isfinite(loss) else None})
        if cosines:
            mean = torch.stack(cosines).mean().item()
            self.curve[-1]["cosine"] = mean if math.isfinite(mean) else None
        if test:
            self.curve[-1]["test_accuracy"] = self.accuracy()

    @property
    def diverged(self) -> bool:
        """Whether the last epoch's loss is not finite."""
        return bool(self.curve) and self.curve[-1]["train_loss"] is None

    @torch.inference_mode()
    def accuracy(self) -> float:
        """Share of the test images that are classified correctly, in percent."""
        self.trainer.model.eval()
        batches = self.task.images.test_batches(TEST_BATCH)
        right = sum((self.trainer.model(images).argmax(1) == labels).sum() for images, labels in batches)
        self.trainer.model.train()
        return 100 * int(right) / len(self.task.images.test_labels)

    def sharpness(self) -> dict[str, Any] | None:
        """How sharp the minimum is that was reached, in the precision of the weights whatever the method trained in.

        None if this is not asked for, or if there is no minimum as training diverged.
        """
        task = self.task
        if self.diverged or not task.sharpness_samples:
            return None
        # A copy, since a trainer may have put autocast into its network's forward.
        model = task.network(seed=0)
        model.load_state_dict(self.trainer.model.state_dict())
        samples = list(task.images.training_sample(task.sharpness_samples, task.batch_size))
        generator = torch.Generator(task.device).manual_seed(0)  # the same random directions for all
        return landscape.measure(landscape.Landscape(model, samples), task.distances, generator)


def copies_of_moments(one: Trainer) -> list[tuple[Parameter, Tensor]]:
    """The weights with the first moments that the base optimizer has of them, as they are now."""
    moments = [(param, first_moment(one.optimizer.state.get(param, {}))) for param in one.model.parameters()]
    return [(param, moment.clone()) for param, moment in moments if moment is not None]


def cosine(moments: list[tuple[Parameter, Tensor]]) -> Tensor:
    """Of first moments and the gradients that the weights have now, each seen as one vector."""
    pairs = [(moment, param.grad) for param, moment in moments if param.grad is not None]
    v, g = (torch.cat([pair[i].flatten().float() for pair in pairs]) for i in range(2))
    return nn.functional.cosine_similarity(v, g, dim=0)
