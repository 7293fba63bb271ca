"""Each promise in docs/promises.md names a test that is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "promises.md").read_text()
ROWS = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| Promise")]


@pytest.mark.parametrize("row", ROWS)
def test_the_test_is_there(row):
    path, _, function = re.fullmatch(r"\| .+\. \| `(tests/[\w/]+\.py)(::)?(test_\w+)?` \|", row).groups()
    code = (ROOT / path).read_text()
    names = re.findall(r"^def (test_\w+)\(", code, flags=re.MULTILINE)
    assert function in names if function else names


def test_there_are_rows():
    assert len(ROWS) == PAGE.count(" `tests/") > 25


@pytest.mark.parametrize("link", re.findall(r"\]\((\w+\.md)(?:#[\w-]+)?\)", PAGE))
def test_links_lead_somewhere(link):
    assert (ROOT / "docs" / link).is_file()
