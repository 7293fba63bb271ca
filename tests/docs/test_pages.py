"""The code of the README and of the docs runs as it stands there; recipes have tests of their own."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from esam_kernels import ESAM, batch_closure

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
# upstream.md has a crash, which tests/optimizer/test_partial_gradients.py reproduces.
PAGES = [page for page in sorted((ROOT / "docs").glob("*.md")) if page.name not in ("recipes.md", "upstream.md")]


def blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def run(code: str, where: str, names: dict) -> dict:
    exec(compile(code, where, "exec"), names)
    return names


def by_hand(text: str) -> str:
    """What of a document is not made from the results."""
    return re.sub(r"<!-- ([a-z:]+) -->.*?<!-- /\1 -->", "", text, flags=re.DOTALL)


def test_the_readmes_loop_runs_as_pasted_and_learns(capsys):
    torch.manual_seed(0)
    (loop,) = blocks(README)
    names = run(loop, "README.md", {"__name__": "__main__"})
    correct = names["model"](names["inputs"]).argmax(1) == names["targets"]
    assert correct.float().mean() > 0.9
    losses = [float(line.rpartition(" ")[2]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 10
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page.read_text())], ids=lambda page: page.stem)
def test_the_code_of_a_page_trains(page):
    """In the names that the recipes begin with; each block goes on from those before it."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(128, 4), torch.randint(3, (128,)))
    names = {"torch": torch, "nn": nn, "ESAM": ESAM, "batch_closure": batch_closure}
    names["loader"] = DataLoader(data, batch_size=16)
    names["model"] = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    names["loss_fn"] = nn.CrossEntropyLoss(reduction="none")
    names["optimizer"] = ESAM(names["model"].parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    for block in blocks(page.read_text()):
        before = [param.detach().clone() for param in names["model"].parameters()]
        run(block, page.name, names)
        after = list(names["model"].parameters())
        assert all(param.isfinite().all() for param in after)
        assert not all(torch.equal(a, b) for a, b in zip(before, after))


def test_the_readme_is_a_page():
    lines = README.splitlines()
    assert len(lines) <= 125
    assert max(map(len, lines)) <= 120


def test_every_figure_in_the_readme_comes_from_a_results_file():
    """Measured figures have a % or a ±: outside of what ``python -m benchmarks report`` writes there are none."""
    assert not re.findall(r"\d+(?:\.\d+)? ?%|±", by_hand(README).replace("70 % more", ""))
    assert by_hand(README).count("70 % more") == 1  # which 5.1 over 3 is, by counting


@pytest.mark.parametrize(
    "document", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")], ids=str
)
def test_links_within_the_repository_lead_somewhere(document):
    """Also where MkDocs, which checks those of the site, is not installed."""

    def anchors(text):
        titles = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}

    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", document.read_text()):
        path, _, anchor = target.partition("#")
        file = document.parent / path if path else document
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text()), target
