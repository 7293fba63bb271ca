"""The benchmark of weights in bf16 compares what it says: stochastic rounding, rounding to nearest, and float32."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks.commands import rounding
from esam_kernels import ESAM, batch_closure

BF16 = torch.bfloat16


def moved(dtype, nearest, rho=0.003):
    torch.manual_seed(0)
    layer = nn.Linear(300, 300).to(dtype)
    loss = (layer(torch.randn(8, 300).to(dtype)).float() ** 2).mean()
    before = [weight.detach().clone() for weight in layer.parameters()]
    result = rounding.move(list(layer.parameters()), loss, rho, nearest)
    assert all(torch.equal(a, b) for a, b in zip(before, layer.parameters()))
    return result


def test_stochastic_rounding_keeps_the_perturbation_and_rounding_to_nearest_loses_it():
    assert moved(torch.float32, nearest=False) == pytest.approx((1, 1), abs=0.01)
    projection, length = moved(BF16, nearest=False)
    assert projection == pytest.approx(1, abs=0.1)
    assert length > 1.2
    projection, _ = moved(BF16, nearest=True)
    assert projection < 0.7


def perturbed_by_esam():
    """The weights at which ESAM's last pass is taken."""
    torch.manual_seed(0)
    model = nn.Linear(50, 3).to(BF16)
    seen = []
    model.register_forward_pre_hook(lambda module, _: seen.append(module.weight.detach().clone()))
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.001, beta=1.0)
    loss = nn.CrossEntropyLoss(reduction="none")
    optimizer.backward(batch_closure(model, loss, torch.randn(8, 50).to(BF16), torch.arange(8) % 3))
    return seen[-1]


def test_the_control_rounds_esams_own_perturbation_to_nearest_and_only_inside_its_block():
    before = perturbed_by_esam()
    with rounding.rounding_to_nearest():
        nearest = perturbed_by_esam()
    assert not torch.equal(nearest, before)
    assert torch.equal(perturbed_by_esam(), before)


def test_end_to_end(tmp_path, capsys):
    rounding.main(
        ["--width", "8", "--epochs", "1", "--seeds", "2", "--rho", "0.1", "--device", "cpu", "--output", str(tmp_path)]
    )
    result = json.loads((tmp_path / "rounding_cpu.json").read_text())
    assert list(result["rows"]) == [row.label for row in rounding.rows_of([0.1])]
    assert all(len(runs) == 2 for runs in result["runs"].values())
    printed = capsys.readouterr().out
    assert all(label in printed for label in result["rows"])


def test_training_that_diverges_is_shown_and_has_no_part_in_means(tmp_path, capsys):
    arguments = ["--width", "8", "--epochs", "1", "--seeds", "1", "--rho", "0.1", "--device", "cpu"]
    rounding.main([*arguments, "--lr", "1e30", "--output", str(tmp_path)])
    result = json.loads((tmp_path / "rounding_cpu.json").read_text())
    assert all(row == {"diverged": 1} for row in result["rows"].values())
    assert capsys.readouterr().out.count(" diverged |") == len(result["rows"])
    one = {"test_accuracy": 90.0}
    assert rounding.summarize([None, one, one]) == {"diverged": 1, "test_accuracy": {"mean": 90.0, "std": 0.0}}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [(["--beta", "0"], "beta"), (["--batch-size", "1001"], "--batch-size 1001"), (["--lr", "-1"], "learning rate")],
)
def test_what_cannot_be_trained_is_refused(tmp_path, capsys, change, complaint):
    with pytest.raises(SystemExit) as stopped:
        rounding.main([*change, "--device", "cpu", "--output", str(tmp_path)])
    assert stopped.value.code == 2
    assert complaint in capsys.readouterr().err


def test_sgd_is_trained_on_the_weights_of_the_row(monkeypatch):
    seen = []
    monkeypatch.setattr(
        rounding,
        "trainer",
        lambda name, model, settings, device: (
            seen.append((name, settings.esam["rho"], next(model.parameters()).dtype)) or 1 / 0
        ),
    )
    images = rounding.data.load("digits", None, torch.device("cpu"), torch.contiguous_format)
    args = SimpleNamespace(device="cpu", width=4, lr=0.1, momentum=0.9, weight_decay=5e-4, epochs=1, batch_size=8)
    for row in rounding.rows_of([0.5]):
        with pytest.raises(ZeroDivisionError):
            rounding.train(row, 0, images, args)
    float32, bf16 = torch.float32, torch.bfloat16
    assert seen == [
        ("sgd", 0.0, float32),
        ("sgd-bf16-weights", 0.0, bf16),
        ("esam", 0.5, float32),
        ("esam-bf16-weights", 0.5, bf16),
        ("esam-bf16-weights-to-nearest", 0.5, bf16),
    ]
