"""`Linear`: torch's, but few bf16 rows without gradient go through the native kernel."""

from __future__ import annotations

from torch import Tensor, nn

from moekit.kernels import linear

__all__ = ["Linear"]


class Linear(nn.Linear):
    """y = W x + b with the parameters of `torch.nn.Linear`; see `moekit.kernels.linear` for what runs when."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) → (..., out_features)."""
        return linear(input, self.weight, self.bias)
