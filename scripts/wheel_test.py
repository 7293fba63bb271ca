"""Installs a wheel into fresh environments of several versions of Python and torch, and trains a network in each.

    python scripts/wheel_test.py dist/*.whl --python 3.11 3.14 --torch 2.11.0 2.15.0

It needs nothing but Python. Each torch is downloaded, which from the package index is gigabytes a version, and removed
again. A training whose operators are not the native ones, or whose loss does not fall, makes the command fail; so does
an install that fails, but not a Python that is not here or that this torch was not made for. The rows that it prints
are those of the table in docs/install.md.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
TORCHES = ("2.11.0", "2.13.0", "2.14.1", "2.15.0")

TRAINING = """
import importlib.metadata, json, torch, esam_kernels
from esam_kernels import ESAM, batch_closure, ops

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 3))
loss_fn = torch.nn.CrossEntropyLoss(reduction="none")
optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
inputs = torch.randn(64, 8)
targets = inputs[:, :3].argmax(1)
losses = [float(optimizer.step(batch_closure(model, loss_fn, inputs, targets))) for _ in range(50)]
print(json.dumps({
    "torch": torch.__version__,
    "triton": importlib.metadata.version("triton"),
    "explain": ops.explain(model[0].weight),
    "losses": [losses[0], losses[-1]],
    "file": esam_kernels.__file__,
}))
"""


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--python", nargs="+", default=PYTHONS, metavar="VERSION", help=" ".join(PYTHONS))
    parser.add_argument("--torch", nargs="+", default=TORCHES, metavar="VERSION", help=" ".join(TORCHES))
    arguments = parser.parse_args()
    if not arguments.wheel.is_file():
        parser.error(f"{arguments.wheel} is no file: give the path of one wheel")

    rows, failures = [], 0
    for python in arguments.python:
        interpreter = find(python)
        for torch in arguments.torch:
            print(f"Python {python}, torch {torch} ...", file=sys.stderr, flush=True)
            if interpreter is None:
                result = ["", "not run: no such Python here"]
            else:
                result, passed = test(interpreter, torch, arguments.wheel.resolve())
                failures += not passed
            rows.append([python, torch, *result])
    print("| Python | torch | Triton | result |\n|---|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    return min(failures, 1)


def find(python: str) -> str | None:
    """An interpreter of that version; pyenv's stand-ins may be there and not work."""
    interpreter = shutil.which(f"python{python}")
    if interpreter is None or subprocess.run([interpreter, "-V"], capture_output=True).returncode != 0:
        return None
    return interpreter


def test(interpreter: str, torch: str, wheel: Path) -> tuple[list[str], bool]:
    """The last two columns of a row, and whether all is as it should be."""
    with tempfile.TemporaryDirectory(prefix="wheel-test-") as folder:
        steps = {
            "no environment": [interpreter, "-m", "venv", folder],
            "not installable": [f"{folder}/bin/python", "-m", "pip", "install", "-q", f"torch=={torch}", str(wheel)],
            "failed": [f"{folder}/bin/python", "-c", TRAINING],
        }
        for outcome, command in steps.items():
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            if done.returncode != 0:
                if "No matching distribution found for torch" in done.stderr:
                    return ["", "not run: no such torch for this Python"], True
                print(done.stdout + done.stderr, file=sys.stderr)
                last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
                return ["", f"{outcome}: {last[0]}"], False
    answer = json.loads(done.stdout.splitlines()[-1])
    first, last = answer["losses"]
    print(answer, file=sys.stderr)
    installed = Path(answer["file"]).is_relative_to(Path(folder).resolve())
    passed = installed and answer["explain"].split(";")[0] == "native" and last < first / 2
    return [answer["triton"], f"{answer['explain']}; loss {first:.2f} to {last:.2f}"], passed


if __name__ == "__main__":
    sys.exit(main())
