"""Results as JSON files: what every one begins with, what seeds come to, writing them and reading them."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"
DERIVED = ("restart", "left_out", "validation")  # of a command line, what says nothing of how it was measured
FORMER_NAMES = {"kernels": "operators"}  # of benchmarks


def header(benchmark: str, data: str, args: argparse.Namespace) -> dict[str, Any]:
    """What every result begins with: which benchmark it is of, and what is needed to repeat it."""
    from .measuring.environment import environment  # here, since results are read where there is no torch

    return {"benchmark": benchmark, "data": data, "environment": environment(), "settings": as_json(args)}


def as_json(args: argparse.Namespace) -> dict[str, Any]:
    """The options as they go into a result: all but the paths, which are this machine's own, and DERIVED."""
    return {name: value for name, value in vars(args).items() if not isinstance(value, Path) and name not in DERIVED}


def mean_and_std(values: Sequence[float]) -> dict[str, float | None] | None:
    """Mean and standard deviation over seeds; no deviation of a single one, and None of none."""
    if not values:
        return None
    with np.errstate(invalid="ignore"):  # a loss may overflow, and is shown as it is
        return {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1)) if len(values) > 1 else None}


def save(result: dict[str, Any], folder: Path, stem: str) -> None:
    """Write a result as JSON, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / f"{stem}.json.new"
    new.write_text(json.dumps(result, indent=1) + "\n")
    new.replace(folder / f"{stem}.json")


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """All results in a folder, by the names of their files less the suffix, in order."""
    return {path.stem: _read(path) for path in sorted(folder.glob("*.json"))}


def _read(path: Path) -> dict[str, Any]:
    result = json.loads(path.read_text())
    if (name := result.get("benchmark")) in FORMER_NAMES:
        result["benchmark"] = FORMER_NAMES[name]
    return result
