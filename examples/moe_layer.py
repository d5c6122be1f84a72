"""An MoE layer in a model of one's own: learn which of four rotations a point went through.

python examples/moe_layer.py
"""

import torch
from torch import nn
from torch.nn import functional as F

import moekit

torch.manual_seed(0)
config = moekit.MoEConfig(hidden_size=32, intermediate_size=32, num_experts=4, top_k=2)


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.moe, self.leave = nn.Linear(4, 32), moekit.MoE(config), nn.Linear(32, 4)

    def forward(self, x):
        h = self.enter(x)
        y, routing = self.moe(h)  # the layer has no residual of its own
        return self.leave(h + y), routing


def batch(size: int = 256):
    points, labels = torch.randn(size, 2), torch.randint(4, (size,))
    angles = labels * torch.pi / 2
    turned = torch.stack(
        [
            points[:, 0] * angles.cos() - points[:, 1] * angles.sin(),
            points[:, 0] * angles.sin() + points[:, 1] * angles.cos(),
        ],
        dim=1,
    )
    return torch.cat([points, turned], dim=1), labels


model = Classifier()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for step in range(200):
    x, labels = batch()
    logits, routing = model(x)
    loss = F.cross_entropy(logits, labels) + 0.01 * moekit.losses.load_balancing(routing)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 50 == 0 or step == 199:
        print(f"step {step:3}  loss {loss.item():.3f}  tokens of each expert {routing.counts_E.tolist()}")

x, labels = batch(1000)
accuracy = (model(x)[0].argmax(-1) == labels).float().mean().item()
print(f"accuracy {accuracy:.1%}")
assert accuracy > 0.9
