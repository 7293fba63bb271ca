"""The machine and the software that a result was measured on."""

import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from esam_kernels.passes.evaluate import cpu_has_bf16_units

_REPOSITORY = Path(__file__).parents[2]


def environment() -> dict[str, Any]:
    """Everything that a reader needs to judge or repeat a measurement; nothing that identifies the machine."""
    cuda = torch.cuda.is_available()
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        # Results and the documents that show them are written after they are measured.
        "uncommitted_changes": bool(
            _git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!README.md", ":!docs")
        ),
        "cpu": _proc_field("/proc/cpuinfo", "model name") or platform.processor(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cpu_bf16_units": cpu_has_bf16_units(),
        "threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        **tf32(),
        "os": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{package: _version(package) for package in ("torch", "triton", "pytorch_optimizer")},
    }


def tf32() -> dict[str, bool]:
    """Whether a GPU may multiply float32 matrices, and convolve, in TF32, which is several times as fast."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    return {"tf32_matmul": _allows_tf32(matmul, matmul), "tf32_convolution": _allows_tf32(cudnn, cudnn.conv)}  # type: ignore[attr-defined]


def _allows_tf32(flags: Any, precision: Any) -> bool:
    try:
        return bool(flags.allow_tf32)
    except RuntimeError:  # which torch raises where somebody has set fp32_precision instead
        return bool(precision.fp32_precision == "tf32")


def _proc_field(path: str, name: str) -> str:
    """The value of the first line ``name : value`` of a file in /proc, empty where there is none."""
    file = Path(path)
    lines = file.read_text().splitlines() if file.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == name), "")


def _memory_gib() -> float | None:
    total = _proc_field("/proc/meminfo", "MemTotal")
    return round(int(total.split()[0]) / 2**20, 1) if total else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except ModuleNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    try:
        run = subprocess.run(["git", *arguments], cwd=_REPOSITORY, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None  # an installed copy, or a machine without git
    return run.stdout.strip()
