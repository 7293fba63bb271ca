"""Fine-tunes a small transformer with AdamW and with ESAM around it, on a table that comes with scikit-learn.

The table has 30 measurements of each of 569 breast tumours, benign or malignant. The transformer reads a row as a
sequence of columns. First it learns, without labels, to fill in hidden entries; then it is fine-tuned to tell the
diagnosis from 40 rows with labels, and tested on rows that it has never seen. Which 40 matters more than the optimizer,
so that this is done with several choices of them. ``python examples/finetune.py`` takes half a minute on 2 cores.
"""

import argparse
import copy
from statistics import mean

import torch
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn

from esam_kernels import ESAM, batch_closure

LABELLED = 40
TESTED = 169


class TableTransformer(nn.Module):
    """A transformer over the columns of a row, each of which is a token (FT-Transformer, arXiv 2106.11959)."""

    def __init__(self, columns: int, classes: int, width: int = 32, layers: int = 2) -> None:
        super().__init__()
        self.column = nn.Parameter(torch.randn(columns, width) / 4)
        self.value = nn.Parameter(torch.randn(columns, width) / 4)
        self.hidden = nn.Parameter(torch.zeros(width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.1, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.fill = nn.Linear(width, 1)
        self.classify = nn.Linear(width, classes)

    def features(self, rows: Tensor, hide: Tensor | None = None) -> Tensor:
        """Features [n, columns, width] of rows [n, columns], some entries of which may be hidden."""
        values = rows[..., None] * self.value
        if hide is not None:
            values = torch.where(hide[..., None], self.hidden, values)
        return self.encoder(self.column + values)

    def forward(self, rows: Tensor) -> Tensor:
        """Logits [n, classes]."""
        return self.classify(self.features(rows).mean(1))


def pretrain(model: TableTransformer, rows: Tensor, steps: int) -> None:
    """Learn to fill in hidden entries, with AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        batch = rows[torch.randint(len(rows), (64,))]
        hide = torch.rand_like(batch) < 0.3
        loss = (model.fill(model.features(batch, hide))[..., 0] - batch)[hide].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"pretraining: hidden entries are filled in with a mean squared error of {loss.item():.2f} (guessing: 1)")


def finetune(model: TableTransformer, rows: Tensor, labels: Tensor, steps: int, rho: float) -> None:
    """Learn to classify, with the embeddings of the columns frozen. With rho = 0 this is AdamW alone."""
    model.column.requires_grad_(False)
    model.value.requires_grad_(False)
    loss_fn = nn.CrossEntropyLoss(reduction="none")
    optimizer = ESAM(model.parameters(), torch.optim.AdamW, lr=1e-3, weight_decay=0.01, rho=rho)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    for _ in range(steps):
        index = torch.randint(len(rows), (16,))
        optimizer.backward(batch_closure(model, loss_fn, rows[index], labels[index]))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()


@torch.no_grad()
def accuracy(model: TableTransformer, rows: Tensor, labels: Tensor) -> float:
    """Share of the rows that are classified right."""
    return (model.eval()(rows).argmax(1) == labels).double().mean().item()


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Pretrain, fine-tune with each optimizer, and return and print their mean accuracies on the rows for testing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pretrain-steps", type=int, default=300, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=100, help="of fine-tuning; default: %(default)s")
    parser.add_argument("--choices", type=int, default=5, help="of the rows with labels; default: %(default)s")
    parser.add_argument("--rho", type=float, default=0.05, help="default: %(default)s")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    table = load_breast_cancer()
    order = torch.randperm(len(table.target))
    rows, labels = torch.tensor(table.data, dtype=torch.float32)[order], torch.tensor(table.target)[order]
    rows = (rows - rows[TESTED:].mean(0)) / rows[TESTED:].std(0)
    pretrained = TableTransformer(rows.shape[1], classes=2)
    pretrain(pretrained, rows[TESTED:], args.pretrain_steps)

    results = {}
    for name, rho in (("AdamW", 0.0), ("ESAM around AdamW", args.rho)):
        accuracies = []
        for choice in range(args.choices):
            torch.manual_seed(choice)
            labelled = TESTED + torch.randperm(len(rows) - TESTED)[:LABELLED]
            model = copy.deepcopy(pretrained)
            finetune(model, rows[labelled], labels[labelled], args.steps, rho)
            accuracies.append(accuracy(model, rows[:TESTED], labels[:TESTED]))
        results[name] = mean(accuracies)
        each = ", ".join(f"{100 * value:.1f}" for value in accuracies)
        print(f"{name}: {100 * results[name]:.1f} % of {TESTED} diagnoses are right (mean of {each})")
    return results


if __name__ == "__main__":
    main()
