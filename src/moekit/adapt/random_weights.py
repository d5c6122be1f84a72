"""Random packed weights of any configuration, as fast as a disk takes them, for sizing and tests.

Every matrix has the standard deviation 1/√columns, so that a normed input of size 1 gives a product of size 1 in every
layer: the residual stream grows with the root of the depth, and each norm brings it back. Two kinds are different:
- Embedding and head have twice that: logits have the deviation 2, and predictions an entropy of about ln V − 2 nats.
- The output of attention has a tenth: a mean over positions is nearly the same for all of them, and let grow from layer
  to layer it would send all tokens to the same experts. So these are chosen about equally often.
Routers are normal numbers of the first size, norms 1, biases and the rest 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moekit import __version__
from moekit.adapt.packed_file import packed_state
from moekit.adapt.quant import QuantPlan, Recipe
from moekit.adapt.quant_modules import QuantExperts, QuantMatrix
from moekit.config import ModelConfig
from moekit.kernels.random_packed import make_random
from moekit.models.archs import config_to_hf
from moekit.models.weights import empty_decoder

__all__ = ["RandomWeights"]

_SIZES = {"embed": 2.0, "head": 2.0, "o_proj": 0.1}


class RandomWeights:
    """A `Maker` of `write_packed`: the same numbers for the same arguments, whatever the order and the machine.

    Args:
        config: of the model.
        recipe: which format each matrix gets.
        seed: of the numbers.
    Raises:
        UnsupportedError: the family cannot express the model.
    """

    threads = 2  # one draws while the other writes

    def __init__(self, config: ModelConfig, recipe: Recipe, seed: int = 0) -> None:
        self.decoder = empty_decoder(config, config.num_hidden_layers, "the configuration")
        self.parameters = sum(parameter.numel() for parameter in self.decoder.parameters())
        QuantPlan(self.decoder, recipe, "meta").install()
        self.job: Mapping[str, Any] = {
            "moekit": __version__,
            "config.json": config_to_hf(config),
            "--quant": str(recipe.format),
            "--head": str(recipe.head),
            "--seed": seed,
        }
        self._seed = seed
        self._state = packed_state(self.decoder)
        self._number = {name: number for number, name in enumerate(self._state)}

    def make(self, name: str) -> tuple[Tensor, list[Any]]:
        """See `Maker`."""
        rng = np.random.Generator(np.random.SFC64([self._seed, self._number[name]]))
        owner, _, leaf = name.rpartition(".")
        module = self.decoder.get_submodule(owner)
        if self._state[name].dtype == torch.uint8:
            assert isinstance(module, QuantMatrix | QuantExperts)
            return _packed(module, leaf, self._state[name].numel(), rng, _SIZES.get(owner.rpartition(".")[2], 1.0)), []
        return _plain(leaf, self._state[name], rng), []


def _packed(module: QuantMatrix | QuantExperts, leaf: str, size: int, rng: np.random.Generator, std: float) -> Tensor:
    """A buffer of `size` random bytes with the matrices of a module's buffer in it, zeros after them."""
    bits = rng.integers(0, 2**64 - 1, size // 8, dtype=np.uint64, endpoint=True).view(np.uint8)
    buffer = torch.from_numpy(bits)
    matrices = [each.packed for each in module.matrices_in(leaf, buffer)]
    for packed in matrices:
        make_random(packed, std * packed.cols**-0.5)
    bits[sum(packed.data.numel() for packed in matrices) :] = 0
    return buffer


def _plain(leaf: str, like: Tensor, rng: np.random.Generator) -> Tensor:
    if like.dim() > 1 and not leaf.endswith("bias"):
        size = like.shape[-1] ** -0.5
        return torch.from_numpy(rng.standard_normal(tuple(like.shape), np.float32) * np.float32(size))
    return torch.full_like(like, 1 if leaf == "weight" else 0, device="cpu")  # a vector called weight is a norm's
