"""A checkpoint that an earlier version has written loads, and training goes on as that version would have gone on."""

from pathlib import Path

import pytest
import torch
from networks import batches, mlp, train
from torch import nn

from esam_kernels import ESAM
from esam_kernels.options import OPTIONS

# Written by 0.1.0 (commit 6a2214b) after 7 steps, with the weights ("after") that it had after 7 more.
CHECKPOINTS = sorted((Path(__file__).parent / "fixtures").glob("checkpoint_*.pt"))


@pytest.mark.parametrize("path", CHECKPOINTS, ids=lambda path: path.stem)
def test_training_goes_on(path: Path) -> None:
    checkpoint = torch.load(path)
    model = mlp(nn.BatchNorm1d(8), dtype=torch.float64)
    groups = [{"params": model[0].parameters()}, {"params": [*model[1:].parameters()]}]
    optimizer = ESAM(groups, torch.optim.AdamW, lr=1.0)
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])

    for group, written in zip(optimizer.param_groups, checkpoint["optimizer"]["param_groups"]):
        for name, option in OPTIONS.items():
            made = ESAM([torch.zeros(1)], torch.optim.AdamW).param_groups[0][name]
            assert group[name] == written.get(name, made), f"{name}, {option.meaning}"
        assert group["esam_step"] == 7

    train(model, optimizer, batches(14, dtype=torch.float64)[7:])
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, checkpoint["after"][name], rtol=1e-9, atol=1e-12)
