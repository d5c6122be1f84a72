"""What the headers of a folder's safetensors files show. No tensor is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moekit.errors import FormatError
from moekit.files import file_errors, parse_json
from moekit.lint.findings import Finding

__all__ = ["of_folder"]

_BIASES = ("e_score_correction_bias", "expert_bias", "selection_bias", "balancing_biases")
_NARROW = {"BF16": "bfloat16", "F16": "float16"}
_STUCK = {"bfloat16": 0.5, "float16": 4}
_MAX_HEADER = 100_000_000


def of_folder(folder: Path) -> Iterator[Finding]:
    """A selection bias that was stored too narrow to be updated.

    Raises:
        FormatError: a header is no header.
        FileError: a file cannot be read.
    """
    narrow: dict[str, list[str]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, entry in _header(path).items():
            if name.endswith(_BIASES) and isinstance(entry, Mapping) and entry.get("dtype") in _NARROW:
                narrow.setdefault(_NARROW[entry["dtype"]], []).append(name)
    for dtype, names in narrow.items():
        cause = (
            f"above {_STUCK[dtype]:g} a step of 0.001 is less than half the spacing of {dtype}: the bias stops moving, "
            "and experts that differ by less are confused"
        )
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield Finding("warning", "bias_narrow", f"{names[0]}{more} in {dtype}", cause, "store it in float32")


def _header(path: Path) -> dict[str, Any]:
    with file_errors(path, "read"), path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if not 2 <= size <= _MAX_HEADER:
            raise FormatError(f"{path} is no safetensors file: its header would be {size} bytes long")
        data = file.read(size)
    if len(data) < size:
        raise FormatError(f"{path} ends within its header")
    return parse_json(data, str(path))
