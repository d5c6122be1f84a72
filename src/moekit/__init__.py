"""moekit: build, train, adapt, compress, run, serve and observe Mixture-of-Experts models.

Names are imported when first used (PEP 562), so that `import moekit` and `moekit --help` never import torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "MoE": "moekit.moe.layer",
    "MoEConfig": "moekit.config",
    "Model": "moekit.engine.engine",
    "Routing": "moekit.moe.types",
    "errors": "",
    "kernels": "",
    "load": "moekit.engine.engine",
    "losses": "moekit.moe",
}

__all__ = ["MoE", "MoEConfig", "Model", "Routing", "errors", "kernels", "load", "losses"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'moekit' has no attribute {name!r}")
    home = _HOME[name]
    value = getattr(importlib.import_module(home), name) if home else importlib.import_module(f"moekit.{name}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
