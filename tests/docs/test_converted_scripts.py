"""Scripts as they stand in public are converted by the recipes alone, in three lines, and train as before."""

import warnings
from pathlib import Path

import pytest
import torch
from networks import same, values

# The lines that go, and those that take their place.
CONVERSIONS = {
    "image_classification": [
        ("import torch\n", "import torch\nfrom esam_kernels import ESAM, batch_closure\n"),
        (
            "optimizer = torch.optim.SGD(model.parameters(), lr=0.1,",
            "optimizer = ESAM(model.parameters(), torch.optim.SGD, rho=0.05, gamma=1, lr=0.1,",
        ),
        (
            "        optimizer.zero_grad()\n        outputs = model(inputs)\n"
            "        loss = criterion(outputs, targets)\n        loss.backward()\n",
            "        loss = optimizer.backward(batch_closure(model, criterion, inputs, targets))\n",
        ),
    ],
    "character_gpt": [
        ("import torch\n", "import torch\nfrom esam_kernels import ESAM\n"),
        ("torch.optim.AdamW(groups,", "ESAM(groups, torch.optim.AdamW, rho=0.05, gamma=1,"),
        (
            "        for _ in range(accumulation):\n            logits, loss = model(*get_batch())\n"
            "            (loss / accumulation).backward()\n",
            "        loss = optimizer.backward([lambda i, b=get_batch(): model(*b)[1] for _ in range(accumulation)])\n",
        ),
    ],
    "token_classification": [
        ("import torch\n", "import torch\nfrom esam_kernels import ESAM, batch_closure, token_loss\n"),
        (
            "torch.optim.AdamW(model.parameters(), lr=1e-2)",
            "ESAM(model.parameters(), torch.optim.AdamW, rho=0.05, gamma=0.5, lr=1e-2)",
        ),
        (
            "        logits = model(**batch)\n"
            "        loss = cross_entropy(logits.flatten(0, 1), labels.flatten())\n        loss.backward()\n",
            "        loss = optimizer.backward(batch_closure(model, token_loss, batch, labels))\n",
        ),
    ],
    "detection": [
        ("import torch\n", "import torch\nfrom esam_kernels import ESAM\n"),
        (
            "torch.optim.SGD(model.parameters(), lr=0.02,",
            "ESAM(model.parameters(), torch.optim.SGD, rho=0.05, gamma=1, model=model, lr=0.02,",
        ),
        (
            "        loss_dict = model(images, targets)\n        losses = sum(loss_dict.values())\n",
            "        losses = optimizer.backward(lambda index: model(images, targets))\n",
        ),
        ("        optimizer.zero_grad()\n        losses.backward()\n", ""),
    ],
}


def plain(name):
    return (Path(__file__).parent / "scripts" / f"{name}.py").read_text()


def converted(name):
    code = plain(name)
    for old, new in CONVERSIONS[name]:
        assert code.count(old) == 1
        code = code.replace(old, new)
    return code


def run(code):
    names = {"__name__": "__main__"}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*ESAM")
        exec(compile(code, "script", "exec"), names)
    return names


@pytest.mark.parametrize("name", CONVERSIONS)
def test_a_script_learns_before_and_after(name):
    before, after = run(plain(name)), run(converted(name))
    assert before["learned"]
    assert after["learned"]
    assert after["optimizer"].param_groups[0]["esam_step"] > 0
    assert not same(values(before["model"]), values(after["model"]))


@pytest.mark.parametrize("name", CONVERSIONS)
def test_with_a_radius_of_0_a_converted_script_is_the_plain_one(name):
    before, after = run(plain(name)), run(converted(name).replace("rho=0.05", "rho=0.0"))
    for mine, theirs in zip(values(after["model"]), values(before["model"])):
        torch.testing.assert_close(mine, theirs, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", CONVERSIONS)
def test_at_most_three_lines_are_new(name):
    lines = plain(name).splitlines()
    new = [line for line in converted(name).splitlines() if line not in lines]
    assert len(new) <= 3
