"""The site is built without a network, has no dead link, and fetches nothing from elsewhere when it is read."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    for package in ("mkdocs", "material", "mkdocstrings_handlers"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr
    return folder


def test_every_page_of_the_docs_is_in_it(site):
    missing = [page.stem for page in (ROOT / "docs").glob("*.md") if not (site / f"{page.stem}.html").is_file()]
    assert not missing


def test_nothing_is_fetched_from_elsewhere(site):
    for page in site.rglob("*.html"):
        text = page.read_text()
        fetched = re.findall(r'<(?:script|img|link|iframe|source)\b[^>]*?\b(?:src|href)="((?:https?:)?//[^"]+)"', text)
        assert not [url for url in fetched if "rel=canonical" not in url], page
    for style in site.rglob("*.css"):
        assert not re.findall(r"url\(['\"]?(?:https?:)?//|@import", style.read_text()), style


def test_the_reference_has_every_public_name_with_what_it_says(site):
    import esam_kernels

    page = (site / "api.html").read_text()
    for name in esam_kernels.__all__:
        if name != "__version__":
            assert f'id="{getattr(esam_kernels, name).__module__}.{name}"' in page
    assert "stochastic weight perturbation" in page  # ESAM's options, which its docstring gets when it is imported
