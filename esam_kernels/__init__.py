"""ESAM (efficient sharpness-aware minimization) as a drop-in PyTorch optimizer over fused kernels."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import ops as ops
    from .closure import batch_closure
    from .layers import param_groups_by_layer
    from .losses import token_loss
    from .optimizer import ESAM
    from .passes.current import current_pass, first_pass

__all__ = [
    "ESAM",
    "__version__",
    "batch_closure",
    "current_pass",
    "first_pass",
    "param_groups_by_layer",
    "token_loss",
]

__version__ = "0.2.0.dev0"  # read by pyproject.toml, without importing this

_HOMES = {
    "ESAM": ".optimizer",
    "batch_closure": ".closure",
    "current_pass": ".passes.current",
    "first_pass": ".passes.current",
    "param_groups_by_layer": ".layers",
    "token_loss": ".losses",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: what reads the options alone, as the report does, needs no torch."""
    if name == "ops":
        return importlib.import_module(".ops", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name], __name__), name)
