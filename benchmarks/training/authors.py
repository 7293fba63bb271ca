"""ESAM as its authors published it, from a clone of github.com/dydjw9/Efficient_SAM: none of their code is in here."""

import importlib.util
from pathlib import Path

import torch

FILE = "utils/Esam.py"  # which their train.py uses; an older one, utils/layer_dp_sam.py, does not run


def load(clone: Path) -> type[torch.optim.Optimizer]:
    """Their class ``ESAM``. Its ``step()`` reads ``paras``: inputs, targets, loss function, model and backward.

    Args:
        clone: the folder of the clone. The code in it is run.

    Raises:
        ValueError: if the folder does not hold it.
    """
    file = clone / FILE
    if not file.is_file():
        raise ValueError(f"{file} does not exist: give the folder of a clone of github.com/dydjw9/Efficient_SAM")
    spec = importlib.util.spec_from_file_location("authors_esam", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "ESAM"):
        raise ValueError(f"{file} has no class ESAM: give a clone of github.com/dydjw9/Efficient_SAM")
    return module.ESAM
