"""A transformers model on moekit's experts: two lines, and the losses, gradients and texts stay what they were.

python examples/transformers_dropin.py
"""

import copy

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from moekit.integrations.transformers import expert_modules, use_moekit

torch.manual_seed(0)
config = Qwen3MoeConfig(
    vocab_size=64,
    hidden_size=64,
    moe_intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_experts=8,
    num_experts_per_tok=2,
    output_router_logits=True,  # its own balancing loss
)
eager = Qwen3MoeForCausalLM(config)
eager.set_experts_implementation("eager")
model = use_moekit(copy.deepcopy(eager))
print("on moekit:", ", ".join(expert_modules(model)))


def train(model, steps=30):
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    data = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        start = torch.randint(64, (8, 1), generator=data)
        ids = (start + 3 * torch.arange(24)) % 64  # count in threes
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


for name, losses in (("eager", train(eager)), ("moekit", train(model))):
    print(f"{name:6}", *(f"{loss:.5f}" for loss in losses[::6]))

model.eval()
said = model.generate(torch.tensor([[7, 10, 13]]), max_new_tokens=8, do_sample=False)[0].tolist()
print("counts in threes:", said)
assert said == list(range(7, 40, 3)), "the model has not learnt to count"
