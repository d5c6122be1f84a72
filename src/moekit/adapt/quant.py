"""`quantise`: the linears, experts, embedding and head of a model become packed ones, and a report says which.

What stays as it is: norms and biases, which are small, and routers, because a rounded router sends tokens elsewhere,
which no bound on a product's error covers. A moekit decoder computes in float32 afterwards: the residual stream, norms
and router are float32, its cache float16 (`Decoder.cache_dtype`), as in llama.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from moekit.adapt.quant_modules import QuantEmbedding, QuantExperts, QuantLinear, QuantMatrix, empty_twin, is_experts
from moekit.adapt.quant_report import KeptTensor, PackedTensor, QuantReport
from moekit.errors import ConfigError, UnsupportedError
from moekit.kernels.formats import Format
from moekit.models.decoder import Decoder
from moekit.moe import GroupedMLP, Linear, Router

__all__ = [
    "PerExpert",
    "QuantEmbedding",
    "QuantExperts",
    "QuantLinear",
    "QuantPlan",
    "Recipe",
    "hottest",
    "is_quantised",
    "named",
    "quantise",
    "replace_modules",
]

SKIP = ("*router*", "*gate")
"""Names of linears that are routers, or gates of one row, in the models of others and in ours."""
PerExpert = Mapping[int, Sequence[str | Format]] | Mapping[str, Sequence[str | Format]]
"""By layer (of a decoder) or name of an experts module, one format an expert."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Recipe:
    """Which format each matrix gets.

    Attributes:
        format: of every matrix that nothing below names.
        head: of a decoder's embedding and head.
        per_expert: by layer (of a decoder) or name of an experts module, one format an expert.
        skip: patterns of names of linears to leave as they are.
    Raises:
        UnknownNameError: no such format.
    """

    format: Format
    head: Format
    per_expert: Mapping[int | str, Sequence[Format]]
    skip: tuple[str, ...]

    @classmethod
    def of(
        cls,
        format: str | Format,
        head: str | Format = "int8",
        per_expert: PerExpert | None = None,
        skip: Sequence[str] = SKIP,
    ) -> Recipe:
        """Formats may be names, see `Format.parse`."""
        experts: dict[int | str, Sequence[Format]] = {
            layer: [_format(each) for each in formats] for layer, formats in (per_expert or {}).items()
        }
        return cls(_format(format), _format(head), experts, tuple(skip))


def quantise(
    module: nn.Module,
    format: str | Format,
    *,
    head: str | Format = "int8",
    per_expert: PerExpert | None = None,
    skip: Sequence[str] = SKIP,
    progress: Progress | None = None,
) -> QuantReport:
    """Pack the matrices of `module` in place; when it fails, the module is as it was.

    Of a moekit `Decoder` that is everything but norms, biases and routers; of any other module every `nn.Linear` and
    every experts module of moekit.

    Args:
        format, head, per_expert, skip: see `Recipe`. `head` is for a Decoder alone: elsewhere a head is a linear.
        progress: called with (matrices done, matrices in all).
    Raises:
        UnknownNameError: no such format.
        ConfigError: a weight is NaN or infinite, or `per_expert` fits no layer.
        UnsupportedError: there are stacks of matrices that quantise does not know and `skip` does not name (experts
            of another library, say); or nothing to pack.

    >>> mlp = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    >>> report = quantise(mlp, "int4")
    >>> [each.name for each in report.packed], report.worst(1)[0].error < 0.15
    (['0.weight', '2.weight'], True)
    """
    plan, tensors, seen = QuantPlan(module, Recipe.of(format, head, per_expert, skip)), [], set()
    for owner, part in module.named_modules():
        for leaf, parameter in part.named_parameters(recurse=False):
            name = f"{owner}.{leaf}" if owner else leaf
            error = plan.fill(name, parameter)
            tied = id(parameter) in seen  # then it is there once
            tensors.append(plan.row(name, parameter.shape, parameter.nbytes, error, tied=tied))
            seen.add(id(parameter))
            if progress is not None and isinstance(tensors[-1], PackedTensor):
                progress(sum(isinstance(each, PackedTensor) for each in tensors), plan.matrices)
    plan.install()
    if isinstance(module, Decoder):
        module.float()
    return QuantReport.of(tensors)


def hottest(
    counts_ME: Sequence[Sequence[int]], layers: Sequence[int], share: float, hot: str | Format, cold: str | Format
) -> dict[int, list[str | Format]]:
    """A `per_expert`: of every layer the busiest `share` of its experts in `hot`, the others in `cold`.

    Args:
        counts_ME: assignments each expert of each MoE layer got, of `RoutingMonitor` say.
        layers: the numbers of these layers in the model.
        share: between 0 and 1; rounded up to whole experts.

    >>> hottest([[1, 9, 5, 0]], [3], 0.25, "int8", "int4")
    {3: ['int4', 'int8', 'int4', 'int4']}
    """
    if not 0 <= share <= 1:
        raise ConfigError(f"the share of hot experts must be between 0 and 1, not {share}")
    chosen = {}
    for layer, counts_E in zip(layers, counts_ME, strict=True):
        order = sorted(range(len(counts_E)), key=lambda expert: -counts_E[expert])
        busy = set(order[: math.ceil(share * len(counts_E))])
        chosen[layer] = [hot if expert in busy else cold for expert in range(len(counts_E))]
    return chosen


def is_quantised(module: nn.Module) -> bool:
    """Whether some part of it is packed."""
    return any(isinstance(part, QuantMatrix | QuantExperts) for part in module.modules())


@contextmanager
def named(name: str) -> Iterator[None]:
    """Put the parameter's name before what `pack` says of its numbers."""
    try:
        yield
    except ConfigError as problem:
        raise ConfigError(f"{name} cannot be quantised: {problem}") from None


