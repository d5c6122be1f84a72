"""A small MoE language model from random weights, in Python: data, trainer, monitor.

python examples/train_from_scratch.py [TEXT FILES]      (this folder's sources without any)
"""

import sys
import tempfile
from pathlib import Path

import torch

from moekit.config import DataConfig, ModelConfig, MoEConfig, TrainConfig
from moekit.models import Decoder
from moekit.train import Trainer, prepare


class Bytes:
    """The simplest tokenizer: a byte is a token, 256 ends a document."""

    eos_ids = (256,)
    vocab_size = 257

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


torch.manual_seed(0)
moe = MoEConfig(hidden_size=64, intermediate_size=64, num_experts=8, top_k=2)
config = ModelConfig(
    arch="mixtral",
    vocab_size=257,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=128,
    moe=moe,
    router_aux_loss_coef=0.01,
)
with tempfile.TemporaryDirectory() as folder:
    files = sys.argv[1:]
    if not files:
        files = [f"{folder}/text.txt"]
        Path(files[0]).write_text("".join(path.read_text() for path in Path(__file__).parent.glob("*.py")))
    data = prepare(DataConfig(train=tuple(files), sequence_length=64), Bytes(), Path(folder) / "tokens")
    train = TrainConfig(steps=60, batch_size=8, lr=3e-3, warmup_steps=5, save_every=0, autocast="none")
    result = Trainer(Decoder(config), data, train, Path(folder) / "run").run()

print(f"loss {result.last.lm_loss:.2f} nats a byte after {result.steps} steps (random guessing: 5.55)")
for layer in result.routing.report():
    print(f"layer {layer.layer}: counts {layer.counts}, balance score {layer.balance_score:.2f}")
assert result.last.lm_loss < 4
