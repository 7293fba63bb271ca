"""A full disk or a folder that cannot be written is an error that says so; nothing is half-written or lost."""

import json
import os
import resource
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest

from benchmarks import record
from benchmarks.__main__ import main
from benchmarks.commands import bench, gpu, memory, report, unpack
from benchmarks.measuring.journal import Journal


@contextmanager
def full_disk(size):
    """Let no file grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_result_is_what_it_was_when_the_disk_is_full(tmp_path):
    record.save({"rows": [1]}, tmp_path, "result")
    with full_disk(5000), pytest.raises(record.UnwritableError, match=r"result\.json cannot be written"):
        record.save({"rows": list(range(5000))}, tmp_path, "result")
    assert names(tmp_path) == ["result.json"]
    assert record.load(tmp_path) == {"result": {"rows": [1]}}


def test_a_journal_keeps_what_it_had_and_takes_more_when_there_is_room(tmp_path):
    path = tmp_path / "job.jsonl"
    journal = Journal(path, {"cpu": "this"})
    journal.add({"row": 1}, "first")
    with full_disk(5000), pytest.raises(record.UnwritableError, match=r"job\.jsonl cannot be written"):
        journal.add({"row": 2}, "x" * 10000)
    assert [json.loads(line).get("value") for line in path.read_text().splitlines()] == [None, "first"]
    journal.add({"row": 3}, "third")
    again = Journal(path, {"cpu": "this"})
    assert [again.get({"row": row}) for row in (1, 2, 3)] == ["first", None, "third"]


def test_a_pack_is_whole_or_not_there(tmp_path):
    generator = np.random.default_rng(0)
    images, labels = generator.integers(0, 256, (20, 3, 32, 32), np.uint8), np.arange(20) % 10
    arrays = {"train_images": images, "train_labels": labels, "test_images": images, "test_labels": labels}
    np.savez(tmp_path / "pack.npz", **arrays)
    command = [str(tmp_path / "pack.npz"), str(tmp_path / "arrays.npz")]
    with full_disk(50_000), pytest.raises(record.UnwritableError, match=r"arrays\.npz"):
        unpack.main(command)
    assert names(tmp_path) == ["pack.npz"]
    unpack.main(command)
    with np.load(tmp_path / "arrays.npz") as written:
        assert np.array_equal(written["test_images"], images)


def test_an_exception_while_writing_leaves_the_old_file(tmp_path):
    (tmp_path / "plot.svg").write_text("old")

    def interrupted():
        with record.whole(tmp_path / "plot.svg") as new:
            new.write_text("ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names(tmp_path) == ["plot.svg"]
    assert (tmp_path / "plot.svg").read_text() == "old"


def test_a_command_that_meets_a_full_disk_ends_with_one_line(tmp_path):
    code = (
        "import resource, runpy, sys\n"
        "from benchmarks import record\n"
        "save = record.save\n"
        "def full(*args):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))\n"
        "    save(*args)\n"
        "record.save = full\n"
        f"sys.argv = ['', 'memory', '--device', 'cpu', '--models', 'tiny', '--output', {str(tmp_path)!r}]\n"
        "runpy.run_module('benchmarks', run_name='__main__')\n"
    )
    about = {"cwd": record.RESULTS.parents[1], "env": {**os.environ, "OMP_NUM_THREADS": "1"}}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **about)
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    assert run.stderr.splitlines()[-1].startswith("python -m benchmarks memory: ")
    assert "memory_cpu.json cannot be written" in run.stderr
    assert names(tmp_path) == ["memory_cpu.jsonl"]


@pytest.mark.parametrize("command", [memory, bench, gpu])
def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path, capsys, monkeypatch, command):
    (tmp_path / "file").write_text("no folder")
    measured = []
    monkeypatch.setattr(memory, "measure", lambda *_: measured.append(1))
    for module in (bench, gpu):
        monkeypatch.setattr(module, "run_part", lambda *_: measured.append(1))
    with pytest.raises(SystemExit) as stopped:
        command.main(["--output", str(tmp_path / "file" / "results")])
    assert stopped.value.code == 2
    assert f"{tmp_path / 'file' / 'results'} cannot be written: Not a directory" in capsys.readouterr().err
    assert not measured


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(record.UnwritableError, match="Permission denied"):
            record.require_writable(tmp_path)
    finally:
        tmp_path.chmod(0o700)


def test_a_result_of_which_half_is_there_is_named(tmp_path, capsys):
    (tmp_path / "memory_cpu.json").write_text('{"benchmark": "mem')
    with pytest.raises(SystemExit):
        report.main(["--results", str(tmp_path)])
    assert "memory_cpu.json is no result, or only part of one" in capsys.readouterr().err


def test_ctrl_c_ends_a_command_in_words(monkeypatch, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr("benchmarks.commands.train.main", interrupted)
    with pytest.raises(SystemExit) as stopped:
        main(["train"])
    assert stopped.value.code == 130
    assert "stopped; what it has saved is whole" in capsys.readouterr().err
