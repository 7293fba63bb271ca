"""Token classification as the Transformers library's run_ner has it: padding, -100 for no label, a warmup."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

torch.manual_seed(0)
words, classes = 30, 3
sentences = [torch.randint(1, words, (length,)) for length in torch.randint(3, 10, (160,)).tolist()]
examples = [{"input_ids": words_, "labels": (words_ + words_.roll(1)) % classes} for words_ in sentences]


def collate(rows):
    pad = nn.utils.rnn.pad_sequence
    tokens = pad([row["input_ids"] for row in rows], batch_first=True)
    labels = pad([row["labels"] for row in rows], batch_first=True, padding_value=-100)
    labels[:, 0] = -100  # a special token's
    return {"input_ids": tokens, "attention_mask": (tokens != 0).long(), "labels": labels}


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(words, 32, padding_idx=0)
        self.mix = nn.Conv1d(32, 64, 3, padding=1)
        self.classifier = nn.Linear(64, classes)

    def forward(self, input_ids, attention_mask):
        hidden = self.embedding(input_ids) * attention_mask[..., None]
        return self.classifier(self.mix(hidden.transpose(1, 2)).transpose(1, 2).relu())


loader = DataLoader(examples, batch_size=16, shuffle=True, collate_fn=collate)
model = Tagger()
epochs = 15
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
total = epochs * len(loader)
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step / 10 + 0.1, (total - step) / total))

for _ in range(epochs):
    model.train()
    for batch in loader:
        labels = batch.pop("labels")
        logits = model(**batch)
        loss = cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

model.eval()
with torch.no_grad():
    batch = collate(examples)
    labels = batch.pop("labels")
    correct = model(**batch).argmax(2) == labels
learned = correct[labels != -100].float().mean().item() > 0.9
