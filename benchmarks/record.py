"""Results as JSON files: what every one begins with, what seeds come to, writing them and reading them."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import options
from .environment import environment


def header(benchmark: str, data: str, args: argparse.Namespace) -> dict[str, Any]:
    """What every result begins with: which benchmark it is of, and what is needed to repeat it."""
    return {"benchmark": benchmark, "data": data, "environment": environment(), "settings": options.as_json(args)}


def mean_and_std(values: Sequence[float]) -> dict[str, float | None] | None:
    """Mean and standard deviation over seeds; no deviation of a single one, and None of none."""
    if not values:
        return None
    with np.errstate(invalid="ignore"):  # a loss may overflow, and is shown as it is
        return {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1)) if len(values) > 1 else None}


def save(result: dict[str, Any], folder: Path, stem: str) -> None:
    """Write a result as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.json").write_text(json.dumps(result, indent=1) + "\n")


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """All results in a folder, by the names of their files less the suffix, in order."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
