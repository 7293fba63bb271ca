"""``python -m benchmarks bench`` says how far it is, ends with the table and the page, and survives Ctrl-C."""

import json
import os
import re
import signal
import subprocess
import sys
from io import StringIO

import pytest

from benchmarks import record
from benchmarks.commands import bench, processes

REPOSITORY = record.RESULTS.parents[1]


def start(folder):
    command = [sys.executable, "-m", "benchmarks", "bench", "--dry-run", "--device", "cpu", "--output", str(folder)]
    about = {"cwd": REPOSITORY, "env": {**os.environ, "OMP_NUM_THREADS": "1"}, "text": True}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **about)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder, and what a run that was interrupted in its second part said and left."""
    folder = tmp_path_factory.mktemp("bench")
    first = start(folder)
    said = []
    while "[2 of 4] frontier" not in "".join(said[-1:]):
        said.append(first.stderr.readline())
        assert said[-1], first.stdout.read()
    first.send_signal(signal.SIGINT)
    out, err = first.communicate(timeout=100)
    left = {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}
    return folder, first.returncode, out, "".join(said) + err, left


def test_what_is_interrupted_shows_what_there_is_and_its_exit_status_says_so(runs):
    folder, status, out, err, left = runs
    assert status == bench.INTERRUPTED, err
    assert "Interrupted" in out
    assert re.search(r"\| optimizer .*\n.*\n\| SGD ", out)
    assert "| ESAM " in out
    assert out.endswith(f"The page: {folder / 'report.html'}\n")
    assert "train_random_cpu" in left["report.html"]
    assert "Traceback" not in err
    assert json.loads(left["train_random_cpu.json"])["methods"]
    assert not [name for name in left if name.startswith(("step_cost", "memory")) or name.endswith(".new")]


def test_sigterm_ends_a_part_and_what_it_has_started_as_ctrl_c_does(tmp_path):
    handler = signal.getsignal(signal.SIGTERM)
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(1000)"
    part = processes.Part("sleep", "", 1000, ("-c", code))
    log = tmp_path / "log"

    def kill_when_it_runs():
        if log.read_text().endswith("\n") and log.read_text().split()[-1].isdigit():
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        processes.run_part(part, 1000, log, kill_when_it_runs)
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text().split()[-1]), 0)
    assert signal.getsignal(signal.SIGTERM) is handler


def test_it_says_what_it_does_and_how_far_it_is(runs):
    _, _, out, err, _ = runs
    for name in ("train", "frontier", "step_cost", "memory"):
        assert re.search(rf"^  {name} +\w", out, re.MULTILINE)
    for number, name in enumerate(("train", "frontier"), 1):
        assert re.search(rf"^\[{number} of 4\] {name}, .*; about \d+ (s|min) left in all$", err, re.MULTILINE)
    assert re.search(r"^train: done in \d+ s$", err, re.MULTILINE)


@pytest.fixture
def line(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(processes, "clock", lambda: now[0])
    order = list(bench.parts(bench.make_parser().parse_args(["--output", str(tmp_path)])))
    return bench.ProgressLine(order, tmp_path, StringIO()), order, now


def test_the_time_left_follows_the_pace_of_the_parts_that_are_over(line):
    one, order, now = line
    one.begin(order[0])
    assert one.seconds_left() == sum(bench.EXPECTED.values())
    now[0] = 2 * bench.EXPECTED["train"]
    one.end("done")
    one.begin(order[1])
    assert one.seconds_left() == 2 * (sum(bench.EXPECTED.values()) - bench.EXPECTED["train"])


def test_the_time_left_follows_the_parts_own_count(line, tmp_path):
    one, order, now = line
    (tmp_path / "train.log").write_text("seed 0: 1 of 4 steps, 30 s left\nseed 0, SGD: 2 of 4 steps, 20 s left\n")
    one.begin(order[0])
    now[0] = 500.0
    assert one.seconds_left() == 500 + sum(bench.EXPECTED.values()) - bench.EXPECTED["train"]
    assert one.text().startswith("[1 of 4] train, seed 0, SGD: 2 of 4 steps; about")


def test_the_folder_of_the_full_results_is_refused(capsys):
    before = {path: path.stat().st_mtime_ns for path in record.RESULTS.iterdir()}
    with pytest.raises(SystemExit) as stopped:
        bench.main(["--output", str(record.RESULTS)])
    assert stopped.value.code == 2
    assert "make results" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in record.RESULTS.iterdir()} == before


def test_a_part_that_fails_ends_no_other_and_the_exit_status_says_so(tmp_path, monkeypatch, capsys):
    order = [
        processes.Part("train", "fails", 60, ("-c", "raise SystemExit(3)")),
        processes.Part("memory", "goes on", 60, ("-c", f"open({str(tmp_path / 'memory.txt')!r}, 'w')")),
    ]
    monkeypatch.setattr(bench, "parts", lambda args: order)
    with pytest.raises(SystemExit) as stopped:
        bench.main(["--output", str(tmp_path)])
    assert stopped.value.code == 1
    said = capsys.readouterr()
    assert "Failed: train" in said.err
    assert "Nothing is measured" in said.out
    assert (tmp_path / "memory.txt").exists()
