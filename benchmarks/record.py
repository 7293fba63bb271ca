"""Results as JSON files: what every one begins with, writing them and reading them."""

import argparse
import json
from pathlib import Path
from typing import Any

from . import options
from .environment import environment


def header(benchmark: str, data: str, args: argparse.Namespace) -> dict[str, Any]:
    """What every result begins with: which benchmark it is of, and what is needed to repeat it."""
    return {"benchmark": benchmark, "data": data, "environment": environment(), "settings": options.as_json(args)}


def save(result: dict[str, Any], folder: Path, stem: str) -> None:
    """Write a result as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.json").write_text(json.dumps(result, indent=1) + "\n")


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """All results in a folder, by the names of their files less the suffix, in order."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