def replace_modules(root: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Put each new module wherever the old one stands; one that is used in two places stays one."""
    for parent in list(root.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in new:
                setattr(parent, name, new[child])


class QuantPlan:
    """What each part of a module becomes: its packed twin, zeroed, or a reason for none.

    Args:
        root: the module.
        recipe: which format each matrix gets.
        device: of the twins; on "meta" they have no memory.
    Raises:
        ConfigError, UnsupportedError: as `quantise` has it.

    Attributes:
        matrices: that are packed; of experts two stacks.
    """

    def __init__(self, root: nn.Module, recipe: Recipe, device: str = "cpu") -> None:
        self.root, self.recipe, self.device = root, recipe, device
        self.reasons: dict[str, str] = {}
        self.twins: dict[str, QuantMatrix | QuantExperts] = {}
        self.old = dict(root.named_modules())
        if is_quantised(root):
            raise UnsupportedError(f"this {type(root).__name__} is quantised already: start from the unquantised one")
        unused = dict(recipe.per_expert)
        for name, part in self.old.items():
            self._plan(name, part, unused)
        if unused:
            raise ConfigError(f"per_expert names {next(iter(unused))!r}, which is no layer of experts")
        if not self.twins:
            raise UnsupportedError(f"{type(root).__name__} holds no linear layer and no experts to quantise")
        self.matrices = sum(2 if isinstance(twin, QuantExperts) else 1 for twin in self.twins.values())

    def fill(self, name: str, value: Tensor) -> float:
        """Pack the parameter `name` into its module's twin, if that has one; its relative error."""
        owner, _, leaf = name.rpartition(".")
        with named(name):
            return self.twins[owner].fill(leaf, value) if owner in self.twins else 0.0

    def row(
        self, name: str, shape: Sequence[int], nbytes: int, error: float, tied: bool = False
    ) -> PackedTensor | KeptTensor:
        """The report's line on the parameter `name`, which had `nbytes`, or none of its own where it is `tied`."""
        owner, _, leaf = name.rpartition(".")
        shape, before, twin = tuple(shape), 0 if tied else nbytes, self.twins.get(owner)
        if twin is None or leaf.endswith("bias"):
            why = "a vector" if len(shape) < 2 or twin is not None else self.reasons[owner]
            after = math.prod(shape) * 4 if isinstance(self.root, Decoder) else nbytes
            return KeptTensor(name, shape, before, after, why)
        return PackedTensor(name, twin.format_of(leaf), shape, before, twin.bytes_of(leaf), error)

    def install(self) -> None:
        """Put the twins in the places of what they stand for."""
        for name, twin in self.twins.items():
            twin.train(self.old[name].training)
        replace_modules(self.root, {self.old[name]: twin for name, twin in self.twins.items()})

    def _plan(self, name: str, part: nn.Module, unused: dict[int | str, Sequence[Format]]) -> None:
        """Give the part a twin, or a reason for none."""
        formats = self._formats(name, part, unused)
        pattern = next((each for each in self.recipe.skip if fnmatchcase(name, each)), None)
        if formats is not None and pattern is None:
            if part is self.root:
                raise UnsupportedError(f"a {type(part).__name__} cannot be replaced in itself: give what holds it")
            with torch.device(self.device):
                self.twins[name] = empty_twin(part, formats)
        elif pattern is not None and not isinstance(part, Router):
            self.reasons[name] = f"its name matches {pattern!r}, which is skipped"
        else:
            self.reasons[name] = _reason(name, part)

    def _formats(
        self, name: str, part: nn.Module, unused: dict[int | str, Sequence[Format]]
    ) -> Sequence[Format] | None:
        """What the part is packed in: one format a matrix or expert; None if it is not to be."""
        decoder = isinstance(self.root, Decoder)
        if decoder and name in ("embed", "head") and isinstance(part, nn.Embedding | nn.Linear):
            return [self.recipe.head]
        if type(part) in (nn.Linear, Linear):
            return [self.recipe.format]
        if not isinstance(part, GroupedMLP) or not is_experts(part):
            return None
        pieces = name.split(".")
        layer = int(pieces[1]) if decoder and pieces[2:] == ["mlp", "experts"] else name
        experts = part.down_proj.shape[0]
        formats = unused.pop(layer, unused.pop(name, [self.recipe.format] * experts))
        if len(formats) != experts:
            raise ConfigError(f"per_expert[{layer!r}] has {len(formats)} formats for {experts} experts")
        return formats


def _reason(name: str, part: nn.Module) -> str:
    """Why a part that owns matrices is left as it is.

    Raises:
        UnsupportedError: it owns a stack of matrices that is no convolution.
    """
    stacks = [f"{name}.{leaf}" for leaf, value in part.named_parameters(recurse=False) if value.dim() > 2]
    if isinstance(part, nn.modules.conv._ConvNd):
        return "a convolution"
    if stacks:
        raise UnsupportedError(
            f"{stacks[0]} of {type(part).__name__} is a stack of matrices that quantise does not know, experts "
            f"perhaps; to leave it as it is, name it: skip=[..., {name!r}]"
        )
    if isinstance(part, Router):
        return "a router: rounding it would send tokens elsewhere"
    if isinstance(part, nn.Embedding):
        return "an embedding: its rows are looked up, not multiplied"
    if isinstance(part, nn.Linear):
        return f"{type(part).__name__} is a linear layer with a forward of its own"
    return f"{type(part).__name__} is no linear layer"


def _format(format: str | Format) -> Format:
    return format if isinstance(format, Format) else Format.parse(format)
