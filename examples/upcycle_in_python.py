"""Dense to sparse in Python: the output stays, the parameters grow, the work a token does not.

python examples/upcycle_in_python.py [MODEL]      (a small random Llama without MODEL)
"""

import sys

import torch

from moekit.adapt import upcycle
from moekit.config import ModelConfig, UpcycleConfig
from moekit.models import Decoder, load_decoder
from moekit.plan import flops_per_token, parameters

torch.manual_seed(0)
SMALL = ModelConfig(
    arch="llama",
    vocab_size=500,
    hidden_size=64,
    intermediate_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=256,
)
dense = load_decoder(sys.argv[1]) if len(sys.argv) > 1 else Decoder(SMALL)
sparse = upcycle(dense, UpcycleConfig(method="split", num_experts=8, top_k=2))

ids = torch.randint(dense.config.vocab_size, (2, 64))
with torch.no_grad():
    before, after = dense(ids).logits, sparse(ids)
difference = ((after.logits - before).norm() / before.norm()).item()
print(f"parameters   {parameters(dense.config).total:,} → {parameters(sparse.config).total:,}")
print(f"FLOPs/token  {flops_per_token(dense.config):,} → {flops_per_token(sparse.config):,}")
print(f"logits differ by {difference:.1e} of their size")
print("first layer's experts got", after.routings[0].counts_E.tolist(), "of", ids.numel() * 2, "assignments")
assert difference < 1e-4
