"""``python -m benchmarks.report`` puts the results in benchmarks/results into the README."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from . import options, tables

README = options.RESULTS.parent.parent / "README.md"


def update(readme: str, results: Path) -> str:
    """The README with everything between its ``results:`` markers made anew from the JSON files in ``results``."""
    sections: dict[str, list[str]] = {"train": [], "step_cost": []}
    for path in sorted(results.glob("train_*.json")):
        plots = [
            f"![{plot.stem}](benchmarks/results/{plot.name})" for plot in sorted(results.glob(f"{path.stem}_*.svg"))
        ]
        sections["train"].append("\n\n".join([tables.train(json.loads(path.read_text())), *plots]))
    for path in sorted(results.glob("step_cost_*.json")):
        sections["step_cost"].append(tables.step_cost(json.loads(path.read_text())))
    for name, parts in sections.items():
        begin, end = f"<!-- results:{name} -->", f"<!-- /results:{name} -->"
        before, found_begin, rest = readme.partition(begin)
        _, found_end, after = rest.partition(end)
        if not (found_begin and found_end):
            raise ValueError(f"the README lacks the lines {begin} and {end}")
        readme = "\n\n".join([before + begin, *parts, end + after])
    return readme


def main(argv: Sequence[str] | None = None) -> None:
    """Rewrite the README's results."""
    argparse.ArgumentParser(description=__doc__).parse_args(argv)
    README.write_text(update(README.read_text(), options.RESULTS))


if __name__ == "__main__":
    main()
