"""Losses of samples and of sequences, and the mean that is trained on."""

from collections.abc import Callable

from torch import Tensor, nn

from esam_kernels.closure import Losses

from .data import PADDING

# From a network's outputs and the targets to one loss per sample, shape [b], or to (losses, weights) of shape [b] each.
LossFunction = Callable[[Tensor, Tensor], Losses]


def per_sample_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of each sample, shape [b], in float32 whatever precision the logits have."""
    return nn.functional.cross_entropy(logits.float(), targets, reduction="none")


def per_sequence_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross entropy of each sequence's tokens but padding, and how many those are, shape [b] each."""
    losses = nn.functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=PADDING, reduction="none"
    )
    counts = (targets != PADDING).sum(1)
    return losses.view_as(targets).sum(1) / counts, counts


def mean_loss(losses: Losses) -> Tensor:
    """What is trained on: the mean over the samples, weighted if there are weights."""
    if isinstance(losses, Tensor):
        return losses.mean()
    values, weights = losses
    return (values * weights).sum() / weights.sum()
