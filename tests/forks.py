"""Processes of tests that begin at once: they are forked from one that has imported what takes longest.

With CUDA a process must not be forked: see ``ranks``.
"""

import multiprocessing
from multiprocessing.context import ForkServerContext

PRELOADED = ["torch._dynamo", "torch.distributed.fsdp", "torch.distributed.checkpoint", "hypothesis", "pytest"]


def context() -> ForkServerContext:
    """As ``multiprocessing`` itself, whose processes have none of this one's state but its environment's."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(PRELOADED)
    return found
