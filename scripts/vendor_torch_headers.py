"""Copies the headers of torch's stable ABI that csrc/ includes into third_party/torch, with torch's licence.

With them the library is built where there is no torch, and is the same beside any version of torch from 2.11 on. Run
with the Python whose torch they are to come from; csrc/ including another header of torch's is a reason to.
"""

import importlib.metadata
import importlib.util
import shutil
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENDORED = ROOT / "third_party/torch"
# As setup.py compiles them, the CUDA operators among them.
FLAGS = ["-std=c++17", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-DUSE_CUDA", "-DESAM_KERNELS=kernels"]


def main() -> None:
    """Replace what is there."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit("torch is not installed: run this with a Python that has it")
    include = Path(spec.origin).resolve().parent / "include"  # resolved, as the compiler names what it finds
    shutil.rmtree(VENDORED, ignore_errors=True)
    for header in headers(include):
        target = VENDORED / "include" / header
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(include / header, target)
    distribution = importlib.metadata.distribution("torch")
    licence = next(file for file in distribution.files or () if file.match("licenses/LICENSE"))
    shutil.copyfile(distribution.locate_file(licence), VENDORED / "LICENSE")
    (VENDORED / "VERSION").write_text(distribution.version.partition("+")[0] + "\n")


def headers(include: Path) -> list[Path]:
    """The headers below ``include`` that the sources need, relative to it."""
    with tempfile.TemporaryDirectory() as folder:
        found = set()
        for i, source in enumerate((ROOT / "csrc").rglob("*.cpp")):
            rule = Path(folder, f"{i}.d")
            subprocess.run(["c++", *FLAGS, "-M", "-MF", rule, "-isystem", include, source], check=True)
            names = rule.read_text().replace("\\\n", " ").split()
            found |= {Path(name).relative_to(include) for name in names if name.startswith(f"{include}/")}
    return sorted(found)


if __name__ == "__main__":
    main()
