"""All results as one page, as Markdown, and in short in the README and the docs, from the JSON files and nothing else.

``report.html`` holds everything and needs no network; ``report.md`` holds the same for reading on a code host.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from .. import record
from ..report import documents
from .refusals import refusals

ROOT = record.RESULTS.parent.parent
# The documents that show parts of the results or the options, and where their plots are from there.
DOCUMENTS = {
    ROOT / "README.md": "benchmarks/results",
    ROOT / "docs" / "choosing.md": "../benchmarks/results",
    ROOT / "docs" / "options.md": "../benchmarks/results",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Write the report, and the sections of README and docs if it is about this repository's own results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--results",
        type=Path,
        default=record.RESULTS,
        metavar="FOLDER",
        help="where the JSON files are and the report goes; default: benchmarks/results, shown in README and docs",
    )
    folder = parser.parse_args(argv).results
    with refusals(parser):
        results = record.load(folder)
        if not results:
            raise ValueError(f"--results {folder}: no results are there, which the other commands write")
        list(documents.by_kind(results))  # so that an unknown kind is refused before anything is written
        record.require_writable(folder)
    documents.write(folder)
    if folder.resolve() == record.RESULTS.resolve():
        with refusals(parser):
            updated = {
                document: documents.update(document.read_text(), documents.sections(results, plots))
                for document, plots in DOCUMENTS.items()
            }
        for document, text in updated.items():
            record.write(document, text)
    print(f"Written to {folder}: report.html, report.md")
