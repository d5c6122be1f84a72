"""`Decoder`: one decoder-only model for every family; what differs is data in its `ModelConfig`.

It knows tensors, not text: tokens come in as ids, logits go out.
Shapes: B batch, L length, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moekit.config import ModelConfig
from moekit.errors import ConfigError, ContextLengthError, UnsupportedError
from moekit.kernels import linear
from moekit.kernels.formats import Packed
from moekit.kernels.quant import quant_linear
from moekit.models.attention import Attention, AttentionInput, attention_mask
from moekit.models.blocks import DenseMLP, norm
from moekit.models.cache import KVCache, Room
from moekit.models.mla import LatentAttention
from moekit.models.rope import rotary_factors
from moekit.models.steps import DecoderSteps, Token, obstacle
from moekit.moe import Linear, MoE, Routing, RoutingRecord
from moekit.moe.replay import is_bound

__all__ = ["Block", "Decoder", "DecoderOutput", "Features"]


@dataclass(frozen=True, eq=False)
class Features:
    """Hidden states (B, L, D) as the head takes them, and one routing an MoE layer, in layer order."""

    hidden_BLD: Tensor
    routings: tuple[Routing, ...]


@dataclass(frozen=True, eq=False)
class DecoderOutput:
    """Logits (B, L, V), and one routing an MoE layer, in layer order."""

    logits: Tensor
    routings: tuple[Routing, ...]


class Block(nn.Module):
    """x + m·attention(norm(x)), then x + m·mlp(norm(x)); the mlp is dense or an MoE, m is 1 in most families.

    By `norm_place` the results pass a norm too before they are added, or only these do.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        before, after = config.norm_place != "after", config.norm_place != "before"
        self.attn_norm = norm(config) if before else nn.Identity()
        self.attn = Attention(config, layer) if config.mla is None else LatentAttention(config, layer)
        self.attn_out_norm = norm(config) if after else None
        self.mlp_norm = norm(config) if before else nn.Identity()
        self.mlp_out_norm = norm(config) if after else None
        self.multiplier = config.residual_multiplier
        moe = config.moe if config.is_moe_layer(layer) else None
        self.mlp = MoE(moe.for_layer(layer)) if moe else _dense(config)

    def forward(
        self, x_BLD: Tensor, inputs: AttentionInput, recompute_moe: bool = False
    ) -> tuple[Tensor, Routing | None]:
        """Returns the new hidden states and, for an MoE block, its routing."""
        x_BLD = self.after_attention(x_BLD, self.attn(self.attn_norm(x_BLD), inputs))
        h_BLD, routing = self.mlp_norm(x_BLD), None
        if not isinstance(self.mlp, MoE):
            y_BLD = self.mlp(h_BLD)
        elif recompute_moe:
            y_BLD, routing = recomputed(self.mlp, h_BLD, inputs.mask_BL, inputs.ids_BL)
        else:
            y_BLD, routing = self.mlp(h_BLD, inputs.mask_BL, inputs.ids_BL)
        return self.after_mlp(x_BLD, y_BLD), routing

    def after_attention(self, x_BLD: Tensor, y_BLD: Tensor) -> Tensor:
        """The stream x after attention gave y."""
        return x_BLD + self._scaled(y_BLD if self.attn_out_norm is None else self.attn_out_norm(y_BLD))

    def after_mlp(self, x_BLD: Tensor, y_BLD: Tensor) -> Tensor:
        """The stream x after the MLP gave y."""
        return x_BLD + self._scaled(y_BLD if self.mlp_out_norm is None else self.mlp_out_norm(y_BLD))

    def _scaled(self, y_BLD: Tensor) -> Tensor:
        return y_BLD if self.multiplier == 1.0 else y_BLD * self.multiplier

    @property
    def is_plain(self) -> bool:
        """Whether what attention and MLP give is added to the stream as it is."""
        return self.multiplier == 1.0 and self.attn_out_norm is None


def _dense(config: ModelConfig) -> DenseMLP:
    sizes, gated = (config.hidden_size, config.intermediate_size), config.mlp_gated
    return DenseMLP(*sizes, config.activation, gated=gated, bias=config.mlp_bias)


def recomputed(module: nn.Module, *args: object) -> tuple[Tensor, Routing | None]:
    """Run `module`, keep none of its activations, and compute them again in backward along the recorded routes."""
    result: tuple[Tensor, Routing | None] = checkpoint(RoutingRecord().wrap(module), *args, use_reentrant=False)
    return result


