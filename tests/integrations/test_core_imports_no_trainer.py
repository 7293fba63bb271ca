"""Who has no trainer installed, or uses another, is not asked for one."""

import subprocess
import sys
from pathlib import Path

TRAINERS = ("pytorch_lightning", "lightning", "transformers", "accelerate", "timm")


def test_core_imports_no_trainer():
    code = f"""
import sys
import torch
from esam_kernels import ESAM
model = torch.nn.Linear(2, 1)
optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, gamma=1)
optimizer.step(lambda: (optimizer.zero_grad(), model(torch.ones(3, 2)).sum().backward()))
import esam_kernels.integrations, esam_kernels.integrations.lightning
assert not {{name.partition(".")[0] for name in sys.modules}}.intersection({TRAINERS})
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
