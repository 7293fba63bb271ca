"""``python dry_run_driver.py FLAGS ...`` is ``python -m benchmarks gpu ...``, in less time than it takes by itself.

Its clock jumps by 1,000 seconds for every file in the folder FLAGS. Benchmarks' processes are forked from this one,
which has imported what takes longest.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
from pathlib import Path
from time import monotonic
from typing import IO, Any
from unittest import mock

import torch._dynamo  # noqa: F401  # which every optimizer imports

from benchmarks.commands import gpu, processes


class Forked:
    """``subprocess.Popen`` for ``python -m benchmarks``, as far as it is used here."""

    def __init__(self, command: list[str], stdout: IO[bytes]) -> None:
        context = multiprocessing.get_context("fork")
        self._process = context.Process(target=self._run, args=(command, stdout))
        self._process.start()
        self.pid = self._process.pid

    @staticmethod
    def _run(command: list[str], stdout: IO[bytes]) -> None:
        os.setsid()
        os.dup2(stdout.fileno(), sys.stdout.fileno())
        os.dup2(stdout.fileno(), sys.stderr.fileno())
        sys.argv = command[2:]
        runpy.run_module("benchmarks", run_name="__main__", alter_sys=True)

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("python -m benchmarks", timeout or 0.0)
        return self._process.exitcode


def start(command: list[str], stdout: IO[bytes], **about: Any) -> Forked | subprocess.Popen[bytes]:
    """A process, forked if it is a benchmark's."""
    if command[1:3] == ["-m", "benchmarks"]:
        return Forked(command, stdout)
    return popen(command, stdout=stdout, **about)


popen = subprocess.Popen
if __name__ == "__main__":
    flags = Path(sys.argv.pop(1))
    processes.clock = lambda: monotonic() + 1000 * len(list(flags.iterdir()))
    with mock.patch.object(processes.subprocess, "Popen", start):
        gpu.main(sys.argv[1:])
