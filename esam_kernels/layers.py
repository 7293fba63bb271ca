"""Parameter groups by kind of layer, for perturbing some kinds alone."""

from collections.abc import Callable
from typing import Any

from torch import nn


def is_normalization(layer: nn.Module) -> bool:
    """Whether a layer normalizes: PyTorch's own, and those whose class is called so, such as ``LlamaRMSNorm``."""
    own = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
    return isinstance(layer, own) or type(layer).__name__.endswith("Norm")


def param_groups_by_layer(
    model: nn.Module,
    perturbed: Callable[[nn.Module], bool] | tuple[type[nn.Module], ...] = is_normalization,
    **options: Any,
) -> list[dict[str, Any]]:
    """Two parameter groups: the layers that are to be perturbed, and all else with ``rho=0``.

    By default the first one holds the normalization layers, as SAM-ON has it (Mueller et al., NeurIPS 2023, arXiv
    2306.04226): with ``beta=1`` and ``gamma=1``, and a larger ``rho`` than SAM's. The first pass then computes no
    weight gradient but theirs:

        groups = param_groups_by_layer(model, rho=0.5)
        optimizer = ESAM(groups, torch.optim.SGD, lr=0.1, momentum=0.9, beta=1, gamma=1)

    Args:
        model: the model.
        perturbed: whether a layer is to be perturbed, or the classes that are. It is asked of each module, for the
            parameters that the module itself has.
        options: of the perturbed layers' group, such as ``rho``, ``adaptive`` or ``weight_decay``.

    Raises:
        ValueError: if no such layer has a parameter.
    """
    wanted = (lambda layer: isinstance(layer, perturbed)) if isinstance(perturbed, tuple) else perturbed
    chosen = {id(param) for layer in model.modules() if wanted(layer) for param in layer.parameters(recurse=False)}
    params = list(model.parameters())
    first = [param for param in params if id(param) in chosen]
    rest = [param for param in params if id(param) not in chosen]
    if not first:
        names = sorted({type(layer).__name__ for layer in model.modules() if list(layer.parameters(recurse=False))})
        raise ValueError(
            "no layer that is to be perturbed has a parameter: give the classes of some that have, as "
            f"perturbed=(nn.LayerNorm,); the model has {', '.join(names) or 'none'}"
        )
    groups = [{"params": first, **options}, {"params": rest, "rho": 0.0}]
    return [group for group in groups if group["params"]]
