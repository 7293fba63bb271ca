"""Results as JSON files: what every one begins with, what seeds come to, writing them and reading them."""

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"
DERIVED = ("restart", "left_out", "validation")  # of a command line, what says nothing of how it was measured
FORMER_NAMES = {"kernels": "operators"}  # of benchmarks


class UnwritableError(ValueError):
    """A file cannot be written: the disk is full, or the folder is not ours."""

    def __init__(self, path: Path, error: OSError) -> None:
        super().__init__(
            f"{path} cannot be written: {error.strerror or error}. Make room there or choose another folder; what was "
            "written before is whole"
        )


def require_writable(folder: Path) -> None:
    """Make a folder if it is not there, and write and remove a file in it: better now than after measuring.

    Raises:
        UnwritableError: if that cannot be done.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
    except OSError as error:
        raise UnwritableError(folder, error) from error


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A file's path beside ``path``, which takes its place when the block ends, and is removed if it fails.

    Raises:
        UnwritableError: if it could not be written, in which case ``path`` is what it was.
    """
    new = path.with_name(f"{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield new
        os.replace(new, path)
    except BaseException as error:
        with suppress(OSError):
            new.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UnwritableError(path, error) from error
        raise


def write(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    with whole(path) as new:
        new.write_text(text)


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
    write(folder / f"{stem}.json", json.dumps(result, indent=1) + "\n")


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """All results in a folder, by the names of their files less the suffix, in order."""
    return {path.stem: _read(path) for path in sorted(folder.glob("*.json"))}


def _read(path: Path) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is no result, or only part of one ({error}): measure it anew, or remove it"
        ) from error
    if (name := result.get("benchmark")) in FORMER_NAMES:
        result["benchmark"] = FORMER_NAMES[name]
    return result
