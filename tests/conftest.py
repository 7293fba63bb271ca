"""What all tests share."""

import torch

# Most tensors here are tiny: threads that wait for each other would take longer than the work.
torch.set_num_threads(1)
