"""GPT-2 whose block 10 has 32 experts for an MLP: one call, the same logits, then training.

python examples/gpt2_block10.py [FOLDER]      (a small random GPT-2 without FOLDER, a model of yours with it)

The recipe: 32 experts, at most 256 tokens each, AdamW at 3e-5 with weight decay 0.1, micro-batches of 4. The model is
on the CPU here, and so is the optimizer's state; keeping the state there while the model is on a GPU is not shown.
"""

import sys

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from moekit import losses
from moekit.adapt import routings, to_moe
from moekit.config import CapacityConfig, SurgeryConfig

torch.manual_seed(0)
MICRO_BATCH, ACCUMULATE, STEPS, LENGTH = 4, 2, 12, 32
if len(sys.argv) > 1:
    model = GPT2LMHeadModel.from_pretrained(sys.argv[1])
else:
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=100, n_positions=64, n_embd=32, n_head=4, bos_token_id=0, eos_token_id=0)
    )

vocabulary = model.config.vocab_size
starts = torch.randint(vocabulary, (MICRO_BATCH * ACCUMULATE, 1))
rows = (starts + 7 * torch.arange(LENGTH)) % vocabulary  # every token says which one follows

config = SurgeryConfig(num_experts=32, top_k=2, capacity=CapacityConfig(tokens=256))
with torch.no_grad():
    before = model.eval()(rows).logits
    to_moe(model, "transformer.h.10.mlp", config)
    difference = (model(rows).logits - before).abs().max().item()
print(f"logits differ by {difference:.1e} before training")
print(f"the dense model's output: {config.changes_output or 'equal always'}")

optimizer = torch.optim.AdamW(model.parameters(), lr=3e-5, weight_decay=0.1)
model.train()
history = []
for step in range(STEPS):
    for micro_batch in rows.split(MICRO_BATCH):
        loss = model(micro_batch, labels=micro_batch).loss
        balance = losses.load_balancing(routings(model))
        ((loss + 0.01 * balance) / ACCUMULATE).backward()
        history.append(loss.item())
    optimizer.step()
    optimizer.zero_grad()
    if step in (0, STEPS - 1):
        (routing,) = routings(model)
        busy = int((routing.counts_E > 0).sum())
        print(f"step {step + 1:2}  loss {loss.item():.3f}  balance {balance.item():.2f}  experts used {busy} of 32")

assert difference < 1e-5
assert sum(history[-2:]) < sum(history[:2])
