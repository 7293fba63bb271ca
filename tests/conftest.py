"""What all tests share: one thread, Ctrl-C, and Triton's interpreter and no tests marked gpu where there is no GPU."""

import os
import signal

import pytest
import torch

# Before Triton is imported: without a GPU its kernels run in its interpreter, on CPU tensors.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Most tensors here are tiny: threads that wait for each other would take longer than the work.
torch.set_num_threads(1)


# A shell's background jobs inherit that Ctrl-C is ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
