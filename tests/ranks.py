"""Starts the processes of a distributed test, which run its scenarios in one go, and collects what they return."""

import importlib
import os
import signal
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import forks
import pytest
import torch
import torch.distributed as dist

needs_fsdp2 = pytest.mark.skipif(torch.__version__ < (2, 13), reason="ESAM supports FSDP2 from torch 2.13 on")


def device() -> str:
    """Where a scenario's tensors are."""
    return "cuda" if dist.is_initialized() and dist.get_backend() == "nccl" else "cpu"


def process(rank: int, module: str, backend: str, world: int, folder: str, scenarios: str) -> None:
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    store, patience = f"file://{folder}/store", timedelta(seconds=20)  # a rank that waits in vain fails
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=world, timeout=patience)
    results: dict[str, Any] = {}
    todo = getattr(importlib.import_module(module), scenarios)
    os.chdir(folder)  # for what scenarios write
    for name, (scenario, options) in todo.items():
        try:
            results[name] = scenario(rank, **options)
        except Exception:
            results[name] = traceback.format_exc()
        torch.save(results, f"{folder}/{rank}.pt")  # the next scenario may kill this rank
        if isinstance(results[name], str):
            break  # the ranks are out of step
    os._exit(0)  # where a rank was killed, gloo's threads may end the others on their way out


def run(
    module: str, world: int, folder: Path, backend: str = "gloo", scenarios: str = "SCENARIOS"
) -> Callable[[str], list[Any]]:
    """Run a module's scenarios, a function and its options by name; returned is what each rank made of a name.

    A rank that has killed itself made None of the last one.
    """
    context = torch.multiprocessing.get_context("spawn") if backend == "nccl" else forks.context()
    processes = [
        context.Process(target=process, args=(rank, module, backend, world, str(folder), scenarios))
        for rank in range(world)
    ]
    for one in processes:
        one.start()
    for one in processes:
        one.join(300)
        if one.exitcode not in (0, -signal.SIGKILL):
            for each in processes:
                each.kill()
            raise AssertionError(f"a rank has ended with the exit code {one.exitcode} (None: it has not ended)")
    last = list(getattr(importlib.import_module(module), scenarios))[-1]
    files = [folder / f"{rank}.pt" for rank in range(world)]  # a rank may die in its first scenario
    found = [torch.load(file, "cpu", weights_only=False) if file.exists() else {} for file in files]
    for rank, one in zip(found, processes):
        if one.exitcode == -signal.SIGKILL:
            rank.setdefault(last, None)

    def of(name: str) -> list[Any]:
        for rank in found:
            assert not isinstance(rank.get(name, "an earlier scenario failed"), str), rank.get(name)
        return [rank[name] for rank in found]

    return of
