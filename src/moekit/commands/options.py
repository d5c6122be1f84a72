"""Flags that several verbs share, so that one thing has one name and one help text everywhere."""

from __future__ import annotations

from typing import Annotated, Literal

import tyro

from moekit.config import SamplingConfig

__all__ = ["DType", "ModelPath", "Sampling"]

ModelPath = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
DType = Literal["float32", "bfloat16", "float16"]
Sampling = Annotated[SamplingConfig, tyro.conf.arg(name="")]
"""The fields of `SamplingConfig` as flags without a prefix."""
