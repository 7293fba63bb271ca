"""A training run that can be killed, and goes on from the last checkpoint."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import torch
from networks import batches, cross_entropy, mlp
from torch import nn

from esam_kernels import ESAM, batch_closure

DATA = batches(16)
EVERY = 3  # steps between checkpoints


class Run:
    """A model with batch norm and dropout, AdamW as the base, a schedule, and a random state: all is checkpointed."""

    def __init__(self) -> None:
        self.model = mlp(nn.BatchNorm1d(8), nn.Dropout())
        self.optimizer = ESAM(self.model.parameters(), torch.optim.AdamW, lr=0.01, rho=0.1, granularity="element")
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 10, gamma=0.99)
        self.steps = 0

    def step(self) -> None:
        inputs, targets = DATA[self.steps % len(DATA)]
        self.optimizer.step(batch_closure(self.model, cross_entropy, inputs, targets))
        self.scheduler.step()
        self.steps += 1

    def save(self, folder: Path) -> None:
        parts = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "scheduler")}
        torch.save({**parts, "random": torch.get_rng_state(), "steps": self.steps}, folder / "checkpoint.new")
        os.replace(folder / "checkpoint.new", folder / "checkpoint")

    def load(self, folder: Path) -> None:
        checkpoint = torch.load(folder / "checkpoint")
        for name in ("model", "optimizer", "scheduler"):
            getattr(self, name).load_state_dict(checkpoint[name])
        torch.set_rng_state(checkpoint["random"])
        self.steps = checkpoint["steps"]


def main(folder: Path, saved: Callable[[], object]) -> None:
    """Train until SIGTERM; ``saved`` is called after every checkpoint."""
    stopping = False

    def stop(*_: object) -> None:
        nonlocal stopping
        stopping = True

    signal.signal(signal.SIGTERM, stop)
    torch.set_num_threads(1)  # as the run that is never killed has them
    run = Run()
    if (folder / "checkpoint").exists():
        run.load(folder)
    while not stopping:
        run.step()
        if run.steps % EVERY == 0:
            run.save(folder)
            saved()
    run.save(folder)  # the step that SIGTERM has come into has been finished
