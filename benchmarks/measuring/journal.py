"""The finished parts of a long measurement, kept so that it goes on where it was stopped, however it was stopped."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import benchmarks
import esam_kernels

from ..record import UnwritableError, require_writable

PACKAGES = (Path(esam_kernels.__file__).parent, Path(benchmarks.__file__).parent)
# What may change between two starts. Of the code, its fingerprint says more than git does.
CHANGING = {"date", "commit", "uncommitted_changes"}


class Journal:
    """A JSON-lines file: the environment in the first line, then a finished part in each, under its key.

    A key is everything that decides what is measured, as a JSON object: what was measured with other settings is never
    taken for it.

    Args:
        path: the file, which is made with its folder if it is not there.
        environment: where and with what is measured: only ``CHANGING`` may change from one start to the next.
        restart: begin anew, whatever is in the file.

    Raises:
        ValueError: if the file was begun in another environment, is no journal, or cannot be written.
    """

    def __init__(self, path: Path, environment: Mapping[str, Any], restart: bool = False) -> None:
        self.path = path
        self._parts: dict[str, Any] = {}
        require_writable(path.parent)
        text = b"" if restart or not path.exists() else path.read_bytes()
        # A line without its end was being written when the process was killed.
        text = text[: text.rfind(b"\n") + 1]
        if text:
            try:
                first, *parts = map(json.loads, text.splitlines())
                begun = first["environment"]
                self._parts = {_canonical(part["key"]): part["value"] for part in parts}
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"{path} is no journal of measurements: move it away, or give --restart") from error
            self._require_same(begun, environment)
        self._truncate(len(text))
        if not text:
            self._append({"environment": dict(environment)})

    def get(self, key: Mapping[str, Any]) -> Any:
        """What was kept under a key; None if nothing was."""
        return self._parts.get(_canonical(key))

    def add(self, key: Mapping[str, Any], value: Any) -> None:
        """Keep a finished part: once this returns, it outlives the process and the machine's crash."""
        self._append({"key": dict(key), "value": value})
        self._parts[_canonical(key)] = json.loads(json.dumps(value))  # as it will be read

    def once(self, key: Mapping[str, Any], make: Callable[[], Any]) -> Any:
        """What was kept under a key; if nothing was, what ``make`` returns, which is then kept."""
        if self.get(key) is None:
            self.add(key, make())
        return self.get(key)

    def _append(self, line: dict[str, Any]) -> None:
        size = self.path.stat().st_size
        try:
            with self.path.open("ab") as file:
                file.write(json.dumps(line).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            self._truncate(size)
            raise UnwritableError(self.path, error) from error

    def _truncate(self, size: int) -> None:
        try:
            with self.path.open("ab") as file:
                file.truncate(size)
        except OSError as error:
            raise UnwritableError(self.path, error) from error

    def _require_same(self, begun: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        for name in sorted((begun.keys() | now.keys()) - CHANGING):
            if begun.get(name) != now.get(name):
                raise ValueError(
                    f"{self.path} was begun with {name} = {begun.get(name)!r}, which is {now.get(name)!r} now: give "
                    "--restart to begin anew, or another --output"
                )


def code_fingerprint(*packages: Path) -> str:
    """A hash of all code in the packages' folders: their Python sources and what is built there.

    Of a library that its build's record knows, it is that of its sources: a build anew changes nothing.
    Code that was edited has another one, committed or not, and whether or not git is at hand.
    """
    digest = hashlib.sha256()
    for package in packages:
        for path in sorted(path for path in package.rglob("*") if path.suffix in (".py", ".so")):
            name, content = path.relative_to(package.parent).as_posix().encode(), path.read_bytes()
            for part in (name, _sources_of_library(path, content) if path.suffix == ".so" else content):
                digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]


def _sources_of_library(library: Path, content: bytes) -> bytes:
    record = library.with_name("native_build.json")
    if record.exists():
        known = json.loads(record.read_text())
        if known.get("sha256") == hashlib.sha256(content).hexdigest() and "sources" in known:
            return json.dumps({name: value for name, value in known.items() if name != "sha256"}).encode()
    return content


def _canonical(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)
