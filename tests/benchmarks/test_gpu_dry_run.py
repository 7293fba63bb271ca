"""``python -m benchmarks gpu`` runs whole on a CPU, where no package is but torch and those for the tests.

Its parts are killed at their limits in the first run, each after it has saved a row, and the second run goes on from
there. No limit is one of this machine's clock: a part that hangs lets the driver's clock jump.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import record

REPOSITORY = record.RESULTS.parents[1]
DRIVER = Path(__file__).with_name("dry_run_driver.py")
HIDDEN = ("pytorch_optimizer", "sklearn", "jinja2", "PIL", "tqdm", "matplotlib")
# At which of its writes to a journal a benchmark hangs: the first is the environment, the frontier's second its times.
HANGS = {"step_cost": 3, "operators": 3, "frontier": 4, "memory": 3}
KILLED = ["step_cost", "step_cost_bf16", "operators", "accuracy", "memory"]

CUSTOMIZE = f"""
import os, sys, time
from importlib.machinery import PathFinder
from pathlib import Path

find = PathFinder.find_spec
PathFinder.find_spec = classmethod(
    lambda cls, name, *rest: None if name.partition(".")[0] in {HIDDEN} else find(name, *rest)
)

writes, fsync, flags = [], os.fsync, os.environ.get("HANG")

def fsync_then_hang(file):
    fsync(file)
    writes.append(os.getpid())
    name = next((word for word in sys.argv if word in {HANGS}), sys.argv[0].split()[-1])
    goes_on = "bf16" in sys.argv  # in the journal of the part before, whose first write it has
    if writes.count(os.getpid()) + goes_on == {HANGS}.get(name):
        (Path(flags) / str(os.getpid())).touch()
        time.sleep(1000)

if flags:
    os.fsync = fsync_then_hang
"""


def dry_run(folder: Path, hang: bool) -> subprocess.CompletedProcess:
    """With a compiler that compiles nothing, since a build may fail."""
    variables = {
        **os.environ,
        "PYTHONPATH": f"{folder}/site{os.pathsep}{REPOSITORY}",
        "CXX": "false",
        "OUT": str(folder / "out"),
    }
    variables |= {"OMP_NUM_THREADS": "1"} | ({"HANG": str(folder / "flags")} if hang else {})
    variables.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(DRIVER), str(folder / "flags"), "--dry-run", "--minutes", "1000"]
    command += ["--output", str(folder / "gpu")]
    return subprocess.run(command, cwd=REPOSITORY, env=variables, capture_output=True, text=True)


def rows(folder: Path) -> dict[str, list]:
    """What was measured, by the names of the results."""
    found = {}
    for path in (folder / "results").glob("*.json"):
        result = json.loads(path.read_text())
        if result["benchmark"] == "operators":
            found[path.stem] = result["operators"]
        elif result["benchmark"] == "memory":
            found[path.stem] = list(result["cases"]["tiny"]["rows"].items())
        elif result["benchmark"] == "host_time":
            found[path.stem] = list(result["cases"].items())
        elif result["benchmark"] == "frontier":
            found[path.stem] = [
                run
                for one in result["configurations"].values()
                for run in (one["equal_epochs"] or {"runs": []})["runs"]
            ]
        else:
            found[path.stem] = [result["methods"]]
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder and both runs, with what each had in its results."""
    folder = tmp_path_factory.mktemp("dry")
    for name in ("site", "flags", "out"):
        (folder / name).mkdir()
    (folder / "site/sitecustomize.py").write_text(CUSTOMIZE)
    first = dry_run(folder, hang=True)
    kept, state = rows(folder / "gpu"), json.loads((folder / "gpu/state.json").read_text())
    second = dry_run(folder, hang=False)
    return (
        folder,
        (first, state, kept),
        (second, json.loads((folder / "gpu/state.json").read_text()), rows(folder / "gpu")),
    )


def test_a_part_that_is_killed_at_its_limit_leaves_its_rows_and_ends_no_other(runs):
    _, (first, state, kept), _ = runs
    assert first.returncode == 0, first.stderr
    assert {name: part["how"] for name, part in state.items()} == {
        "build": "done",
        "tests": "done",
        "host_time": "done",
        **dict.fromkeys(KILLED, "ended at its limit"),
    }
    assert sorted(kept) == [
        "frontier_random_cpu",
        "host_time_cpu",
        "memory_cpu",
        "operators_cpu",
        "step_cost_cpu_resnet18_b4",
        "step_cost_cpu_resnet18_b4_bf16",
    ]
    assert all(kept.values())


def test_a_second_run_finishes_and_measures_nothing_again(runs):
    _, (_, _, kept), (second, state, measured) = runs
    assert second.returncode == 0, second.stdout + second.stderr
    assert all(part["finished"] for part in state.values())
    assert set(KILLED) < set(state)
    assert all(row in measured[name] for name, before in kept.items() for row in before)
    assert len(measured["operators_cpu"]) > len(kept["operators_cpu"])
    assert {"step_cost_cpu_resnet50_b4", "step_cost_cpu_resnet50_b4_bf16"} <= measured.keys()


def test_the_page_has_every_figure_and_says_what_is_missing(runs):
    folder, _, (second, _, _) = runs
    page = (folder / "gpu/page.md").read_text()
    assert page in second.stdout
    for words in ("| SAM (foreach) ", "| SAM (esam_kernels) ", "| momentum ", "| squared_norm ", "bf16 autocast"):
        assert words in page
    assert "SAM (pytorch_optimizer): the package pytorch_optimizer is not installed" in page
    assert "No plots: the package matplotlib is not installed" in (folder / "gpu/logs/accuracy.log").read_text()


def test_json_environment_and_raw_logs_are_handed_over(runs):
    folder, *_ = runs
    left = {path.relative_to(folder / "out").as_posix() for path in (folder / "out").rglob("*") if path.is_file()}
    assert {"page.md", "state.json", "environment.json", "results/operators_cpu.json", "logs/tests.log"} <= left
    assert "no native operators for cpu: not built" in (folder / "out/logs/build.log").read_text()
    assert not {path for path in left if path.startswith("build/")}
    assert json.loads((folder / "out/environment.json").read_text())["torch"]
