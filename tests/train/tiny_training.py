"""A model of a few thousand parameters, a tokenizer of bytes, and a corpus made of counting."""

from __future__ import annotations

from pathlib import Path

import torch

from moekit.config import DataConfig, ModelConfig, MoEConfig
from moekit.models.decoder import Decoder
from moekit.train import TrainingData, prepare


class ByteTokenizer:
    """Bytes are ids; 256 ends a document."""

    eos_ids = (256,)
    vocab_size = 257

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


EXPERTS = MoEConfig(hidden_size=16, intermediate_size=8, num_experts=4, top_k=2)


def tiny_config(*, moe: MoEConfig | None = EXPERTS, **changes: object) -> ModelConfig:
    values = {
        "arch": "mixtral" if moe else "llama",
        "vocab_size": 257,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "router_aux_loss_coef": 0.01,
        "moe": moe,
    }
    return ModelConfig(**(values | changes))


def tiny_decoder(*, moe: MoEConfig | None = EXPERTS, seed: int = 0, **changes: object) -> Decoder:
    torch.manual_seed(seed)
    return Decoder(tiny_config(moe=moe, **changes))


def write_corpus(folder: Path, documents: int = 24) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(documents):
        words = " ".join(str(number * step) for step in range(1, 12 + number % 5))
        (folder / f"{number:02}.txt").write_text(f"The multiples of {number}: {words}.\n")
    return folder


def tiny_data(folder: Path, *, sequence_length: int = 32, seed: int = 0, documents: int = 24) -> TrainingData:
    corpus = write_corpus(folder / "corpus", documents)
    config = DataConfig(train=(str(corpus),), sequence_length=sequence_length, seed=seed)
    return prepare(config, ByteTokenizer(), folder / "cache")
