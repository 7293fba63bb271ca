"""A hook of MkDocs: what the pages in docs/ link to elsewhere in the repository is in the site too, at the same path.

So one text serves readers of the repository and of the site: the site's root is docs/ laid over the repository's.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/results/report.md")  # of the site, that are not in docs/
UP = re.compile(r"(\]\()\.\./([^)#\s]+)")  # from a page in docs/ to the repository
DOWN = re.compile(r"(\]\()docs/")  # from a page of the repository to docs/
BESIDE = re.compile(r"\]\((?!https?:|#|docs/|\.\./)([^)#\s]+)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages, and every file that a page links to."""
    config.extra["polyfills"] = []  # from a disk the search works without what the plugin would fetch from elsewhere
    wanted = set(PAGES)
    for page in Path(config.docs_dir).glob("*.md"):
        wanted |= {path for _, path in UP.findall(page.read_text())}
    for name in PAGES:
        folder = Path(name).parent
        wanted |= {(folder / path).as_posix() for path in BESIDE.findall((ROOT / name).read_text())}
    for path in sorted(wanted):
        if (ROOT / path).is_file():  # what is not one stays a dead link, which the build reports
            files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links between docs/ and the repository into those of the site."""
    return DOWN.sub(r"\1", markdown) if page.file.src_uri in PAGES else UP.sub(r"\1\2", markdown)
