"""A model on disk to packed tensors, one at a time: `QuantisedWeights` for a file, `load_quantised` for memory.

Of a stack of experts only one matrix is read at a time, whether the model on disk has them one by one or together.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moekit import __version__
from moekit.adapt.packed_file import packed_state
from moekit.adapt.quant import PerExpert, QuantPlan, Recipe, named
from moekit.adapt.quant_modules import QuantExperts, QuantMatrix, pack_into
from moekit.adapt.quant_report import QuantReport
from moekit.files import file_errors
from moekit.models.decoder import Decoder
from moekit.models.weights import StoredDecoder, put

__all__ = ["QuantisedWeights", "load_quantised"]


_MOST_THREADS = 8  # each has a matrix in memory


class QuantisedWeights:
    """A `Maker` of `write_packed`: the tensors that `quantise` would make of the model at `path`.

    Args:
        path: an unquantised model, as `load_decoder` takes it.
        recipe: which format each matrix gets.
    Raises:
        What `load_decoder` and `quantise` raise.

    Attributes:
        decoder: the packed one, without memory.
    """

    def __init__(self, path: str | os.PathLike[str], recipe: Recipe) -> None:
        self._stored = StoredDecoder(path)
        self.decoder = self._stored.empty
        self._plan = QuantPlan(self.decoder, recipe, "meta")
        self._plan.install()
        self._state = packed_state(self.decoder)
        self.threads = min(torch.get_num_threads(), _MOST_THREADS)
        self.job: Mapping[str, Any] = {
            "moekit": __version__,
            "model": _identity(Path(path)),
            "--quant": str(recipe.format),
            "--head": str(recipe.head),
        }

    def make(self, name: str) -> tuple[Tensor, list[Any]]:
        """The tensor `name` of the packed decoder; for each matrix it was made of (its parameter, bytes, error)."""
        owner, _, leaf = name.rpartition(".")
        module = self.decoder.get_submodule(owner)
        if self._state[name].dtype == torch.uint8:
            assert isinstance(module, QuantMatrix | QuantExperts)
            return self._packed(module, owner, leaf)
        if isinstance(module, QuantMatrix | QuantExperts):
            name = f"{owner}.{module.parameter(leaf)}"
        value = self._stored.read(name)
        return value.float(), [[name, value.nbytes, 0.0]]

    def report(self, notes: Mapping[str, list[Any]]) -> QuantReport:
        """Of everything that was made, by what `make` noted of each tensor."""
        nbytes, errors = dict.fromkeys(self._stored.names, 0), dict.fromkeys(self._stored.names, 0.0)
        for lines in notes.values():
            for parameter, size, error in lines:
                nbytes[parameter] += size
                errors[parameter] = max(errors[parameter], error)
        return QuantReport.of(
            self._plan.row(name, self._stored.shape(name), nbytes[name], errors[name]) for name in self._stored.names
        )

    def _packed(self, module: QuantMatrix | QuantExperts, owner: str, leaf: str) -> tuple[Tensor, list[Any]]:
        data, notes = torch.zeros(self._state[f"{owner}.{leaf}"].shape, dtype=torch.uint8), []
        for each in module.matrices_in(leaf, data):
            name = f"{owner}.{each.parameter}"
            value = self._stored.read(name, expert=each.expert)
            with named(name if each.expert is None else f"expert {each.expert} of {name}"):
                notes.append([name, value.nbytes, pack_into(each.packed, value)])
        return data, notes


def load_quantised(
    path: str | os.PathLike[str],
    format: str,
    *,
    head: str = "int8",
    per_expert: PerExpert | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Decoder, QuantReport]:
    """`quantise` while loading, tensor by tensor: the peak is the packed model and one matrix.

    Args:
        path: an unquantised model, as `load_decoder` takes it.
        format, head, per_expert: as `quantise` takes them.
        progress: called with (tensors done, tensors in all).
    Raises:
        What `load_decoder` and `quantise` raise.
    """
    maker, notes = QuantisedWeights(path, Recipe.of(format, head, per_expert)), {}
    names = list(packed_state(maker.decoder))
    for number, name in enumerate(names, 1):
        value, notes[name] = maker.make(name)
        put(maker.decoder, name, value)
        progress(number, len(names))
    return maker.decoder.eval(), maker.report(notes)


def _identity(path: Path) -> list[Any]:
    """What changes when the files at `path` do."""
    with file_errors(path, "read"):
        files = [path] if path.is_file() else [path / "config.json", *sorted(path.glob("*.safetensors*"))]
        infos = [(file.name, file.stat()) for file in files]
    return [str(path.resolve()), *([name, info.st_size, info.st_mtime_ns] for name, info in infos)]
