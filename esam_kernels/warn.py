"""Warnings that point at the user's line."""

import sys
import warnings
from types import FrameType

_OURS = ("esam_kernels", "torch._dynamo")  # with what keeps torch.compile out


def warn(message: str) -> None:
    """Warn of what the caller of the package does, at the line where it calls the package."""
    level = 2  # the caller of this function
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").startswith(_OURS):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
