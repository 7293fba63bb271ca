"""Losses of samples that have several targets each, as (losses, weights) for ``ESAM.backward``."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


def token_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each sequence over its tokens, and the sequence's weight, for a mean over all tokens.

    The weighted mean over the batch is ``torch.nn.functional.cross_entropy`` of all tokens with the same options.
    Logits are not shifted: where those at t predict token t + 1, give ``logits[:, :-1]`` and ``tokens[:, 1:]``.

    Args:
        logits: shape [b, T, V], or [b, V] with one target for each sample.
        targets: classes, int64, shape [b, T] or [b].
        weight: of each class, shape [V].
        ignore_index: the target of tokens that do not count, such as padding.
        label_smoothing: share of the target that is spread over all classes, in [0, 1].

    Returns:
        Losses and weights, shape [b] each: the mean loss of a sequence's tokens, and their number, or the sum of their
        classes' weights. A sequence without tokens that count has 0 and 0.

    Raises:
        ValueError: if the shapes do not fit.
    """
    if logits.dim() not in (2, 3) or logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"token_loss was given logits of shape {list(logits.shape)} and targets of shape {list(targets.shape)}: "
            "logits [b, T, V] and targets [b, T] are needed (logits.transpose(1, 2) makes them of [b, V, T])"
        )
    classes, b = targets.flatten(), len(targets)
    each = cross_entropy(
        logits.flatten(0, -2), classes, weight, ignore_index=ignore_index, reduction="none",
        label_smoothing=label_smoothing,
    )  # fmt: skip
    counts = (classes != ignore_index).to(torch.promote_types(each.dtype, torch.float32))
    if weight is not None:
        counts = counts * weight.to(counts.dtype)[classes.masked_fill(classes == ignore_index, 0)]
    totals = counts.view(b, len(classes) // b).sum(1)
    sums = each.to(counts.dtype).view(b, len(classes) // b).sum(1)
    return sums / totals.masked_fill(totals == 0, 1), totals