class Decoder(nn.Module):
    """Embedding, blocks, norm and head.

    Attributes:
        room: who allots memory to its sequences' caches; None: nobody.

    >>> config = ModelConfig(arch="llama", vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
    ...     num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=32)
    >>> Decoder(config)(torch.zeros(1, 5, dtype=torch.long)).logits.shape
    torch.Size([1, 5, 50])
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.room: Room | None = None
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        learned = config.positions == "learned"
        self.positions = (
            nn.Parameter(torch.empty(config.max_position_embeddings, config.hidden_size)) if learned else None
        )
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = norm(config)
        tied = config.tie_word_embeddings
        self.head = None if tied else Linear(config.hidden_size, config.vocab_size, bias=config.head_bias)
        self._steps = DecoderSteps()
        self.apply(_initialise)
        if self.positions is not None:
            nn.init.normal_(self.positions, std=0.02)

    def forward(
        self,
        input_ids: Tensor,
        *,
        cache: KVCache | None = None,
        document_ids: Tensor | None = None,
        mask: Tensor | None = None,
        last_only: bool = False,
    ) -> DecoderOutput:
        """Logits for every position, or for the last alone (then L = 1 in the result). See `features`."""
        features = self.features(input_ids, cache=cache, document_ids=document_ids, mask=mask)
        hidden_BLD = features.hidden_BLD[:, -1:] if last_only else features.hidden_BLD
        return DecoderOutput(self.logits(hidden_BLD), features.routings)

    def features(
        self,
        input_ids: Tensor,
        *,
        cache: KVCache | None = None,
        document_ids: Tensor | None = None,
        mask: Tensor | None = None,
        checkpointing: Literal["none", "moe", "block"] = "none",
    ) -> Features:
        """Everything but the head.

        Args:
            input_ids: int64 (B, L).
            cache: the past; these tokens are appended to it.
            document_ids: int (B, L), non-decreasing along a row: attention stays inside a document and
                positions restart with each. Not together with a cache.
            mask: bool (B, L), True for real tokens. Not together with a cache.
            checkpointing: what to recompute in backward instead of keeping.
        Raises:
            ContextLengthError: past and new tokens exceed the model's max_position_embeddings.
            ConfigError: an empty input, or a cache together with document_ids or mask.
        """
        self._check(input_ids, cache, document_ids, mask)
        inputs = partial(self._inputs, input_ids, cache, document_ids, mask)
        x_BLD = self._embedded(input_ids, cache, document_ids)
        if obstacle(input_ids, cache, x_BLD.dtype) is None:
            assert cache is not None
            return self._steps_of([Token(x_BLD, cache, inputs)])[0]
        x_BLD, routings = self._through_modules(x_BLD, inputs(), checkpointing)
        if cache is not None:
            cache.advance(input_ids.shape[1])
        return Features(self._normed(x_BLD), routings)

    def _embedded(self, input_ids: Tensor, cache: KVCache | None, document_ids: Tensor | None) -> Tensor:
        x_BLD: Tensor = self.embed(input_ids)
        if self.config.embedding_multiplier != 1.0:
            x_BLD = x_BLD * self.config.embedding_multiplier
        if self.positions is not None:
            x_BLD = x_BLD + self.positions[_positions(input_ids, cache.length if cache else 0, document_ids)]
        return x_BLD

    def _normed(self, x_BLD: Tensor) -> Tensor:
        hidden_BLD: Tensor = self.norm(x_BLD)
        return hidden_BLD if self.config.logits_multiplier == 1.0 else hidden_BLD * self.config.logits_multiplier

    def forward_each(self, tokens: Sequence[int], caches: Sequence[KVCache]) -> list[DecoderOutput]:
        """One new token (logits 1, 1, V) of each of several sequences of any lengths, each after its own cache.

        Bit for bit what `forward` gives for one at a time, and nothing is padded. Where tokens go through the native
        steps they do so a block at a time, so that each block's weights come from memory once for all of them;
        elsewhere, and while a RoutingRecord is bound, one after the other.

        Raises:
            ContextLengthError: a sequence is at the end of the model's context.
        """
        ids = [torch.tensor([[token]], device=self.device) for token in tokens]
        pairs = list(zip(ids, caches, strict=True))
        x_BLDs = [self._embedded(each, cache, None) for each, cache in pairs]
        if is_bound() or any(obstacle(each, cache, x_BLDs[0].dtype) for each, cache in pairs):
            return [self(each, cache=cache, last_only=True) for each, cache in pairs]
        for each, cache in pairs:
            self._check(each, cache, None, None)
        inputs = [partial(self._inputs, each, cache, None, None) for each, cache in pairs]
        features = self._steps_of(list(map(Token, x_BLDs, caches, inputs)))
        return [DecoderOutput(self.logits(each.hidden_BLD), each.routings) for each in features]

    def _steps_of(self, tokens: Sequence[Token]) -> list[Features]:
        self._steps.run(self.layers, tokens, self.config)
        for token in tokens:
            token.cache.advance(1)
        return [Features(self._normed(token.as_module_takes_it()), tuple(token.routings)) for token in tokens]

    def _through_modules(
        self, x_BLD: Tensor, inputs: AttentionInput, checkpointing: str
    ) -> tuple[Tensor, tuple[Routing, ...]]:
        routings = []
        for block in self.layers:
            if checkpointing == "block" and torch.is_grad_enabled():
                x_BLD, routing = recomputed(block, x_BLD, inputs)
            else:
                x_BLD, routing = block(x_BLD, inputs, checkpointing == "moe" and torch.is_grad_enabled())
            if routing is not None:
                routings.append(routing)
        return x_BLD, tuple(routings)

    def explain(self) -> str:
        """One line on how a new token goes through the blocks; see models/steps.py."""
        return self._steps.explain(self.layers, self.norm.weight.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """The head: (..., D) → (..., V)."""
        if self.head is not None:
            logits: Tensor = self.head(hidden)
            return logits
        packed = self.head_packed
        return linear(hidden, self.head_weight) if packed is None else quant_linear(hidden, packed)

    @property
    def head_weight(self) -> Tensor:
        """(V, D): the head's matrix, which is the embedding's when they are tied.

        Raises:
            UnsupportedError: it is quantised, or has a bias.
        """
        if self.head_packed is not None:
            raise UnsupportedError("the head is quantised: training needs the unquantised model")
        if self.head is not None and self.head.bias is not None:
            raise UnsupportedError("the head has a bias, which the training loss does not know")
        return self.embed.weight if self.head is None else self.head.weight

    @property
    def head_packed(self) -> Packed | None:
        """The head's matrix in a quantised model (`moekit.adapt.quant`), else None."""
        packed: Packed | None = getattr(self.embed if self.head is None else self.head, "packed", None)
        return packed

    @property
    def is_packed(self) -> bool:
        """Whether the embedding is quantised, as all of the model then is: it computes in float32."""
        return hasattr(self.embed, "packed")

    @property
    def cache_dtype(self) -> torch.dtype:
        """Of keys and values: float16 in a quantised model (as in llama.cpp; 11 bits, beside weights of 4 or 8), else
        the embedding's."""
        return torch.float16 if self.is_packed else self.embed.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.norm.weight.device

    def _check(
        self, input_ids: Tensor, cache: KVCache | None, document_ids: Tensor | None, mask: Tensor | None
    ) -> None:
        past, length = (cache.length if cache else 0), input_ids.shape[1]
        if input_ids.numel() == 0:
            raise ConfigError("input_ids is empty: give at least one token")
        if past + length > self.config.max_position_embeddings:
            raise ContextLengthError(
                f"{past + length} tokens do not fit the model's context of {self.config.max_position_embeddings}"
            )
        if cache is not None and (document_ids is not None or mask is not None):
            raise ConfigError("a cache cannot be combined with document_ids or mask")

    def _inputs(
        self, input_ids: Tensor, cache: KVCache | None, document_ids: Tensor | None, mask: Tensor | None
    ) -> AttentionInput:
        past, length = (cache.length if cache else 0), input_ids.shape[1]
        rope = self.config.positions == "rope"
        rotary = rotary_factors(_positions(input_ids, past, document_ids), self.config) if rope else None
        windows = {self.config.attention.window_of(layer) for layer in range(self.config.num_hidden_layers)}
        allowed = {window: attention_mask(length, past, document_ids, mask, window) for window in windows}
        return AttentionInput(rotary, allowed, mask, cache, input_ids)


def _positions(input_ids: Tensor, past: int, document_ids: Tensor | None) -> Tensor:
    """(B or 1, L) positions; each document of a row starts again at 0."""
    positions = torch.arange(past, past + input_ids.shape[1], device=input_ids.device)[None]
    if document_ids is None:
        return positions
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return positions - torch.where(starts, positions, 0).cummax(dim=1).values


def _initialise(module: nn.Module) -> None:
    """N(0, 0.02) for the matrices of embeddings and linears; MoE layers initialise themselves."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
