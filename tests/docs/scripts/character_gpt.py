"""A character GPT as nanoGPT has it: the model computes the loss, micro-batches are accumulated under autocast."""

import math

import torch
from torch import nn
from torch.nn.functional import cross_entropy

torch.manual_seed(0)
text = "the quick brown fox jumps over the lazy dog. " * 20
letters = sorted(set(text))
data = torch.tensor([letters.index(letter) for letter in text])
block, width, accumulation, steps = 16, 32, 2, 80


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(len(letters), width)
        self.places = nn.Embedding(block, width)
        self.block = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(width, len(letters), bias=False)
        self.head.weight = self.tokens.weight  # tied
        nn.init.normal_(self.tokens.weight, std=0.1)

    def forward(self, tokens, targets=None):
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        hidden = self.tokens(tokens) + self.places.weight[:length]
        logits = self.head(self.block(hidden, src_mask=mask, is_causal=True))
        loss = None if targets is None else cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss


def get_batch():
    starts = torch.randint(len(data) - block, (8,)).tolist()
    inputs = torch.stack([data[start : start + block] for start in starts])
    return inputs, torch.stack([data[start + 1 : start + 1 + block] for start in starts])


model = GPT()
decayed = [param for param in model.parameters() if param.dim() > 1]
others = [param for param in model.parameters() if param.dim() <= 1]
groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))

for step in range(steps):
    for group in optimizer.param_groups:
        group["lr"] = 5e-3 * (1 + math.cos(math.pi * step / steps))
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(accumulation):
            logits, loss = model(*get_batch())
            (loss / accumulation).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

learned = loss.item() < 2.0  # of log(27) = 3.3
