"""Warnings that point at the user's line."""

import sys
import warnings
from types import FrameType

import torch

_OURS = ("esam_kernels", "torch._dynamo")  # with what keeps torch.compile out


def warn(message: str) -> None:
    """Warn of what the caller of the package does, at the line where it calls the package."""
    level = 2  # the caller of this function
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").startswith(_OURS):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def called_by_scaler() -> bool:
    """Whether an enabled ``GradScaler`` has called, through whatever wraps an optimizer's step."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.amp.grad_scaler":
            scaler = frame.f_locals.get("self")
            return isinstance(scaler, torch.amp.GradScaler) and scaler.is_enabled()
        frame = frame.f_back
    return False
