"""Keeps torch.compile out of a step, which would lose what happens between tensors and optimizer."""

import torch

# Whoever compiles a whole training step gets a graph break there. Models that are compiled by themselves stay so.
eager = torch.compiler.disable(
    reason="A step of ESAM runs the model several times and is not traced: leave out fullgraph=True, or compile the "
    "model instead of the function that steps; call current_pass() and first_pass() outside of what is compiled so"
)
