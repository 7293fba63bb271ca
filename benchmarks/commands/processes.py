"""Parts of a long job, each in a process of its own that is ended at its limit, with all that it has started."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from .. import record

REPOSITORY = record.RESULTS.parents[1]
POLL = 0.1  # seconds


@dataclass(frozen=True)
class Part:
    """What runs in a process of its own.

    Attributes:
        name: of its log.
        why: what it yields.
        seconds: its limit.
        command: the process, without Python; with ``--time-budget`` at its end, it is given its limit less a reserve.
        results: the names of the results that are there when it is finished, less their suffix.
        again: whether it runs in every call, finished or not.
    """

    name: str
    why: str
    seconds: float
    command: tuple[str, ...]
    results: tuple[str, ...] = ()
    again: bool = False


def clock() -> float:
    """Seconds, by which limits are kept."""
    return monotonic()


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """Let SIGTERM raise KeyboardInterrupt inside the block: a process in its own session outlives its parent."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@sigterm_as_ctrl_c()
def run_part(part: Part, limit: float, log: Path, watch: Callable[[], None] = lambda: None) -> str:
    """Run a part's process, and end it with all that it has started at its limit or at an exception; how it ended.

    Ctrl-C and SIGTERM are exceptions.

    Args:
        part: what to run.
        limit: in seconds.
        log: what the file of all that the process writes is called, which is appended to.
        watch: called again and again while it runs.
    """
    command = [sys.executable, *part.command]
    if command[-1] == "--time-budget":
        command.append(f"{max(1.0, 0.85 * limit - 10):.0f}")
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        file.write(f"\n$ {' '.join(command[1:])}\n".encode())
        file.flush()
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env=variables, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        end = clock() + limit
        try:
            while True:
                try:
                    code = process.wait(POLL)
                    return "done" if code == 0 else f"failed with exit status {code}"
                except subprocess.TimeoutExpired:
                    if clock() > end:
                        return "ended at its limit"
                    watch()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # its own session: the process and what it started
                process.wait()


def is_finished(part: Part, how: str, results: Path) -> bool:
    """Whether a part that has ended so, and has its results in that folder, has nothing left to do."""
    if how != "done":
        return False
    for stem in part.results:
        path = results / f"{stem}.json"
        if not path.exists():
            return False
        runs = json.loads(path.read_text()).get("runs")
        if isinstance(runs, dict) and "planned" in runs and runs["finished"] < runs["planned"]:
            return False
    return True
