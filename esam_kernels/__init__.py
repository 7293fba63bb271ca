"""ESAM (efficient sharpness-aware minimization) as a drop-in PyTorch optimizer over fused kernels."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .closure import batch_closure
    from .losses import token_loss
    from .optimizer import ESAM

__all__ = ["ESAM", "batch_closure", "token_loss"]

_HOMES = {"ESAM": ".optimizer", "batch_closure": ".closure", "token_loss": ".losses"}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: what reads the options alone, as the report does, needs no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name], __name__), name)
