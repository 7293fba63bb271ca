"""ESAM (efficient sharpness-aware minimization) as a drop-in PyTorch optimizer over fused kernels."""

from .closure import batch_closure
from .optimizer import ESAM

__all__ = ["ESAM", "batch_closure"]
