"""The decoder that decode and prefill are measured on, in every format, made once and kept as files.

8 layers, hidden 2048, 16 heads of 128, 64 experts of width 1024, top-8: 3.49 billion random parameters, about 0.6
active. One set of weights: the packed models are rounded from the bf16 one, the GGUF files written from the packed.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from moekit.adapt.packed_folder import load_packed, save_packed
from moekit.adapt.packing import write_packed
from moekit.adapt.quant import Recipe
from moekit.adapt.quant_stream import load_quantised
from moekit.adapt.random_weights import RandomWeights
from moekit.config import ModelConfig, MoEConfig
from moekit.errors import FileError
from moekit.models.decoder import Decoder
from moekit.models.gguf_file import GGUFFile
from moekit.models.gguf_write import GGUFType, write_gguf
from moekit.models.weights import load_decoder
from moekit.models.weights_write import save_decoder

__all__ = ["FAST", "FULL", "ModelFiles", "bytes_of_file", "bytes_of_token", "flops_of_prompt"]

FULL = ModelConfig(
    arch="qwen3_moe",
    vocab_size=32_000,
    hidden_size=2048,
    intermediate_size=1024,
    num_hidden_layers=8,
    num_attention_heads=16,
    num_key_value_heads=16,
    head_dim=128,
    max_position_embeddings=4096,
    rope_theta=1e6,
    qk_norm=True,
    moe=MoEConfig(
        hidden_size=2048,
        intermediate_size=1024,
        num_experts=64,
        top_k=8,
        gate_order="softmax_topk",
        norm_topk_prob=True,
    ),
)
FAST = dataclasses.replace(FULL, num_hidden_layers=1)
"""A layer of it, and its head: 0.56 billion parameters, which still do not fit caches."""

GGUF_TYPES: dict[str, GGUFType] = {"int4": "q4_0", "int8": "q8_0"}
"""The formats of ours that llama.cpp has too, with the same codes."""


class ModelFiles:
    """The decoder's files in a folder, made when first asked for.

    Args:
        folder: where to keep them: 7 GB in bf16, 4 GB in int8, 2 GB in int4, and as much again for llama.cpp.
        config: of the decoder.
        tell: called with what is being made.
    """

    def __init__(self, folder: Path, config: ModelConfig, tell: Callable[[str], None] = lambda _: None) -> None:
        moe = config.moe
        assert moe is not None
        name = f"{config.num_hidden_layers}x{config.hidden_size}-{moe.num_experts}x{moe.intermediate_size}"
        self.folder, self.config, self._tell = folder / name, config, tell

    def plain(self) -> Decoder:
        """In bf16."""
        folder = self.folder / "bf16"
        if not folder.exists():
            self._tell("making the random decoder")
            self._require(2 * _parameters(self.config))
            save_decoder(_random(self.config), folder)
        return load_decoder(folder)

    def packed(self, format: str) -> Decoder:
        """Packed in int4 or int8, the vocabulary's matrices in int8."""
        folder = self.folder / format
        if not folder.exists():
            self.plain()
            self._tell(f"packing it in {format}")
            decoder, _ = load_quantised(self.folder / "bf16", format)
            save_packed(decoder, folder)
        return load_packed(folder)

    def gguf(self, format: str) -> Path:
        """The packed one's codes as a GGUF file."""
        path = self.folder / f"{format}.gguf"
        if not path.exists():
            decoder = self.packed(format)
            self._tell(f"writing {path.name} for llama.cpp")
            written = write_gguf(decoder, path, GGUF_TYPES[format], vocabulary="q8_0")
            assert not written.rounded_twice, written.rounded_twice
        return path

    def random_packed(self) -> Path:
        """The folder of other random weights, drawn in int4, the vocabulary's matrices in int8: chosen so that tokens
        choose experts about equally often (adapt/random_weights.py)."""
        folder = self.folder / "random-int4"
        if not folder.exists():
            self._tell("drawing packed random weights")
            self.folder.mkdir(parents=True, exist_ok=True)
            write_packed(RandomWeights(self.config, Recipe.of("int4", "int8")), folder)
        return folder

    def random_gguf(self) -> Path:
        """Their codes as a GGUF file."""
        path = self.folder / "random-int4.gguf"
        if not path.exists():
            decoder = load_packed(self.random_packed())
            self._tell(f"writing {path.name} for llama.cpp")
            written = write_gguf(decoder, path, "q4_0", vocabulary="q8_0")
            assert not written.rounded_twice, written.rounded_twice
        return path

    def _require(self, size: int) -> None:
        """Refuse a folder without room for everything: about three times the bf16 model."""
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if free < 3 * size:
            raise FileError(f"{self.folder} has {free / 1e9:.0f} GB free; the bench's files need {3 * size / 1e9:.0f}")


def bytes_of_token(decoder: Decoder, cache: torch.dtype, past: int) -> int:
    """Bytes that one token must read: all matrices but experts that are not chosen and the embedding, and the past."""
    moe, config = decoder.config.moe, decoder.config
    assert moe is not None
    total = 0.0
    for name, value in decoder.state_dict().items():
        if isinstance(value, torch.Tensor) and not (name.startswith("embed.") and decoder.head is not None):
            total += value.nbytes * (moe.top_k / moe.num_experts if ".experts." in name else 1)
    position = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * cache.itemsize
    return int(total) + past * position


def bytes_of_file(path: Path, config: ModelConfig, past: int) -> int:
    """The same for llama.cpp on a GGUF file, whose cache is fp16."""
    moe = config.moe
    assert moe is not None
    total = 0.0
    for name, tensor in GGUFFile(path).tensors.items():
        if name != "token_embd.weight":
            total += tensor.nbytes * (moe.top_k / moe.num_experts if "_exps." in name else 1)
    return int(total) + past * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2


def flops_of_prompt(config: ModelConfig, tokens: int) -> float:
    """Two for each weight that a token meets; the head for the last token alone, half of attention's square."""
    moe = config.moe
    assert moe is not None
    total = 0.0
    for name, shape in _shapes(config).items():
        if len(shape) > 1 and not name.startswith("embed."):
            share = moe.top_k / moe.num_experts if ".experts." in name else 1
            total += 2 * shape.numel() * share * (1 if name.startswith("head.") else tokens)
    attention = config.num_hidden_layers * config.num_attention_heads * config.head_dim * tokens * tokens * 2
    return total + attention


def _random(config: ModelConfig) -> Decoder:
    """Norms of 1, everything else N(0, 0.02), in bf16."""
    with torch.device("meta"):
        decoder = Decoder(config)
    decoder = decoder.to(torch.bfloat16).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if "norm" in name:
                parameter.fill_(1)
                continue
            for part in parameter.view(-1).split(1 << 20):  # drawn in cache, in fp32
                part.copy_(torch.randn(part.shape, generator=generator) * 0.02)
    return decoder.eval()


def _shapes(config: ModelConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in Decoder(config).named_parameters()}


def _parameters(config: ModelConfig) -> int:
    return sum(shape.numel() for shape in _shapes(config).values())
