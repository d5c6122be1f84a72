"""One matrix for all rows, as in a dense linear layer, without gradient: what decoding does seven times a layer.

PyTorch's product of one bf16 row reaches a fraction of the memory's bandwidth; the native grouped op with a
single expert streams the matrix at nearly all of it.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from moekit.kernels import select

__all__ = ["linear"]


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x · Wᵀ + b, (..., I) → (..., O), in x's dtype; `torch.nn.functional.linear` wherever that is the better choice.

    The native kernel takes it for few rows (`select.choose` decides) when no gradient is wanted, nothing is
    autocast and x and W are of one dtype.

    >>> linear(torch.ones(1, 2), torch.ones(3, 2)).tolist()
    [[2.0, 2.0, 2.0]]
    """
    rows = x.shape[:-1].numel()
    plain = torch.is_grad_enabled() or x.dtype != weight_OI.dtype or torch.is_autocast_enabled(x.device.type)
    if plain or select.choose("grouped_mm", x.device, x.dtype, rows, 1) != "cpu":
        return F.linear(x, weight_OI, bias_O)
    y: Tensor = select.BACKENDS["cpu"].grouped_mm(x.reshape(rows, x.shape[-1]), weight_OI.unsqueeze(0), _count(rows))
    y = y if bias_O is None else y + bias_O
    return y.view(*x.shape[:-1], weight_OI.shape[0])


@cache
def _count(rows: int) -> Tensor:
    return torch.tensor([rows])
