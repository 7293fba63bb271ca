"""The site is built without a network, has no dead link, and fetches nothing from elsewhere when it is read."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def build(root, folder):
    for package in ("mkdocs", "material", "mkdocstrings_handlers"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]  # --quiet is not strict
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    built = build(ROOT, folder)
    assert built.returncode == 0, built.stderr
    return folder


def test_dead_links_fail_the_build(tmp_path):
    """Of a site with the same configuration and two pages of its own, as all pages would take long."""
    for path in ("scripts", "examples", "benchmarks/results"):
        shutil.copytree(ROOT / path, tmp_path / path)
    shutil.copy(ROOT / "docs/style.css", parent(tmp_path / "docs/style.css"))
    for name in ("CHANGELOG.md", "CONTRIBUTING.md"):  # which the hook takes into the site
        (tmp_path / name).write_text("# Heading\n")
    configuration = (ROOT / "mkdocs.yml").read_text()
    (tmp_path / "mkdocs.yml").write_text(re.sub(r"^nav:\n(?:[ -].*\n)*", "", configuration, flags=re.MULTILINE))
    dead = ("no_page.md", "recipes.md#no-heading", "../examples/no_file.py")
    for name, links in (("recipes", ("index.md", "../examples/finetune.py")), ("index", ("recipes.md", *dead))):
        page = parent(tmp_path / f"docs/{name}.md")
        page.write_text("\n".join(["# Heading", *(f"[link]({target})" for target in links), ""]))
    built = build(tmp_path, tmp_path / "site")
    assert built.returncode != 0
    assert all(f"'{target.removeprefix('../')}'" in built.stderr for target in dead), built.stderr
    assert len(re.findall(r"^WARNING", built.stderr, flags=re.MULTILINE)) == 3


def parent(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


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
